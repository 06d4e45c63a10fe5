"""Scores of the self-critical stage, computed off the training thread: document frequencies by Ray
tasks, scores by an actor.

The actor is a process of its own, so that CIDEr-D, which is pure Python, never delays the process
that drives the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ray
from numpy.typing import NDArray

from caption_ray import cluster
from caption_ray.captioning.metrics import CiderD
from caption_ray.data.dataset import DataSet, Unit
from caption_ray.data.tokenizer import Tokenizer
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.training.self_critical import Captions, Rewards, as_scored


def document_frequencies(dataset: DataSet, tokenizer: Tokenizer) -> CiderD:
    """CIDEr-D with the document frequencies of the training split. One task per shard counts them,
    and reads nothing but captions."""
    units = dataset.splits["train"]
    total = CiderD()
    waiting = [_count.remote(unit, tokenizer) for unit in units]
    with cluster.progress_bar(len(units), "count n-grams", shown=True, unit="shard") as bar:
        while waiting:
            (done,), waiting = ray.wait(waiting)
            total.add(ray.get(done))
            bar.update(1)
    total.forget_rare()
    return total


@ray.remote(num_cpus=1, max_retries=3)
def _count(unit: Unit, tokenizer: Tokenizer) -> CiderD:
    return CiderD(
        [[as_scored(c, tokenizer) for c in captions] for captions in unit.captions() if captions]
    )


class RemoteRewards:
    """A `self_critical.Score` that an actor on this node computes."""

    def __init__(self, cider: ray.ObjectRef, vocabulary: Vocabulary) -> None:
        # it reserves no CPU: the node's CPUs belong to training and decoding, and it works while
        # training waits for the device
        actor = ray.remote(max_restarts=3, max_task_retries=3, **cluster.on_this_node())(Rewards)
        self._actor = actor.remote(cider, vocabulary)

    def __call__(
        self, tokens: NDArray[np.int64], captions: Captions
    ) -> Callable[[], NDArray[np.float32]]:
        scores = self._actor.__call__.remote(tokens, captions)

        def wait() -> NDArray[np.float32]:
            # arrays from Ray's object store are read-only
            return np.array(ray.get(scores))

        return wait
