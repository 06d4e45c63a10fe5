"""The recurrent decoders' elementwise work as fused GPU kernels, which `torch.compile` generates.

Shapes as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from caption_ray.model.decoder import Memory

FORMS = 64
"""Most specialisations of one function, by shapes and modes; torch fails if it needs more."""


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call; any part that cannot be compiled is an error."""
    from torch._dynamo import config  # takes a second, which most processes need not spend

    # one for each combination of autocast or not, gradients or not, first or later step, ...
    config.recompile_limit = max(config.recompile_limit, FORMS)
    return torch.compile(function, fullgraph=True)


class AttendedFused:
    """`Attended` for all steps of a training pass, as `AttendedOverTime`, but no (b, k, N, A)
    tensor is written to memory: the backward pass recomputes it. The gradients of regions, keys and
    score are computed for all steps at once."""

    def __init__(self, memory: Memory, score: Tensor) -> None:
        regions, keys = memory.regions, memory.keys
        if torch.is_autocast_enabled(keys.device.type):  # cast once, not at each step
            regions = regions.to(torch.get_autocast_dtype(keys.device.type))
        self._tape = _Tape(regions.detach(), keys.detach(), score.detach())
        self._token: Tensor = _Whole.apply(regions, keys, score, self._tape)

    def scores(self, query: Tensor) -> Tensor:
        scores: Tensor = _Scores.apply(query, self._token, self._tape)
        return scores

    def context(self, weights: Tensor) -> Tensor:
        context: Tensor = _Context.apply(weights, self._token, self._tape)
        return context


class _Tape:
    """Regions, keys and score of a pass, and its steps' inputs and output gradients."""

    def __init__(self, regions: Tensor, keys: Tensor, score: Tensor) -> None:
        self.regions, self.keys, self.score = regions, keys, score
        self.wants_regions = True
        self.scored: list[tuple[Tensor, Tensor]] = []
        """Queries (B, k, A), and the gradients of their scores, (B, k, N)."""
        self.mixed: list[tuple[Tensor, Tensor]] = []
        """Weights (B, k, N), and the gradients of their contexts, (B, k, E)."""


class _Whole(torch.autograd.Function):
    """Gives every step a common input, so that autograd runs this backward after all of theirs."""

    @staticmethod
    def forward(ctx: Any, regions: Tensor, keys: Tensor, score: Tensor, tape: _Tape) -> Tensor:
        ctx.tape = tape
        tape.wants_regions = ctx.needs_input_grad[0]
        return keys.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        tape: _Tape = ctx.tape
        of_regions = of_keys = of_score = None
        if tape.scored:
            queries, gradients = (
                torch.cat(parts, dim=1) for parts in zip(*tape.scored, strict=True)
            )
            of_keys, of_score = fused(_gradients_of_keys)(gradients, queries, tape.keys, tape.score)
        if tape.mixed and tape.wants_regions:
            weights, gradients = (
                torch.cat(parts, dim=1) for parts in zip(*tape.mixed, strict=True)
            )
            of_regions = weights.transpose(1, 2) @ gradients
        tape.scored.clear()
        tape.mixed.clear()
        return of_regions, of_keys, of_score, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, token: Tensor, tape: _Tape) -> Tensor:
        ctx.tape = tape
        ctx.save_for_backward(query)
        scores: Tensor = fused(_scores)(query, tape.keys, tape.score)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (query,) = ctx.saved_tensors
        ctx.tape.scored.append((query, gradient))
        of_query = fused(_gradient_of_query)(gradient, query, ctx.tape.keys, ctx.tape.score)
        return of_query, None, None


class _Context(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, token: Tensor, tape: _Tape) -> Tensor:
        ctx.tape, ctx.dtype = tape, weights.dtype
        weights = weights.to(tape.regions.dtype)
        ctx.save_for_backward(weights)
        return weights @ tape.regions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        ctx.tape.mixed.append((weights, gradient))
        return (gradient @ ctx.tape.regions.transpose(1, 2)).to(ctx.dtype), None, None


def _match(query: Tensor, keys: Tensor) -> Tensor:
    return (query.float().unsqueeze(2) + keys.float().unsqueeze(1)).tanh()


def _scores(query: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """float32 (B, k, N)"""
    return (_match(query, keys) * score.float()[0]).sum(dim=-1)


def _gradient_of_query(gradient: Tensor, query: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    slope = 1 - _match(query, keys).square()
    of_query = (slope * gradient.unsqueeze(-1)).sum(dim=2) * score.float()[0]
    return of_query.to(query.dtype)


def _gradients_of_keys(
    gradient: Tensor, query: Tensor, keys: Tensor, score: Tensor
) -> tuple[Tensor, Tensor]:
    match = _match(query, keys)
    gradient = gradient.unsqueeze(-1)
    of_keys = ((1 - match.square()) * gradient).sum(dim=1) * score.float()[0]
    of_score = (match * gradient).sum(dim=1).sum(dim=(0, 1))
    return of_keys.to(keys.dtype), of_score.unsqueeze(0).to(score.dtype)
