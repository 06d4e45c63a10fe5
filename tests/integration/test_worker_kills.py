"""Training workers that are killed in mid-epoch: the run ends as if nothing had happened."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from ledgers import mask_of
from tiny_runs import (
    latest_of,
    losses_of,
    tiny_config,
    training_workers,
    weights_of,
    without_dropout,
)

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.training import trainer

pytestmark = pytest.mark.usefixtures("local_ray")

KILLS = sorted(int(step) for step in np.random.default_rng(7).choice(22, 3, replace=False) + 1)
"""Steps of 24, three epochs, at which a worker is killed."""


def _kill_a_worker_at(steps, pointer):
    """Send SIGKILL to a training worker each time that the run's newest checkpoint has reached the
    next of `steps`; returns the ids of those killed, and the thread that does it."""

    def reached(step):
        return pointer.exists() and json.loads(pointer.read_text())["step"] >= step

    def watch():
        for step in steps:
            while not (reached(step) and (alive := set(training_workers()) - set(killed))):
                time.sleep(0.02)
            killed.append(min(alive))
            os.kill(killed[-1], signal.SIGKILL)

    killed: list[int] = []
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return killed, thread


def test_a_run_whose_worker_was_killed_thrice_ends_as_if_nothing_had_happened(
    undisturbed, shards, tmp_path
):
    # more often than max_failures in all, but each time the run had got further
    run = tiny_config(shards, tmp_path, "killed", checkpoint_every=1, max_failures=1)
    killed, watcher = _kill_a_worker_at(KILLS, tmp_path / "killed" / "latest.json")
    finished = trainer.train(run)
    watcher.join(timeout=10)
    assert len(killed) == 3
    expected, weights = weights_of(latest_of(undisturbed)), weights_of(latest_of(finished))
    for name, weight in expected.items():
        assert np.array_equal(weight, weights[name]), name
    steps = [point["step"] for point in finished.history if "val/loss" in point]
    assert steps == [8, 16, 24]


def test_two_workers_of_which_one_is_killed_thrice_learn_from_every_picture_once(
    two_workers, shards, tmp_path
):
    settings = {"num_workers": 2, "checkpoint_every": 1, "keep_checkpoints": 100}
    killed, watcher = _kill_a_worker_at((1, 5, 10), tmp_path / "killed" / "latest.json")
    finished = trainer.train(without_dropout(tiny_config(shards, tmp_path, "killed", **settings)))
    watcher.join(timeout=10)
    assert len(killed) == 3
    for folder in sorted((tmp_path / "killed").glob(f"{run_folder.PREFIX}*/")):
        state = json.loads((folder / checkpoint.STATE).read_text())
        seen = mask_of((folder / checkpoint.LEDGER).read_bytes()).sum()
        assert state["pictures"] == state["epoch"] * 40 + seen
    assert (state["epoch"], state["pictures"]) == (3, 120)
    # the order in which they are learnt from differs after a restart, hence the tolerance
    np.testing.assert_allclose(losses_of(two_workers), losses_of(finished), rtol=0.03)
