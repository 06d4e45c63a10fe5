"""Several captioners that caption together.

Shapes: B images, S height and width in pixels, K sequences per image, N regions, V vocabulary,
M members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from caption_ray.model.captioner import Captioner
from caption_ray.model.decoder import State, StepFn, StepOutput, narrowed_step


class Ensemble(nn.Module):
    """Captioners that agree on each word: its probability is the mean of theirs (a uniform mixture,
    Lakshminarayanan et al., 1612.01474, section 2.4; of captioners, Vinyals et al., 1609.06647).

    To a search it is a captioner like any other. Members may differ in all but the vocabulary and
    the images they take.
    """

    def __init__(self, members: Sequence[Captioner]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.grid = members[0].grid
        """As of a captioner. Words look where the members look on average, or, if their grids
        differ, where the first one does."""
        self.grids_agree = all(member.grid == self.grid for member in members)

    def begin(self, images: Tensor, k: int) -> tuple[StepFn, State]:
        """As of a captioner; the state is the members' states, one behind the other."""
        begun = [member.begin(images, k) for member in self.members]  # type: ignore[operator]
        step = _JointStep(
            [step for step, _ in begun], [len(state) for _, state in begun], self.grids_agree
        )
        return step, tuple(part for _, state in begun for part in state)


@dataclass(frozen=True)
class _JointStep:
    """The members' steps as one."""

    steps: Sequence[StepFn]
    sizes: Sequence[int]
    """How many parts of the state belong to each."""
    grids_agree: bool

    def __call__(self, tokens: Tensor, state: State) -> StepOutput:
        parts = iter(state)
        outputs = [
            step(tokens, tuple(islice(parts, size)))
            for step, size in zip(self.steps, self.sizes, strict=True)
        ]
        attention = [output.attention.float() for output in outputs]
        return StepOutput(
            _log_mean_probs([output.logits for output in outputs]),
            tuple(part for output in outputs for part in output.state),
            torch.stack(attention).mean(dim=0) if self.grids_agree else attention[0],
        )

    def of(self, images: Tensor) -> _JointStep | None:
        """Of these images only, int64 (b,), if every member's step has such a form."""
        narrowed = [narrowed_step(step, images) for step in self.steps]
        steps = [step for step in narrowed if step is not None]
        return replace(self, steps=steps) if len(steps) == len(narrowed) else None


def _log_mean_probs(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean of softmax(logits), float32 (B, K, V), of M logits (B, K, V)."""
    log_probs = torch.stack([one.float().log_softmax(dim=-1) for one in logits])
    return log_probs.logsumexp(dim=0) - math.log(len(logits))
