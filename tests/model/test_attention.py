"""Additive attention against its formula."""

from __future__ import annotations

import torch

from caption_ray.model.attention import AdditiveAttention

B, K, N, E, A = 2, 3, 5, 4, 6


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(E, A)
    query, regions = torch.randn(B, K, A), torch.randn(B, N, E)
    context, weights = attention(query, attention.project(regions), regions)

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
    _, weights = attention(query, attention.project(regions), regions)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, K))


def test_order_of_the_regions_does_not_matter() -> None:
    attention = AdditiveAttention(E, A)
    query, regions, order = torch.randn(B, K, A), torch.randn(B, N, E), torch.randperm(N)
    context, weights = attention(query, attention.project(regions), regions)
    shuffled = regions[:, order]
    again, reordered = attention(query, attention.project(shuffled), shuffled)
    torch.testing.assert_close(again, context)
    torch.testing.assert_close(reordered, weights[..., order])
