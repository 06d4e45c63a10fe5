"""Training losses as sums and counts: means are taken once, after summing over all workers.

Shapes: B images, K sequences per image, T steps, N regions, V vocabulary, M real target words.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss to minimise and the negative log-likelihood, both in nats, summed over the words.

    They differ by label smoothing (Szegedy et al., 1512.00567, section 7), which spreads the share
    `smoothing` of each target over the vocabulary. logits (M, V), targets int64 (M,).
    """
    if smoothing == 0:
        nll = F.cross_entropy(logits.float(), targets, reduction="sum")
        return nll, nll
    log_probs = logits.float().log_softmax(dim=-1)  # (M, V)
    nll = -log_probs.gather(-1, targets.unsqueeze(-1)).sum()
    return (1 - smoothing) * nll - smoothing * log_probs.mean(dim=-1).sum(), nll


def doubly_stochastic(attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Regulariser that makes each region's attention add up to about one over a caption.

    (1 - sum over t of attention)^2, averaged over the regions and summed over the captions, and the
    number of captions; those without a real word do not count (Show, Attend and Tell, eq. 14).

    attention (B, K, T, N), mask bool (B, K, T): the steps with a real word.
    """
    attended = (attention.float() * mask.unsqueeze(-1)).sum(dim=2)  # (B, K, N)
    penalty = (1 - attended).square().mean(dim=-1)  # (B, K)
    real = mask.any(dim=-1)  # (B, K)
    return (penalty * real).sum(), real.sum().to(penalty.dtype)
