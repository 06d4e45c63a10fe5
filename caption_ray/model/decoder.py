"""The interface of decoders, from regions to words: all that training and search know of one.

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
"""Ids of the special words, as data/vocabulary.py assigns them."""

State: TypeAlias = tuple[Tensor, ...]
"""A decoder's memory of each sequence so far: tensors (B, K, ...)."""


class Memory(NamedTuple):
    """What a decoder computes once per image and all K sequences of the image share."""

    regions: Tensor
    """(B, N, E)."""
    keys: Tensor
    """The attention keys of the regions, (B, N, A)."""
    summary: Tensor | None = None
    """A vector of the whole picture, (B, D), for decoders that use one."""


class StepOutput(NamedTuple):
    """The prediction of each sequence's next word."""

    logits: Tensor
    """(B, K, V)."""
    state: State
    attention: Tensor
    """Weights (B, K, N) that sum to one over the regions."""


StepFn: TypeAlias = Callable[[Tensor, State], StepOutput]
"""Maps the last words, int64 (B, K), and the state to the next words' logits and the new state."""

DecoderStep: TypeAlias = Callable[[Tensor, State, Memory], StepOutput]
"""The signature of `Decoder.step`."""


def narrowed_step(step: StepFn, images: Tensor) -> StepFn | None:
    """The step function for some images of the batch only, given by their indices, int64 (b,); None
    if it has no method `of` that makes one."""
    of: Callable[[Tensor], StepFn | None] | None = getattr(step, "of", None)
    return None if of is None else of(images)


@dataclass(frozen=True)
class BoundStep:
    """A decoder's step over a batch of images: a StepFn that can be narrowed to some of them."""

    step: DecoderStep
    memory: Memory

    def __call__(self, tokens: Tensor, state: State) -> StepOutput:
        return self.step(tokens, state, self.memory)

    def of(self, images: Tensor) -> BoundStep:
        """The step for some images of the batch only: their indices, int64 (b,)."""
        parts = (None if part is None else part[images] for part in self.memory)
        return BoundStep(self.step, Memory(*parts))  # type: ignore[arg-type]


class DecoderOutput(NamedTuple):
    """Predictions under teacher forcing."""

    logits: Tensor
    """(M, V), for the real target words only, in the order of `tokens[..., 1:][mask]`."""
    attention: Tensor
    """(B, K, L - 1, N); zero after a caption's end."""
    mask: Tensor
    """Bool (B, K, L - 1): the steps whose target is a real word, END included."""
    places: Tensor | None = None
    """Indices of the real words in the flattened mask, int64 (M,), if the decoder knows them:
    to find them in the mask, the CPU must wait for the GPU."""

    def targets(self, tokens: Tensor) -> Tensor:
        """The real words (M,) of tokens (B, K, L)."""
        if self.places is None:
            return tokens[..., 1:][self.mask]
        return tokens[..., 1:].flatten().index_select(0, self.places)


def places_of(mask: Tensor, num_words: int | None) -> Tensor:
    """Indices where the flattened mask is true, int64 (M,); no wait for the GPU if M is given."""
    if num_words is None:
        return mask.flatten().nonzero().squeeze(1)
    return torch.nonzero_static(mask.flatten(), size=num_words).squeeze(1)


class Decoder(nn.Module, ABC):
    """The interface of a decoder.

    `forward` must give the results of a loop over `step`, and may compute all steps at once.
    """

    def compile_training(self) -> None:
        """From now on let `forward` on a GPU use compiled kernels and CUDA graphs, if the decoder
        has any. Call it last, as a module with graphs cannot be copied."""

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

        num_words: M, if the caller knows it; otherwise a decoder that needs it must wait for the
        GPU.
        """
