"""Training as usually written without Ray: torch's DataLoader, a loop, DDP for more processes."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from caption_ray.benchmark import measuring
from caption_ray.config import Config
from caption_ray.data.dataset import ShardFile, open_shards
from caption_ray.data.plan import ShardSlice, plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.read_tasks import COLUMNS
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.training import loop
from caption_ray.training.initial import initial_captioner


@dataclass(frozen=True)
class Epoch:
    """The shards of an epoch, the order of their rows, and how rows become arrays."""

    units: Sequence[ShardFile]
    slices: list[ShardSlice]
    prepare: Preparation

    def read(self, shard_slice: ShardSlice) -> list[dict[str, Any]]:
        rows = self.units[shard_slice.shard].read(COLUMNS)
        return [rows[i] for i in shard_slice.rows]


Arrays = tuple[Tensor, Tensor]
"""A batch: images uint8 (B, S, S, 3) and tokens int32 (B, K, L)."""


def collate(rows: Sequence[dict[str, Any]]) -> Arrays:
    """Stack prepared rows into a batch."""
    images, tokens = (np.stack([row[name] for row in rows]) for name in ("inputs", "tokens"))
    return torch.from_numpy(images), torch.from_numpy(tokens)


class Shards(IterableDataset[Arrays]):
    """An epoch for torch's DataLoader: of N workers, each reads every N-th shard and decodes whole
    batches."""

    def __init__(self, epoch: Epoch, batch_size: int) -> None:
        super().__init__()
        self.epoch, self.batch_size = epoch, batch_size

    def __iter__(self) -> Iterator[Arrays]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        torch.set_num_threads(1)
        rows: list[dict[str, Any]] = []
        for shard_slice in self.epoch.slices[worker.id :: worker.num_workers]:
            for row, source in zip(shard_slice.rows, self.epoch.read(shard_slice), strict=True):
                rows.append(self.epoch.prepare(source, shard_slice.first + int(row)))
                if len(rows) == self.batch_size:
                    yield collate(rows)
                    rows = []
        if rows:
            yield collate(rows)

    def loader(self, workers: int) -> DataLoader[Arrays]:
        """A DataLoader with this many worker processes, which live as long as it does."""
        return DataLoader(
            self, batch_size=None, num_workers=workers, persistent_workers=True,
            multiprocessing_context="spawn",
        )  # fmt: skip


# Training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """This process's place among several on this machine."""

    rank: int = 0
    world_size: int = 1
    rendezvous: str | None = None
    """File through which they join for DDP training of one captioner; None: each trains its own."""


SHARED_BACKWARD = "backward and all-reduce"


@dataclass
class Laps:
    """Where the time went: seconds by part of a step."""

    of: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    all_reduced: bool = False
    """Whether the next backward pass all-reduces its gradients."""
    _last: float = 0.0

    def start(self) -> None:
        self.of.clear()
        self._last = time.perf_counter()

    def end(self, part: str, *_: object) -> None:
        """Count the time since the last call as `part`."""
        measuring.synchronize()
        now = time.perf_counter()
        self.of[part] += now - self._last
        self._last = now

    def end_backward(self, *_: object) -> None:
        """Count the time since the last call as a backward pass."""
        self.end(SHARED_BACKWARD if self.all_reduced else "backward")

    def per_picture(self, images: int, all_reduced: int) -> dict[str, float]:
        """Milliseconds per picture by part. `all_reduced` of the `images` were in steps with
        all-reduce, whose time is what it adds to a backward pass: most of it overlaps with that."""
        found = {part: 1000 * seconds / images for part, seconds in self.of.items()}
        if shared := self.of.get(SHARED_BACKWARD):
            del found[SHARED_BACKWARD]
            found["backward"] = 1000 * self.of["backward"] / (images - all_reduced)
            found["all-reduce"] = 1000 * shared / all_reduced - found["backward"]
        return found


def train(
    config: Config, shards: str, place: Place, threads: int, warm_up: int, profiled: bool = False
) -> tuple[float, dict[str, float]]:
    """Train for one epoch; returns pictures per second after the first `warm_up` steps and, if
    `profiled`, milliseconds per picture by part. With several processes, every other step of a
    profile skips the all-reduce, to find out its cost."""
    device = _device(place)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    with _group(place, device):
        return _epoch(config, shards, place, device, warm_up, profiled)


def _epoch(
    config: Config, shards: str, place: Place, device: torch.device, warm_up: int, profiled: bool
) -> tuple[float, dict[str, float]]:
    train, size = config.train, config.model.encoder.image_size
    dataset = open_shards(shards)
    units = [unit for unit in dataset.splits["train"] if isinstance(unit, ShardFile)]
    vocabulary = Vocabulary.from_counts(
        dataset.word_counts, config.data.min_word_count, config.data.max_words
    )
    slices = plan_epoch(
        [unit.rows for unit in units], rank=place.rank, world_size=place.world_size,
        shuffle=(train.seed, 0), limit=config.data.max_images,
    )  # fmt: skip
    prepare = Preparation(config.model.encoder, config.data, vocabulary, (train.seed, 0))
    epoch = Epoch(units, slices, prepare)
    loop.set_determinism(train.seed, strict=False)
    captioner = initial_captioner(config, len(vocabulary)).to(device)
    model: nn.Module = captioner
    if dist.is_initialized():
        model = DistributedDataParallel(captioner)
    optimizer = torch.optim.AdamW(
        captioner.parameter_groups(
            train.learning_rate, train.encoder_learning_rate, train.weight_decay
        ),
        fused=True,
    )
    laps, autocast = Laps(), loop.autocast_dtype(train.precision, device)
    lap: Callable[..., None] = laps.end if profiled else _nothing
    captioner.register_forward_pre_hook(functools.partial(_lap, lap, "other"))
    captioner.register_forward_hook(functools.partial(_lap, lap, "forward"))
    optimizer.register_step_pre_hook(laps.end_backward if profiled else _nothing)
    optimizer.register_step_post_hook(functools.partial(_lap, lap, "optimizer"))
    images, all_reduced, start = 0, 0, 0.0
    total = math.ceil(sum(len(shard_slice.rows) for shard_slice in slices) / train.batch_size)
    batches = iter(Shards(epoch, train.batch_size).loader(1))
    for step in range(total):  # not to the loader's end, where it would wait for its processes
        batch = next(batches)
        if step == warm_up:
            measuring.synchronize()
            images, all_reduced, start = 0, 0, time.perf_counter()
            laps.start()
        lap("wait")
        factor = loop.learning_rate_factor(step, train, total)
        loop.set_learning_rate(optimizer, factor)
        example = loop.to_device(batch[0].numpy(), batch[1].numpy(), size, device)
        lap("transfer")
        with contextlib.ExitStack() as stack:
            if isinstance(model, DistributedDataParallel):
                laps.all_reduced = not profiled or step % 2 == 0
                if not laps.all_reduced:
                    stack.enter_context(model.no_sync())
            loop.train_step(model, example, optimizer, train, autocast)
        images += len(batch[0])
        all_reduced += len(batch[0]) * laps.all_reduced
        lap("other")
    measuring.synchronize()
    rate = images / (time.perf_counter() - start)
    parts = {**beside_training(epoch), **laps.per_picture(images, all_reduced)} if profiled else {}
    return rate, parts


def beside_training(epoch: Epoch) -> dict[str, float]:
    """Milliseconds per picture of what a DataLoader's process does meanwhile, on one thread: the
    medians over the epoch's first three slices, one per shard."""
    found: dict[str, list[float]] = {"read": [], "decode": [], "batch": []}
    for shard_slice in epoch.slices[:3]:
        marks = [time.perf_counter()]
        rows = epoch.read(shard_slice)
        marks.append(time.perf_counter())
        prepared = [epoch.prepare(row, number) for number, row in enumerate(rows)]
        marks.append(time.perf_counter())
        collate(prepared)
        marks.append(time.perf_counter())
        for name, start, end in zip(found, marks, marks[1:], strict=False):
            found[name].append(1000 * (end - start) / len(rows))
    return {name: statistics.median(values) for name, values in found.items()}


def _lap(lap: Callable[..., None], part: str, *_: object) -> None:
    lap(part)


def _nothing(*_: object) -> None:
    pass


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.rank)


@contextlib.contextmanager
def _group(place: Place, device: torch.device) -> Iterator[None]:
    if place.rendezvous is None:
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{place.rendezvous}",
        rank=place.rank, world_size=place.world_size,
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()
