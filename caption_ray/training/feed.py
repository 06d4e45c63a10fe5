"""The pictures of one training worker: its share of each epoch, the ledger of those it has seen,
and the unreadable ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from caption_ray import cluster
from caption_ray.config import Config
from caption_ray.data.dataset import DataSet
from caption_ray.data.ledger import Ledger
from caption_ray.data.pipeline import Batch, TooManyBadImages, batches
from caption_ray.data.plan import plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.training import loop


class Feed:
    """The pictures of one rank.

    Which ones it reads is a pure function of (seed, epoch, rank, ledger), so an interrupted epoch
    continues with what is left of it, even with another number of workers.
    """

    def __init__(
        self,
        config: Config,
        dataset: DataSet,
        vocabulary: Vocabulary,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        decode_cpus: float,
        decode_threads: int = 0,
    ) -> None:
        """decode_cpus, decode_threads: as for `batches`."""
        self.config, self.dataset, self.vocabulary = config, dataset, vocabulary
        self.rank, self.world_size = rank, world_size
        self.device = device
        self.decode_cpus, self.decode_threads = decode_cpus, decode_threads
        self.ledger = Ledger(dataset.rows("train"))
        """Which pictures this epoch has seen, as far as this rank knows."""
        self.errors: list[str] = []
        """The epoch's unreadable pictures of this rank, with reasons."""
        self._waited = 0.0

    def num_pictures(self, consumed: Ledger | None = None) -> int:
        """Pictures of an epoch, or of what is left of it, over all ranks."""
        ledger = Ledger(self.ledger.sizes) if consumed is None else consumed
        return int(ledger.left(self.config.data.max_images).sum())

    def num_steps(self, consumed: Ledger | None = None) -> int:
        """Steps of an epoch: as many as the largest share needs, so that all ranks take the same
        number without communicating."""
        share = math.ceil(self.num_pictures(consumed) / self.world_size)
        return math.ceil(share / self.config.train.batch_size)

    def training(self, epoch: int) -> Iterator[loop.DeviceBatch]:
        """The rest of an epoch, shuffled and augmented, in the same number of steps on every
        rank."""
        stream = self._batches("train", epoch)
        for _ in range(self.num_steps(self.ledger)):
            asked = time.perf_counter()
            batch = next(stream, None)
            if batch is not None:
                self._note_errors(batch.errors, epoch)
            on_device = self.to_device(batch)
            self._waited += time.perf_counter() - asked
            yield on_device
        assert next(stream, None) is None

    def validation(self) -> Iterator[Batch]:
        """This rank's share of the validation split, as stored."""
        return self._batches("val", None)

    def samples(self, count: int) -> tuple[NDArray[np.uint8], list[str]]:
        """At most `count` pictures of the validation split, the first ones, for people to look at:
        uint8 (count, S, S, 3), and one human caption of each."""
        pictures = self.dataset.splits["val"][0].pictures
        prepare = self._preparation(None)
        rows = [prepare(row, number) for number, row in enumerate(pictures.read()[:count])]
        references = [self.vocabulary.decode(row["tokens"][0].tolist()) for row in rows]
        return np.stack([row["inputs"] for row in rows]), references

    def to_device(self, batch: Batch | None) -> loop.DeviceBatch:
        """The batch on the device; None gives a stand-in without weight."""
        size = self.config.model.encoder.image_size
        if batch is None:
            return loop.to_device(None, None, size, self.device)
        moved = loop.to_device(batch.inputs, batch.tokens, size, self.device)
        return replace(moved, numbers=batch.numbers, captions=batch.captions)

    def seen(self, numbers: NDArray[np.int64]) -> None:
        """Record in the ledger that these pictures were trained on."""
        self.ledger.mark(numbers)

    def take_wait(self) -> float:
        """Seconds spent waiting for pictures since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def end_epoch(self) -> None:
        """Reset the ledger: the next epoch has seen nothing yet."""
        self.ledger.clear()
        self.errors = []

    def shared_ledger(self) -> Ledger:
        """The pictures that any rank has seen (a collective: every rank must call it)."""
        return self.ledger.united(self._largest)

    def _largest(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The element-wise maximum over all ranks (a collective: every rank must call it, with an
        array of the same length)."""
        reduced = torch.tensor(values, device=self.device)
        if dist.is_initialized() and len(values):  # else no rank has anything to send
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        largest: NDArray[np.uint8] = reduced.cpu().numpy()
        return largest

    def _batches(self, split: str, epoch: int | None) -> Iterator[Batch]:
        """For training (epoch given): shuffled, augmented, without what the ledger holds. For
        validation: as stored."""
        train, data = self.config.train, self.config.data
        shuffle = None if epoch is None else (train.seed, epoch)
        slices = plan_epoch(
            self.dataset.rows(split),
            rank=self.rank,
            world_size=self.world_size,
            shuffle=shuffle,
            limit=train.validation_images if epoch is None else data.max_images,
            consumed=None if epoch is None else self.ledger,
        )
        return batches(
            self.dataset.splits[split],
            slices,
            self._preparation(shuffle),
            batch_size=train.batch_size,
            cpus=self.decode_cpus,
            decode_threads=self.decode_threads,
            decode_on=self.device if data.decode == "device" and epoch is not None else None,
            keep_order=train.deterministic or epoch is None,
        )

    def _preparation(self, augment: tuple[int, int] | None) -> Preparation:
        return Preparation(
            self.config.model.encoder,
            self.config.data,
            self.vocabulary,
            augment,
            with_captions=self.config.train.stage == "self-critical",
        )

    def _note_errors(self, errors: list[str], epoch: int) -> None:
        if not errors:
            return
        self.errors += errors
        share = self.num_pictures() / self.world_size
        if len(self.errors) > self.config.data.max_bad_images * share:
            listed = "\n  ".join(self.errors[:20])
            raise TooManyBadImages(
                f"{len(self.errors)} of about {share:.0f} pictures of epoch {epoch + 1} are "
                f"unreadable, more than --data.max-bad-images {self.config.data.max_bad_images}:"
                f"\n  {listed}"
            )


def cpus_for_decoding(config: Config, workers: int) -> float:
    """CPUs that each of so many workers has for decoding; ValueError if there are none."""
    if config.data.decode_workers is not None:
        return config.data.decode_workers
    free = cluster.num_cpus() - workers * config.train.cpus_per_worker
    if free < 1:
        raise ValueError(
            f"--train.num-workers {workers} x --train.cpus-per-worker "
            f"{config.train.cpus_per_worker} leave {free:g} of the cluster's CPUs for "
            "decoding, which needs 1: lower --train.cpus-per-worker (0.5, say)"
        )
    return max(1, free / workers)
