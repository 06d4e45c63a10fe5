"""Recurrences in training: few steps after a caption's end, and weight gradients once per pass.

Shapes: B images, K captions per image, T steps of the longest caption, M real words, R rows: the
captions of all steps together, including those that have ended but are computed nevertheless.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caption_ray.model.attention import Attended
from caption_ray.model.decoder import PAD, Decoder, DecoderOutput, State, places_of
from caption_ray.model.graphs import GRAPHED_STEPS, Graphed


class Packing:
    """Captions sorted so that each step needs only the first images and, of these, the first
    captions: the images of the longest captions first, and the longest caption of each image first.

    So every step is a plain slice. For COCO, with five captions per image, this skips nine tenths
    of the steps after a caption's end.
    """

    def __init__(self, mask: Tensor) -> None:
        """mask: bool (B, K, L - 1), true for the real words, which come first."""
        lengths, self.captions = mask.sum(dim=-1).sort(dim=1, descending=True)
        self.images = lengths[:, 0].argsort(descending=True)  # (B,)
        """Indices of the images in this order."""
        self.captions = self.captions[self.images]  # (B, K)
        """For each of these images, the indices of its captions in this order."""
        lengths = lengths[self.images].cpu()
        steps = max(1, int(lengths[0, 0]))  # one even without words, so that there are gradients
        after = torch.arange(steps).view(-1, 1)
        images = (lengths[:, 0] > after).sum(dim=1)
        captions = (lengths.amax(dim=0) > after).sum(dim=1)
        images[0], captions[0] = lengths.shape
        self.sizes: list[tuple[int, int]] = list(
            zip(images.tolist(), captions.tolist(), strict=True)
        )
        """Numbers of images, and of captions per image, at each step."""
        self.row_counts = [b * k for b, k in self.sizes]

        device = mask.device
        image, caption, step = mask.nonzero().unbind(dim=1)
        image_place = self.images.argsort()  # the inverse orders
        caption_place = self.captions.argsort(dim=1)[image_place]
        starts = (images * captions).cumsum(0) - images * captions
        self.real = (
            starts.to(device)[step]
            + image_place[image] * captions.to(device)[step]
            + caption_place[image, caption]
        )
        """Indices of the real words among the rows, int64 (M,), in the order of the mask."""

    def rows(self, values: Tensor) -> Tensor:
        """Rows (R, ...) of values for each word, (B, K, >= T, ...), in the mask's order."""
        ordered = values[self.images.unsqueeze(1), self.captions]
        return torch.cat(
            [ordered[:b, :k, step].flatten(0, 1) for step, (b, k) in enumerate(self.sizes)]
        )

    def steps(self, rows: Tensor) -> list[Tensor]:
        """The rows (R, ...) of each step, (b, k, ...)."""
        parts = torch.split(rows, self.row_counts)
        return [
            part.view(*size, *part.shape[1:]) for part, size in zip(parts, self.sizes, strict=True)
        ]

    def words(self, steps: list[Tensor]) -> Tensor:
        """The values (M, ...) of the real words, from those of each step, (b, k, ...)."""
        return torch.cat([step.flatten(0, 1) for step in steps])[self.real]


class AttendedByStep:
    """Takes all rows of a packing at once, but attends step by step: on CPUs, one step's tensors
    fit the cache."""

    def __init__(self, packing: Packing, attended: Attended) -> None:
        """attended: over the images in the packing's order."""
        self._packing, self._attended = packing, attended

    def scores(self, query: Tensor) -> Tensor:
        """(R, A) -> (R, N)"""
        return self._rows(self._attended.scores, query)

    def context(self, weights: Tensor) -> Tensor:
        """(R, N) -> (R, E)"""
        return self._rows(self._attended.context, weights)

    def _rows(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return torch.cat([function(step).flatten(0, 1) for step in self._packing.steps(rows)])


class RecurrentDecoder(Decoder):
    """A decoder whose training passes can run as CUDA graphs, except for the words' embedding and
    the logits, which are computed for real words only."""

    embedding: nn.Embedding
    dropout: nn.Dropout

    OUTPUT: tuple[str, ...]
    """Names of the output layer's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._graphed: Graphed | None = None

    @abstractmethod
    def all_steps(self, words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """The output layer's input (B, K, T, ...) and attention (B, K, T, N) at all steps, from
        embedded words (B, K, T, D), computed as suits GPUs. Must not depend on tensors' values."""

    @abstractmethod
    def logits(self, mixed: Tensor) -> Tensor:
        """Logits (..., V) from the output layer's input."""

    def compile_training(self) -> None:
        self._graphed = Graphed(self.all_steps, self, {"embedding.weight", *self.OUTPUT})

    def forward(
        self, regions: Tensor, tokens: Tensor, num_words: int | None = None
    ) -> DecoderOutput:
        if self._graphed is None or not regions.is_cuda:
            return self.packed(regions, tokens)
        return self.graphed(self._graphed, regions, tokens, num_words)

    @abstractmethod
    def packed(self, regions: Tensor, tokens: Tensor) -> DecoderOutput:
        """`forward` step by step, each with the captions that have not ended."""

    def graphed(
        self, graph: Graphed, regions: Tensor, tokens: Tensor, num_words: int | None
    ) -> DecoderOutput:
        """`forward` with every caption in every step."""
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        steps = mask.shape[-1]
        rest = -steps % GRAPHED_STEPS
        places = places_of(mask, num_words)  # (M,)
        words = self.dropout(self.embedding(F.pad(tokens[..., :-1], (0, rest), value=PAD)))
        mixed, attention = graph(words, regions)
        among_all = places + places // steps * rest
        logits = self.logits(mixed.flatten(0, 2).index_select(0, among_all))
        return DecoderOutput(logits, attention[:, :, :steps] * mask.unsqueeze(-1), mask, places)


def lstm(entering: Tensor, context: Tensor, recurrent: Tensor, state: State) -> State:
    """A step of an LSTM (Hochreiter and Schmidhuber 1997), whose input is a sum of three parts,
    each (..., 4 H); gates: input, forget, output, new. The state is (hidden, cell), (..., H)."""
    _, cell = state
    gates, new = (entering + context + recurrent).tensor_split([3 * cell.shape[-1]], dim=-1)
    admit, keep, emit = gates.sigmoid().chunk(3, dim=-1)
    cell = keep * cell + admit * new.tanh()
    return emit * cell.tanh(), cell


def narrowed(state: State, images: int, captions: int) -> State:
    """The state of the first images and captions; unchanged if these are all, since the gradient of
    a slice is a full-size tensor."""
    if (images, captions) == state[0].shape[:2]:
        return state
    return tuple(part[:images, :captions] for part in state)


def placed(words: Tensor, mask: Tensor) -> Tensor:
    """Values (M, ...) of the real words, at their places in the mask (B, K, L - 1); 0 elsewhere."""
    whole = words.new_zeros(*mask.shape, *words.shape[1:])
    whole[mask] = words
    return whole


class OverTime:
    """A linear map that is applied at each step of one pass.

    Its weight's gradient is a sum over all steps, computed here as one product of all inputs and
    output gradients, where autograd would allocate a matrix for each step and add them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._tape: list[tuple[Tensor, Tensor]] = []
        self._token: Tensor = _Sum.apply(weight, bias, self._tape)
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        kind = weight.device.type
        if torch.is_autocast_enabled(kind):  # cast once, not at each step
            dtype = torch.get_autocast_dtype(kind)
            self._weight = self._weight.to(dtype)
            self._bias = None if self._bias is None else self._bias.to(dtype)

    @classmethod
    def of(cls, linear: nn.Linear) -> OverTime:
        return cls(linear.weight, linear.bias)

    def __call__(self, entering: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        entering = entering.to(self._weight.dtype)
        result: Tensor = _Step.apply(entering, self._token, self._weight, self._bias, self._tape)
        return result


class _Step(torch.autograd.Function):
    """One step of a linear map; backward gives its input's gradient and records on the tape."""

    @staticmethod
    def forward(
        ctx: Any, entering: Tensor, token: Tensor, weight: Tensor, bias: Tensor | None,
        tape: list[tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        ctx.tape = tape
        ctx.save_for_backward(entering, weight)
        return F.linear(entering, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        entering, weight = ctx.saved_tensors
        ctx.tape.append((entering.flatten(0, -2), gradient.flatten(0, -2)))
        return gradient @ weight, None, None, None, None


class _Sum(torch.autograd.Function):
    """Gives every step a common input, so that autograd runs this backward after all of theirs."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, tape: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.tape, ctx.dtype, ctx.has_bias = tape, weight.dtype, bias is not None
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        entered, gradients = (torch.cat(parts) for parts in zip(*ctx.tape, strict=True))
        ctx.tape.clear()
        weight = (gradients.t() @ entered).to(ctx.dtype)
        return weight, gradients.sum(dim=0).to(ctx.dtype) if ctx.has_bias else None, None
