"""Measuring whole training runs, on the code that jobs/train.py runs."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import ray

from caption_ray import cluster, command, storage
from caption_ray import config as presets
from caption_ray.config import Config
from caption_ray.data.ingest import ensure_shapes
from caption_ray.training import trainer

WARM_UP = 9
"""Warm-up steps at the start of a run, which do not count."""


@contextlib.contextmanager
def on_ray(num_cpus: int) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, else start a local one with `num_cpus`. Its
    workers get no niceness, unlike Ray's default, so that other ways gain no advantage."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    local = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": num_cpus}
    ray.init(log_to_driver=False, **local)
    cluster.configure_data()
    cluster.keep_data_actors_here()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def processes(count: int) -> Iterator[list[ProcessPoolExecutor]]:
    """Pools of one process each, `count` of them."""
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        yield [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]


@contextlib.contextmanager
def folder(uri: str | None) -> Iterator[str]:
    """A folder below `uri`, which is kept; if None, a temporary one on this machine."""
    if uri is not None:
        command.check_output("storage", uri, folder=True)
        yield storage.join(storage.resolve(uri), "benchmark")
        return
    with tempfile.TemporaryDirectory() as local:
        yield local


def prepared(folder: str, pictures: int) -> tuple[Config, str]:
    """Settings for one epoch of `shapes` without checkpoints and samples, and its shards' URI."""
    preset = presets.shapes()
    data = replace(preset.data, shapes_train=pictures, shapes_val=8)
    with contextlib.redirect_stdout(io.StringIO()):
        shards = ensure_shapes(folder, data)
    train = replace(
        preset.train, epochs=1, log_every=WARM_UP - 1, sample_captions=0, checkpoint_seconds=None
    )
    run = replace(preset.run, storage=storage.join(folder, "runs"), tracker="none")
    return replace(preset, data=replace(data, shards=shards), train=train, run=run), shards


def through_ray(config: Config, num_cpus: int) -> tuple[float, dict[str, float]]:
    """Train through Ray; returns what `steady` does. All CPUs but one are the workers', for
    training and decoding."""
    train = replace(config.train, cpus_per_worker=(num_cpus - 1) / config.train.num_workers)
    run = replace(config.run, name=uuid.uuid4().hex)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finished = trainer.train(replace(config, train=train, run=run))
    return steady(finished.history, config.train.batch_size * config.train.num_workers)


def steady(history: list[dict[str, float]], batch_size: int) -> tuple[float, dict[str, float]]:
    """Pictures per second after the first `WARM_UP` steps of a run, and the shares of that time
    spent waiting, by what for; batch_size: pictures per step of all workers together."""
    images = seconds = 0.0
    waited: dict[str, float] = {}
    last: float = WARM_UP
    for point in history:
        if "train/images_per_second" not in point or point["step"] <= WARM_UP:
            continue
        count = (point["step"] - last) * batch_size
        own = count / point["train/images_per_second"]
        last, images, seconds = point["step"], images + count, seconds + own
        for name, share in point.items():
            if name.endswith("_wait_share"):
                what = name.removeprefix("train/").removesuffix("_wait_share")
                waited[what] = waited.get(what, 0.0) + share * own
    return images / seconds, {what: own / seconds for what, own in waited.items()}
