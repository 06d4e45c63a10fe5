"""Losses, compared to loops in NumPy."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from caption_ray.model.loss import doubly_stochastic, token_loss


def test_token_loss_is_the_summed_negative_log_probability() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(7, 11)), rng.integers(0, 11, 7)
    expected = sum(
        math.log(sum(math.exp(other) for other in row)) - row[target]
        for row, target in zip(logits, targets, strict=True)
    )
    loss, nll = token_loss(torch.tensor(logits).float(), torch.tensor(targets))
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert nll.item() == loss.item()


def test_label_smoothing_changes_what_is_minimised_and_not_what_is_reported() -> None:
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    _, plain = token_loss(logits, targets)
    loss, nll = token_loss(logits, targets, 0.1)
    torch.testing.assert_close(nll, plain)
    reference = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss, reference)
    assert loss.item() != nll.item()


def test_token_loss_of_uniform_logits_is_the_vocabularys_logarithm() -> None:
    logits, targets = torch.zeros(4, 1000, dtype=torch.bfloat16), torch.arange(4)
    for smoothing in (0.0, 0.3):
        for total in token_loss(logits, targets, smoothing):
            assert total.dtype == torch.float32
            assert math.isclose(total / 4, math.log(1000), rel_tol=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    logits, targets = torch.randn(9, 5), torch.randint(0, 5, (9,))
    whole, parts = (
        token_loss(logits, targets),
        (
            token_loss(logits[:2], targets[:2]),
            token_loss(logits[2:], targets[2:]),
        ),
    )
    for i in range(2):
        torch.testing.assert_close(whole[i], parts[0][i] + parts[1][i])


def test_no_words_have_no_loss() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    for smoothing in (0.0, 0.1):
        loss, nll = token_loss(logits, torch.zeros(0, dtype=torch.int64), smoothing)
        loss.backward()
        assert (loss.item(), nll.item()) == (0.0, 0.0)


def test_doubly_stochastic_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(6), size=(2, 3, 5))  # (B, K, T, N)
    lengths = np.array([[5, 1, 3], [2, 0, 4]])
    mask = np.arange(5) < lengths[..., None]
    expected, captions = 0.0, 0
    for b in range(2):
        for k in range(3):
            if lengths[b, k] == 0:
                continue
            captions += 1
            for region in range(6):
                attended = sum(attention[b, k, t, region] for t in range(lengths[b, k]))
                expected += (1 - attended) ** 2 / 6
    total, count = doubly_stochastic(torch.tensor(attention), torch.tensor(mask))
    assert math.isclose(total.item(), expected, rel_tol=1e-5)
    assert count.item() == captions == 5


def test_attending_once_to_every_region_costs_nothing() -> None:
    attention = torch.eye(4).expand(2, 3, 4, 4)  # step t attends to region t
    total, _ = doubly_stochastic(attention, torch.ones(2, 3, 4, dtype=torch.bool))
    assert total.item() == 0.0
