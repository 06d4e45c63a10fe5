"""Saving and stopping between two steps: who asks for it, and how all workers agree on the step.

A save is asked for by the interval between checkpoints, by preemption of a node (SIGTERM to `ray
start --block`, `ray drain-node` on a spot notice), and by a new node: Ray Train then restarts all
workers, and what was learnt since the last checkpoint would be lost. A stop is asked for by whoever
stops the job (`ray job stop`, Ctrl-C).
"""

from __future__ import annotations

import math
import time
from enum import IntEnum
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from caption_ray import cluster
from caption_ray.config import TrainConfig
from caption_ray.training.console import Console

LOOK_SECONDS = 2.0
"""Seconds between looks for nodes that are draining or new. Each look is a round trip of all
workers to one actor, which takes some milliseconds."""

HURRY_SECONDS = 10.0
"""Seconds between checkpoints while a restart of all workers is to be expected."""

RESIZE_PATIENCE = 3 * cluster.RESIZE_SECONDS
"""Seconds after which a new node is no longer expected to become a worker."""

ASK_SECONDS = 0.5
"""Seconds between questions to the driver whether the run should stop."""


class Wish(IntEnum):
    """What should happen after a step. If workers wish for different things, the highest wins."""

    GO_ON = 0
    LOOK = 1
    """Ask Ray whether a node is draining, which all workers must do at the same step."""
    SAVE = 2
    STOP = 3
    """Save, and end the training function."""


class Votes:
    """The highest of all ranks' wishes, known to every rank one step later.

    The votes travel while the next step is computed, so nobody waits for them. They go over gloo,
    because reading a tensor on a GPU would wait for the GPU. Every rank must cast and count equally
    often.
    """

    def __init__(self) -> None:
        shared = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if shared else None
        self._votes = torch.tensor(Wish.GO_ON)
        self._arriving: dist.Work | None = None

    def cast(self, wish: Wish) -> None:
        """Send this rank's wish. The previous vote must have been counted."""
        self._votes = torch.tensor(wish)
        if self._group is not None:
            self._arriving = dist.all_reduce(
                self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def count(self) -> Wish:
        """The highest wish of the previous step; GO_ON before the first."""
        if self._arriving is not None:
            self._arriving.wait()
        return Wish(int(self._votes))


class Interruptions:
    """Decides between two steps whether the run goes on, saves or stops."""

    def __init__(self, console: Console, train: TrainConfig) -> None:
        context = ray.train.get_context()
        self._console, self._is_chief = console, context.get_world_rank() == 0
        self._votes = Votes()
        seconds = train.checkpoint_seconds
        self._interval = math.inf if seconds is None else seconds
        self._saved = self._looked = self._asked = time.monotonic()
        self._hurried_until = -math.inf
        grows = train.min_workers is not None and context.get_world_size() < train.num_workers
        self._nodes = cluster.num_nodes() if grows and self._is_chief else None
        self._answer: ray.ObjectRef | None = None
        self._stopping = False

    def after_step(self) -> Wish:
        """What must happen now; every rank calls this once after each step."""
        wish = self._votes.count()
        if wish is Wish.LOOK:
            self._look()
        elif wish is Wish.SAVE:
            self.saved()
        # cast only now, so that what was just decided is not wished for again
        self._votes.cast(self._wish())
        return wish

    def saved(self) -> None:
        """Restart the interval between checkpoints."""
        self._saved = time.monotonic()

    def close(self) -> None:
        """Wait for the last vote."""
        self._votes.count()

    def _wish(self) -> Wish:
        if not self._is_chief:
            return Wish.GO_ON
        now = time.monotonic()
        if self._told_to_stop(now):
            return Wish.STOP
        hurried = now < self._hurried_until
        if now - self._saved >= (min(self._interval, HURRY_SECONDS) if hurried else self._interval):
            return Wish.SAVE
        return Wish.LOOK if now - self._looked >= LOOK_SECONDS else Wish.GO_ON

    def _look(self) -> None:
        self._looked = time.monotonic()
        hurried = self._looked < self._hurried_until
        if ray.train.get_preemption_info() is not None:  # what rank 0 knows
            self._hurried_until = math.inf
        elif self._nodes is not None:
            before, self._nodes = self._nodes, cluster.num_nodes()
            if self._nodes > before:
                self._hurried_until = self._looked + RESIZE_PATIENCE
        if not hurried and self._looked < self._hurried_until:
            self._saved = -math.inf  # save at once, the first time

    def _told_to_stop(self, now: float) -> bool:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stopping = self._stopping or ray.get(self._answer)
            self._answer = None
        elif self._answer is None and now - self._asked >= ASK_SECONDS:
            self._answer, self._asked = self._console.is_told_to_stop(), now
        return self._stopping
