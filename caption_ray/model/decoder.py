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


class Decoder(nn.Module, ABC):
    """What training and search know of a decoder.

    `forward` must give what a loop over `step` gives, and may compute all steps at once.
    """

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
    def forward(self, regions: Tensor, tokens: Tensor) -> DecoderOutput:
        """Predict each word of tokens, int64 (B, K, L), from those before it (teacher forcing)."""
