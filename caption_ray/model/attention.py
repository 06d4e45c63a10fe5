"""Additive attention over an image's regions, for the recurrent decoders.

Shapes: B images, K sequences per image, N regions, E region dim, A attention dim. A training step
may cover only the first b images and the first k sequences of each (see recurrence.Packing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caption_ray.model.decoder import Memory

CACHED = 2**19
"""Most elements of a (b, k, N, A) tensor that a CPU computes at a time, so that they stay in its
cache. Otherwise most of attention's time there goes into writing to newly allocated memory."""


def projection(region_dim: int, projected_dim: int | None) -> tuple[nn.Module, int]:
    """What regions pass before attention, and their dimension then: a linear map to
    `projected_dim` and a ReLU, or nothing if that is None."""
    if projected_dim is None:
        return nn.Identity(), region_dim
    return nn.Sequential(nn.Linear(region_dim, projected_dim), nn.ReLU()), projected_dim


class AdditiveAttention(nn.Module):
    """v . tanh(query + W region), softmax over the regions (Bahdanau et al., 1409.0473, A.1.2).

    The K queries of an image share its regions and keys, which are computed once (`project`).
    Queries arrive already projected to A, as a decoder computes all projections of its state
    together.
    """

    def __init__(self, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(region_dim, attention_dim)
        """Maps regions (B, N, E) to keys (B, N, A)."""
        self.score = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, query: Tensor, attended: Attended) -> tuple[Tensor, Tensor]:
        """Context vectors (b, k, E) and attention weights (b, k, N) for queries (b, k, A)."""
        weights = attended.scores(query).softmax(dim=-1)
        return attended.context(weights), weights


class Attended(Protocol):
    """Regions and their keys, as a decoding step attends to them."""

    def scores(self, query: Tensor) -> Tensor:
        """score . tanh(query + key), (b, k, N), of queries (b, k, A) and all regions."""

    def context(self, weights: Tensor) -> Tensor:
        """Context vectors (b, k, E): the regions' means, weighted by (b, k, N)."""


class AttendedOnce:
    """`Attended` for a single step. score: (1, A)."""

    def __init__(self, memory: Memory, score: Tensor) -> None:
        self._memory, self._score = memory, score

    def scores(self, query: Tensor) -> Tensor:
        keys, score = self._memory.keys, self._score
        if torch.is_grad_enabled():  # autograd saves the match, so no buffer may be reused
            match = (query.unsqueeze(2) + keys.unsqueeze(1)).tanh_()
            return match @ score[0].to(match.dtype)
        return _scores(query, keys, score)

    def context(self, weights: Tensor) -> Tensor:
        return weights @ self._memory.regions


class AttendedOverTime:
    """`Attended` for all steps of a training pass: gradients of regions, keys and score accumulate
    in place, where autograd would allocate full tensors at each step and add them."""

    def __init__(self, memory: Memory, score: Tensor) -> None:
        regions, keys = memory.regions, memory.keys
        kind = keys.device.type
        # cast once, not at each step
        if torch.is_autocast_enabled(kind):
            regions = regions.to(torch.get_autocast_dtype(kind))
        keys = keys.to(_working_dtype(keys))
        self._sums = _Sums(regions.detach(), keys.detach(), score.detach().to(keys.dtype))
        self._token: Tensor = _Whole.apply(regions, keys, score, self._sums)

    def scores(self, query: Tensor) -> Tensor:
        scores: Tensor = _ScoresOfStep.apply(query, self._token, self._sums)
        return scores

    def context(self, weights: Tensor) -> Tensor:
        context: Tensor = _ContextOfStep.apply(weights, self._token, self._sums)
        return context


class _Sums:
    """Regions, keys and score of a pass, and their gradients summed over its steps."""

    def __init__(self, regions: Tensor, keys: Tensor, score: Tensor) -> None:
        self.regions, self.keys, self.score = regions, keys, score
        self.wants_regions = True
        self.of_regions: Tensor | None = None
        self.of_keys: Tensor | None = None
        """Without the factor `score`, which `_Whole` multiplies in once for all steps."""
        self.of_score: Tensor | None = None


class _Whole(torch.autograd.Function):
    """Gives every step a common input, so that autograd runs this backward after all of theirs."""

    @staticmethod
    def forward(ctx: Any, regions: Tensor, keys: Tensor, score: Tensor, sums: _Sums) -> Tensor:
        ctx.sums, ctx.dtype = sums, score.dtype
        sums.wants_regions = ctx.needs_input_grad[0]
        return keys.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.sums
        of_keys = None
        if sums.of_keys is not None:
            of_keys = sums.of_keys.mul_(sums.score)
        of_score = None if sums.of_score is None else sums.of_score.to(ctx.dtype)
        of_regions = sums.of_regions
        sums.of_regions = sums.of_keys = sums.of_score = None
        return of_regions, of_keys, of_score, None


class _ScoresOfStep(torch.autograd.Function):
    """The scores of one step. No (b, k, N, A) tensor is saved for backward: that would be most of a
    pass's memory, and recomputing it takes no longer than writing and reading it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, token: Tensor, sums: _Sums) -> Tensor:
        ctx.sums = sums
        ctx.save_for_backward(query)
        return _scores(query, sums.keys[: len(query)], sums.score)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (query,) = ctx.saved_tensors
        sums: _Sums = ctx.sums
        if sums.of_keys is None or sums.of_score is None:
            sums.of_keys = torch.zeros_like(sums.keys)
            sums.of_score = torch.zeros_like(sums.score)
        of_query = torch.empty_like(query)
        for some, match in _matches(query, sums.keys[: len(query)]):
            given = gradient[some].to(match.dtype)
            sums.of_score += given.reshape(1, -1) @ match.flatten(0, -2)
            given = given.unsqueeze(-1).expand_as(match)
            of_sum = torch.ops.aten.tanh_backward.grad_input(given, match, grad_input=match)
            for one in of_sum.unbind(dim=1):
                sums.of_keys[some] += one
            of_query[some] = of_sum.sum(dim=2) * sums.score
        return of_query, None, None


class _ContextOfStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, token: Tensor, sums: _Sums) -> Tensor:
        ctx.sums, ctx.dtype = sums, weights.dtype
        regions = sums.regions[: len(weights)]
        weights = weights.to(regions.dtype)
        ctx.save_for_backward(weights)
        return weights @ regions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        sums: _Sums = ctx.sums
        images = len(weights)
        if sums.wants_regions:
            dtype = _working_dtype(sums.regions)
            if sums.of_regions is None:
                sums.of_regions = torch.zeros_like(sums.regions, dtype=dtype)
            sums.of_regions[:images].baddbmm_(weights.transpose(1, 2).to(dtype), gradient.to(dtype))
        of_weights = gradient @ sums.regions[:images].transpose(1, 2)
        return of_weights.to(ctx.dtype), None, None


def _scores(query: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """Scores (b, k, N) of queries (b, k, A) and keys (b, N, A), without gradients."""
    scores = query.new_empty(*query.shape[:2], keys.shape[1], dtype=_working_dtype(keys))
    for some, match in _matches(query, keys):
        torch.matmul(match, score[0].to(match.dtype), out=scores[some])
    return scores


def _matches(query: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields tanh(query + key), (b, k, N, A), of queries (b, k, A) and keys (b, N, A), for a slice
    of the images at a time; each overwrites the one before."""
    images, k, dim = query.shape
    of_one, dtype = (k, keys.shape[1], dim), _working_dtype(keys)
    at_a_time = images
    if query.device.type == "cpu":
        at_a_time = max(1, min(images, CACHED // math.prod(of_one)))
    room, query = query.new_empty(at_a_time, *of_one, dtype=dtype), query.to(dtype)
    for first in range(0, images, at_a_time):
        some = slice(first, min(first + at_a_time, images))
        match = room[: some.stop - first]
        torch.add(query[some].unsqueeze(2), keys[some].to(dtype).unsqueeze(1), out=match).tanh_()
        yield some, match


def _working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in with such a tensor: on CPUs never bfloat16, in which tanh takes five
    times as long there, and baddbmm_ of a few captions many times as long."""
    if tensor.device.type != "cpu":
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)
