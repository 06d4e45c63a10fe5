"""The input pipeline over a whole epoch, compared to a bare decode loop and torch's DataLoader."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from caption_ray import config, storage
from caption_ray.benchmark import measuring, pictures, runs
from caption_ray.benchmark.plain import Epoch, Shards, collate
from caption_ray.config import Count, Parallel, Uri
from caption_ray.data import shards
from caption_ray.data.dataset import DataSet, ShardFile, open_shards
from caption_ray.data.ingest import IMAGES_PER_SHARD, ingest
from caption_ray.data.pipeline import batches
from caption_ray.data.plan import plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.encoder import to_tensor

BATCH_SIZE = 64
SIZE = 224


@dataclass
class Pipeline:
    """An epoch of uint8 batches from Ray Data, torch's DataLoader and a bare loop, same cores."""

    source: Uri | None = None
    """Pictures in COCO's layout (see jobs/ingest.py); None: made-up ones of 640 x 480."""
    images: Count = 12000
    """Pictures per epoch; those of the source are repeated as needed."""
    num_cpus: Parallel | None = None
    """Cores to decode with; None: all of this machine."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds of 500 pictures."""


def run(options: Pipeline) -> None:
    rounds, images = (2, 500) if options.quick else (options.rounds, options.images)
    cores = options.num_cpus or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        source = options.source
        if source is None:
            source = str(Path(folder, "source"))
            Path(source).mkdir()
            pictures.write_coco(Path(source), 200)
        with runs.processes(cores) as processes, runs.on_ray(cores):
            for title, image_size in (("originals", None), ("shrunk to 256", 256)):
                uri = str(Path(folder, title))
                ingest(
                    source, uri, image_size=image_size, images_per_shard=IMAGES_PER_SHARD,
                    seed=0, splits=("train",), progress=False,
                )  # fmt: skip
                epoch = _epoch(open_shards(uri), images, Path(folder, f"{title}, long"))
                _measure(title, epoch, cores, rounds, processes)


def _epoch(dataset: DataSet, images: int, folder: Path) -> Epoch:
    """The training split, repeated up to `images` pictures, in shards of the usual size."""
    rows = [row for unit in dataset.splits["train"] for row in unit.read()]
    rows = (rows * math.ceil(images / len(rows)))[:images]
    folder.mkdir()
    units = []
    for start in range(0, images, IMAGES_PER_SHARD):
        part = rows[start : start + IMAGES_PER_SHARD]
        data, file = shards.to_bytes(part), folder / f"{start}.parquet"
        file.write_bytes(data)
        shard = shards.Shard(file.name, len(part), len(data), storage.checksum(data))
        units.append(ShardFile(str(file), shard))
    # no augmentation, as the other ways have none
    data_config = dataclasses.replace(config.coco().data, min_crop=1.0, flip=False)
    encoder = dataclasses.replace(config.EncoderConfig(), image_size=SIZE, image_fit="crop")
    vocabulary = Vocabulary.from_counts(dataset.word_counts, 1, None)
    return Epoch(
        units,
        plan_epoch([unit.rows for unit in units], rank=0, world_size=1, shuffle=(0, 0)),
        Preparation(encoder, data_config, vocabulary, (0, 0)),
    )


def _measure(
    title: str, epoch: Epoch, cores: int, rounds: int, processes: list[ProcessPoolExecutor]
) -> None:
    loader = Shards(epoch, BATCH_SIZE).loader(cores)
    first: dict[str, list[float]] = {"far": [], "near": []}
    if torch.cuda.is_available():
        first["device"] = []

    def through_ray(where: str) -> Callable[[], float]:
        def whole_epoch() -> float:
            start, count = time.perf_counter(), 0
            for images, _tokens in _ours(epoch, cores, where):
                if not count:
                    first[where].append(time.perf_counter() - start)
                count += len(images)
            return float(count)

        return whole_epoch

    fresh = {where: _in_fresh_ray(epoch, cores, where) for where in first}
    bare = BareLoop(epoch, processes)
    rates = measuring.in_turn(
        {
            "bare decode loop": bare,
            "torch DataLoader": lambda: float(sum(len(images) for images, _ in loader)),
            **{f"caption_ray, {where}": through_ray(where) for where in first},
        },
        rounds,
    )
    images = sum(len(shard_slice.rows) for shard_slice in epoch.slices)
    found = measuring.report(
        "pipeline", f"pipeline: {title}, {images} pictures to {SIZE} x {SIZE}, {cores} cores",
        "images", rates, "bare decode loop",
    )  # fmt: skip
    for where, seconds in first.items():
        name = f"caption_ray, {where}"
        over = measuring.ratios(rates[name], rates["torch DataLoader"])
        print(
            f"{name}: {measuring.spread(over, '.2f')} of torch DataLoader; first batch after "
            f"{measuring.spread(seconds[1:], '.2f')} s"
        )
        found["ways"][name] |= {
            "of_dataloader": round(float(np.median(over)), 3),
            "first_batch_s": round(float(np.median(seconds[1:])), 2),
        }
        if (shown := fresh[where]) is not None:
            found["ways"][name] |= _report_fresh(*shown)
    measuring.record(found)


def _report_fresh(first: float, memory: dict[str, float]) -> dict[str, Any]:
    """Print the results of `_in_fresh_ray`; returns them for `record`."""
    parts = ", ".join(f"{mib:.0f} {kind}" for kind, mib in memory.items())
    total = sum(memory.values())
    print(f"  in a fresh Ray: first batch after {first:.2f} s; at most {total:.0f} MiB: {parts}")
    whole = {kind: round(mib) for kind, mib in memory.items()}
    return {"fresh_first_batch_s": round(first, 2), "memory_mib": round(total), "of_it": whole}


def _ours(epoch: Epoch, cores: int, where: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, decoded "far" (in read tasks), "near" (in this process) or on the "device"."""
    stream = batches(
        epoch.units, epoch.slices, epoch.prepare, batch_size=BATCH_SIZE, cpus=cores,
        keep_order=False, decode_threads=0 if where == "far" else cores,
        decode_on=torch.device("cuda") if where == "device" else None,
    )  # fmt: skip
    for batch in stream:
        yield to_tensor(batch.inputs), torch.tensor(batch.tokens)


# In a fresh Ray ---------------------------------------------------------------------------------


def _in_fresh_ray(epoch: Epoch, cores: int, where: str) -> tuple[float, dict[str, float]] | None:
    """Seconds until the first batch of an epoch, and the peak memory, in MiB by kind of process, in
    a process that starts its own Ray; None on a cluster, of which this machine sees only a part."""
    if "RAY_ADDRESS" in os.environ:
        return None
    with runs.processes(1) as (process,):
        return process.submit(_epoch_in_fresh_ray, epoch, cores, where).result()


def _epoch_in_fresh_ray(epoch: Epoch, cores: int, where: str) -> tuple[float, dict[str, float]]:
    with runs.on_ray(cores):
        done = threading.Event()
        with ThreadPoolExecutor(1) as watcher:
            peak = watcher.submit(_peak_memory, done)
            start = time.perf_counter()
            stream = _ours(epoch, cores, where)
            next(stream)
            first = time.perf_counter() - start
            for _ in stream:
                pass
            done.set()
            return first, peak.result()


def _peak_memory(done: threading.Event) -> dict[str, float]:
    """The sample of `_memory` with the largest total."""
    samples = [_memory()]
    while not done.wait(0.5):
        samples.append(_memory())
    return max(samples, key=lambda sample: sum(sample.values()))


def _memory() -> dict[str, float]:
    """MiB by kind of process; shared pages are divided among their processes (PSS)."""
    reader = psutil.Process()
    found = {"of the reader": 0.0, "of read tasks": 0.0, "of Ray itself": 0.0}
    for process in [reader, *reader.children(recursive=True)]:
        try:
            name = "".join(process.cmdline()[:1])
            kind = "of Ray itself"
            if process == reader:
                kind = "of the reader"
            elif name.startswith(("ray::IDLE", "ray::ReadPieces")):
                kind = "of read tasks"
            found[kind] += process.memory_full_info().pss / 2**20
        except psutil.NoSuchProcess:
            continue
    return found


# Baselines --------------------------------------------------------------------------------------


class BareLoop:
    """Processes that decode pictures which they hold in memory, and discard the batches."""

    def __init__(self, epoch: Epoch, processes: list[ProcessPoolExecutor]) -> None:
        self.processes = processes
        rows = [row for shard_slice in epoch.slices for row in epoch.read(shard_slice)]
        for number, process in enumerate(processes):
            process.submit(_hold, rows[number :: len(processes)], epoch.prepare).result()

    def __call__(self) -> float:
        futures = [process.submit(_decode) for process in self.processes]
        return sum(future.result() for future in futures)


_HELD: list[tuple[list[dict[str, Any]], Preparation]] = []


def _hold(rows: list[dict[str, Any]], prepare: Preparation) -> None:
    torch.set_num_threads(1)
    _HELD[:] = [(rows, prepare)]


def _decode() -> float:
    ((rows, prepare),) = _HELD
    for start in range(0, len(rows), BATCH_SIZE):
        collate([prepare(row, start + n) for n, row in enumerate(rows[start : start + BATCH_SIZE])])
    return float(len(rows))
