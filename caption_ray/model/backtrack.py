"""Reading captions back from the recorded steps of a beam search: whole captions at its end and,
while it runs, the words that are already certain.

Shapes: B images, K beams per image, R sequences returned per image, T steps, N regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from caption_ray.model.decoder import PAD


class Hypotheses(NamedTuple):
    """The R best captions of each image, the best first."""

    tokens: Tensor
    """int64 (B, R, T): words and, unless it was cut at the maximal length, END; then PAD."""
    log_probs: Tensor
    """float32 (B, R): the sum over the words, END included; -inf if there is no such caption."""
    lengths: Tensor
    """int64 (B, R): number of words, END included."""
    attention: Tensor
    """(B, R, T, N): each word's attention weights; zero for PAD."""


class SearchStep(NamedTuple):
    """What one step of beam search records for reading captions back. All (B, K)."""

    tokens: Tensor
    parent: Tensor
    """Index of the previous step's beam that each token continues."""
    attention: Tensor
    """(B, K, N), in the order of the previous step's beams, as `parent` indexes them."""
    log_probs: Tensor
    scores: Tensor
    """-inf, except where a caption ended at this step."""


def backtrack(trace: list[SearchStep], num_return: int) -> Hypotheses:
    """The `num_return` captions of best score, read from their last words back to their first."""
    scores, last = torch.cat([step.scores for step in trace], dim=1).topk(num_return)  # (B, R)
    exists = scores > -torch.inf
    tokens, attention = _read(trace, last, exists)
    log_probs = torch.cat([step.log_probs for step in trace], dim=1).gather(1, last)
    lengths = (last // trace[0].scores.shape[1] + 1) * exists
    return Hypotheses(tokens, log_probs.masked_fill(~exists, -torch.inf), lengths, attention)


def _read(trace: list[SearchStep], last: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, R, T) and attention (B, R, T, N) of the sequences whose last words are at `last`,
    int64 (B, R): step * K + beam. PAD and zero unless they exist: `exists`, bool (B, R)."""
    beams = trace[0].scores.shape[1]
    lengths = (last // beams + 1) * exists
    beam = last % beams  # (B, R)
    image = torch.arange(len(beam), device=beam.device).unsqueeze(1)

    tokens, attentions = [], []
    for index, step in reversed(list(enumerate(trace))):
        within = index < lengths  # (B, R)
        parent = step.parent.gather(1, beam)
        tokens.append(step.tokens.gather(1, beam).masked_fill(~within, PAD))
        attentions.append(step.attention[image, parent].masked_fill(~within.unsqueeze(-1), 0.0))
        beam = torch.where(within, parent, beam)
    return torch.stack(tokens[::-1], dim=-1), torch.stack(attentions[::-1], dim=2)


def decided(trace: list[SearchStep], can_win: Tensor) -> tuple[Tensor, Tensor]:
    """The longest common prefix of all captions that can still be the best: those of the beams that
    `can_win`, bool (B, K), and the best that ended. Tokens (B, T) and the prefix's length, (B,)."""
    beams = can_win.shape[1]
    score, ended = torch.cat([step.scores for step in trace], dim=1).topk(1)  # (B, 1)
    live = torch.arange(beams, device=ended.device) + beams * (len(trace) - 1)
    last = torch.cat([ended, live.expand(len(ended), -1)], dim=1)  # (B, 1 + K)
    possible = torch.cat([score > -torch.inf, can_win], dim=1)
    tokens, _ = _read(trace, last, possible)
    return common_beginning(tokens, possible)


def common_beginning(tokens: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first sequence (B, T) of tokens (B, K, T) that counts, and the length of the prefix that
    it shares with all others that count, int64 (B,). counts: bool (B, K); None: all do."""
    if counts is None:
        counts = torch.ones_like(tokens[..., 0], dtype=torch.bool)  # (B, K)
    first = counts.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, tokens.shape[-1])
    one = tokens.gather(1, first)  # (B, 1, T)
    same = ((tokens == one) | ~counts.unsqueeze(-1)).all(dim=1)  # (B, T)
    return one.squeeze(1), same.int().cumprod(dim=1).sum(dim=1)
