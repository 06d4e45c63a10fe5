"""Attention of recurrent states over an image's regions.

Shapes: B images, K sequences per image, N regions, E region dim, A attention dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AdditiveAttention(nn.Module):
    """v . tanh(query + W region), softmax over the regions (Bahdanau et al., 1409.0473, A.1.2).

    The K queries of an image share its regions and keys, which are computed once (`project`).
    Queries come projected to A already, as a decoder can do that together with its other
    projections of the same state.
    """

    def __init__(self, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(region_dim, attention_dim)
        """Keys (B, N, A) of regions (B, N, E)."""
        self.score = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, K, E) and weights (B, K, N) of query (B, K, A), keys (B, N, A) and regions
        (B, N, E)."""
        weights = additive_scores(query, keys, self.score.weight).softmax(dim=-1)  # (B, K, N)
        return weights @ regions, weights


def additive_scores(query: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """score . tanh(query + key) of each query (B, K, A) and key (B, N, A): (B, K, N).

    score (1, A).
    """
    scores: Tensor = _AdditiveScores.apply(query, keys, score)
    return scores


class _AdditiveScores(torch.autograd.Function):
    """Its tensors (B, K, N, A) are most of what attention costs: this has one in the forward pass
    and one in the backward pass, where autograd by itself has two and three."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, score: Tensor) -> Tensor:
        match = (query.unsqueeze(2) + keys.unsqueeze(1)).tanh_()
        score = score.to(match.dtype)
        ctx.save_for_backward(match, score)
        return match @ score[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        match, score = ctx.saved_tensors
        of_score = gradient.reshape(1, -1) @ match.flatten(0, -2)
        of_sum = torch.ops.aten.tanh_backward(gradient.unsqueeze(-1).expand_as(match), match)
        return of_sum.sum(dim=2) * score, of_sum.sum(dim=1) * score, of_score
