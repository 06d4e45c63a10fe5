"""Training losses, as sums and counts: a mean is divided once, after all workers have summed.

Shapes: B images, K sequences per image, T steps, N regions, V vocabulary, M real target words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed over the words, and their number.

    logits (M, V), targets int64 (M,).
    """
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, torch.full_like(loss, len(targets))


def doubly_stochastic(attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Regulariser that makes a caption attend to every region about once, over the whole caption.

    (1 - sum over t of attention)^2, meant over the regions and summed over the captions, and the
    number of captions; those without a real word do not count (Show, Attend and Tell, eq. 14).

    attention (B, K, T, N), mask bool (B, K, T): the steps with a real word.
    """
    attended = (attention.float() * mask.unsqueeze(-1)).sum(dim=2)  # (B, K, N)
    penalty = (1 - attended).square().mean(dim=-1)  # (B, K)
    real = mask.any(dim=-1)  # (B, K)
    return (penalty * real).sum(), real.sum().to(penalty.dtype)
