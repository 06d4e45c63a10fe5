"""What training and search know of a decoder: from regions to words.

Shapes: B images, K sequences per image (captions in training, beams in search), N regions,
E region dim, L caption length, T steps, D embedding dim, H hidden dim, A attention dim,
V vocabulary, M real target words of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

PAD, START, END = 0, 1, 2
"""The special words' ids, as data/vocabulary.py gives them out."""

State: TypeAlias = tuple[Tensor, ...]
"""What a decoder remembers of each sequence so far: tensors (B, K, ...)."""


class Memory(NamedTuple):
    """What a decoder needs of each image: computed once, shared by the image's K sequences."""

    regions: Tensor
    """(B, N, E)."""
    keys: Tensor
    """The regions as attention compares them, (B, N, A)."""
    summary: Tensor | None = None
    """The whole picture, (B, D), for decoders that want it."""


class StepOutput(NamedTuple):
    """One more word of each sequence."""

    logits: Tensor
    """(B, K, V)."""
    state: State
    attention: Tensor
    """Weights (B, K, N) that sum to one over the regions."""


StepFn: TypeAlias = Callable[[Tensor, State], StepOutput]
"""From the last words, int64 (B, K), and the state to the next words' logits and the new state."""

DecoderStep: TypeAlias = Callable[[Tensor, State, Memory], StepOutput]
"""The form of `Decoder.step`."""


def narrowed_step(step: StepFn, images: Tensor) -> StepFn | None:
    """The step function of these images of the batch only, int64 (b,), if it has such a form: its
    method `of`."""
    of: Callable[[Tensor], StepFn | None] | None = getattr(step, "of", None)
    return None if of is None else of(images)


@dataclass(frozen=True)
class BoundStep:
    """A decoder's step over the images of a batch: a StepFn that can go on with some of them."""

    step: DecoderStep
    memory: Memory

    def __call__(self, tokens: Tensor, state: State) -> StepOutput:
        return self.step(tokens, state, self.memory)

    def of(self, images: Tensor) -> BoundStep:
        """The step of these images of the batch only, int64 (b,)."""
        parts = (None if part is None else part[images] for part in self.memory)
        return BoundStep(self.step, Memory(*parts))  # type: ignore[arg-type]


class DecoderOutput(NamedTuple):
    """Teacher forcing's predictions."""

    logits: Tensor
    """(M, V), for the real target words only, in the order of `tokens[..., 1:][mask]`."""
    attention: Tensor
    """(B, K, L - 1, N); zero after a caption's end."""
    mask: Tensor
    """Bool (B, K, L - 1): the steps whose target is a real word, END included."""
    places: Tensor | None = None
    """Where the real words stand in the flattened mask, int64 (M,), if the decoder knows: whoever
    reads that off the mask must wait for the GPU."""

    def targets(self, tokens: Tensor) -> Tensor:
        """The real words (M,) of tokens (B, K, L)."""
        if self.places is None:
            return tokens[..., 1:][self.mask]
        return tokens[..., 1:].flatten().index_select(0, self.places)


def places_of(mask: Tensor, num_words: int | None) -> Tensor:
    """Where the flattened mask is true, int64 (M,). Without a wait for the GPU if M is given."""
    if num_words is None:
        return mask.flatten().nonzero().squeeze(1)
    return torch.nonzero_static(mask.flatten(), size=num_words).squeeze(1)


class Decoder(nn.Module, ABC):
    """What training and search know of a decoder.

    `forward` must give what a loop over `step` gives, and may compute all steps at once.
    """

    def compile_training(self) -> None:
        """Let `forward` on a GPU use kernels of its own and CUDA graphs from now on, where the
        decoder has some. To be called last, as a module with graphs cannot be copied."""

    @abstractmethod
    def prepare(self, regions: Tensor) -> Memory:
        """What is computed once per image from regions (B, N, E)."""

    @abstractmethod
    def initial_state(self, memory: Memory, k: int) -> State:
        """The state of K sequences per image before their first word."""

    @abstractmethod
    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        """Predict the word after tokens, int64 (B, K)."""

    @abstractmethod
    def forward(
        self, regions: Tensor, tokens: Tensor, num_words: int | None = None
    ) -> DecoderOutput:
        """Predict each word of tokens, int64 (B, K, L), from those before it (teacher forcing).

        num_words: M, if the caller knows it; a decoder may need it, and must wait for the GPU to
        learn it.
        """
