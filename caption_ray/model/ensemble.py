"""An ensemble: several captioners that choose each word together.

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
    """Captioners whose word probabilities are averaged at each step (a uniform mixture,
    Lakshminarayanan et al., 1612.01474, section 2.4; of captioners, Vinyals et al., 1609.06647).

    A search uses it like a single captioner. Members may differ in everything but the vocabulary
    and the images they take.
    """

    def __init__(self, members: Sequence[Captioner]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.grid = members[0].grid
        """As for a captioner. Attention is the mean of the members' or, if their grids differ, that
        of the first one."""
        self.grids_agree = all(member.grid == self.grid for member in members)

    def begin(self, images: Tensor, k: int) -> tuple[StepFn, State]:
        """As for a captioner; the state is the members' states, one after the other."""
        begun = [member.begin(images, k) for member in self.members]  # type: ignore[operator]
        step = _JointStep(
            [step for step, _ in begun], [len(state) for _, state in begun], self.grids_agree
        )
        return step, tuple(part for _, state in begun for part in state)


@dataclass(frozen=True)
class _JointStep:
    """The members' steps as one StepFn."""

    steps: Sequence[StepFn]
    sizes: Sequence[int]
    """Number of the state's tensors that belong to each member."""
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
        """The step for some images only, int64 (b,); None unless every member's can be narrowed."""
        narrowed = [narrowed_step(step, images) for step in self.steps]
        steps = [step for step in narrowed if step is not None]
        return replace(self, steps=steps) if len(steps) == len(narrowed) else None


def _log_mean_probs(logits: Sequence[Tensor]) -> Tensor:
    """log of the mean of softmax(logits), float32 (B, K, V), of M logits (B, K, V)."""
    log_probs = torch.stack([one.float().log_softmax(dim=-1) for one in logits])
    return log_probs.logsumexp(dim=0) - math.log(len(logits))
