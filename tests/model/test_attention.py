"""Additive attention, compared to its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caption_ray.model import attention as module
from caption_ray.model.attention import AdditiveAttention, AttendedOnce, AttendedOverTime
from caption_ray.model.decoder import Memory

B, K, N, E, A = 2, 3, 5, 4, 6


def _attended(attention: AdditiveAttention, regions: Tensor) -> AttendedOnce:
    return AttendedOnce(Memory(regions, attention.project(regions)), attention.score.weight)


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(E, A)
    query, regions = torch.randn(B, K, A), torch.randn(B, N, E)
    context, weights = attention(query, _attended(attention, regions))

    (projection, bias), scores = attention.project.parameters(), attention.score.weight[0]
    for b in range(B):
        for k in range(K):
            matches = [scores @ torch.tanh(query[b, k] + projection @ r + bias) for r in regions[b]]
            expected = torch.softmax(torch.stack(matches), dim=0)
            torch.testing.assert_close(weights[b, k], expected)
            weighted = sum(w * r for w, r in zip(expected, regions[b], strict=True))
            torch.testing.assert_close(context[b, k], weighted)


def test_weights_sum_to_one_however_large_the_query() -> None:
    attention = AdditiveAttention(E, A)
    regions = torch.randn(B, N, E)
    query = 1e4 * torch.randn(B, K, A)
    _, weights = attention(query, _attended(attention, regions))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, K))


def test_order_of_the_regions_does_not_matter() -> None:
    attention = AdditiveAttention(E, A)
    query, regions, order = torch.randn(B, K, A), torch.randn(B, N, E), torch.randperm(N)
    context, weights = attention(query, _attended(attention, regions))
    shuffled = regions[:, order]
    again, reordered = attention(query, _attended(attention, shuffled))
    torch.testing.assert_close(again, context)
    torch.testing.assert_close(reordered, weights[..., order])


@pytest.mark.parametrize("cached", [1, 2 * K * N * A, 2**19])  # one image at a time, two, all
def test_over_time_it_has_the_gradients_of_its_steps(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHED", cached)
    torch.manual_seed(0)
    attention = AdditiveAttention(E, A).double()
    regions = torch.randn(3, N, E, dtype=torch.double, requires_grad=True)
    # the later steps have fewer images and sequences
    queries = [torch.randn(b, k, A, dtype=torch.double, requires_grad=True)
               for b, k in ((3, 3), (3, 2), (1, 2), (1, 1))]  # fmt: skip
    leaves = [regions, *queries, *attention.parameters()]
    found = []
    for over_time in (False, True):
        memory, score = Memory(regions, attention.project(regions)), attention.score.weight
        whole, total = AttendedOverTime(memory, score), torch.zeros((), dtype=torch.double)
        for query in queries:
            part = Memory(memory.regions[: len(query)], memory.keys[: len(query)])
            attended = whole if over_time else AttendedOnce(part, score)
            context, weights = attention(query, attended)
            total = total + context.sin().sum() + weights.square().sum()
        found.append([total, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cached", [1, 2 * K * N * A])
def test_the_cache_s_size_changes_no_score(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(E, A)
    query, regions = torch.randn(5, K, A), torch.randn(5, N, E)
    expected = _attended(attention, regions).scores(query)  # with gradients: all at once
    monkeypatch.setattr(module, "CACHED", cached)
    with torch.inference_mode():
        torch.testing.assert_close(_attended(attention, regions).scores(query), expected)
