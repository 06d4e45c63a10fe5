"""An epoch of the original system from precomputed features, compared to running the encoder at
each step."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import string
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from caption_ray import config, storage
from caption_ray.benchmark import measuring, runs
from caption_ray.benchmark.model import COCO_SPREAD, COCO_WORDS
from caption_ray.config import Count
from caption_ray.data import feature_shards
from caption_ray.data.dataset import FeatureFile, ShardFile
from caption_ray.data.pipeline import Batch, batches
from caption_ray.data.plan import plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.shards import Shard
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.training import loop

EPOCH = 30_000
"""Captions of an epoch of the original system, one per picture; it took 62 s on one GPU."""

REGIONS, REGION_DIM = 64, 2048
ROWS_PER_SHARD = 500


@dataclass
class Cache:
    """Training of the `seed` preset from streamed features, or with its encoder at each step."""

    pictures: Count = 3000
    """Pictures with features on disk, 262 kB each; an epoch's time is extrapolated from them."""
    rounds: Count = 5
    """Rounds of measurement."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """As --train.precision of jobs/train.py."""
    quick: bool = False
    """Two rounds of 500 pictures."""


def run(options: Cache) -> None:
    rounds, pictures = (2, 500) if options.quick else (options.rounds, options.pictures)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = loop.autocast_dtype(options.precision, device)
    cores = len(os.sched_getaffinity(0))
    preset = config.seed()
    # of letters only, as tokenizing a word with a digit takes twenty times as long
    letters = itertools.product(string.ascii_lowercase, repeat=3)
    vocabulary = Vocabulary(["".join(three) for three in itertools.islice(letters, 4996)])
    with tempfile.TemporaryDirectory() as folder:
        units = _write(Path(folder), pictures, vocabulary)
        prepare = Preparation(preset.model.encoder, preset.data, vocabulary, (0, 0))
        with runs.on_ray(cores):
            _measure(preset, units, prepare, rounds, cores, device, dtype)


def _write(folder: Path, pictures: int, vocabulary: Vocabulary) -> list[FeatureFile]:
    """Feature shards of this many made-up pictures, each with a caption as long as COCO's."""
    rng, units = np.random.default_rng(0), []
    for start in range(0, pictures, ROWS_PER_SHARD):
        rows = min(ROWS_PER_SHARD, pictures - start)
        regions = rng.random((rows, REGIONS, REGION_DIM), np.float32).astype(np.float16)
        words = np.clip(rng.normal(COCO_WORDS, COCO_SPREAD, rows), 6, 30).astype(int)
        captions = [[" ".join(rng.choice(vocabulary.words[4:], n)) + "."] for n in words]
        data = feature_shards.to_bytes(
            regions, np.arange(start, start + rows), captions, [""] * rows
        )
        file = folder / f"{start}.arrow"
        file.write_bytes(data)
        shard = Shard(file.name, rows, len(data), storage.checksum(data))
        units.append(FeatureFile(str(file), shard, ShardFile("", shard)))
    return units


def _measure(
    preset: config.Config,
    units: list[FeatureFile],
    prepare: Preparation,
    rounds: int,
    cores: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    size = preset.model.encoder.image_size
    encoder = dataclasses.replace(preset.model.encoder, weights="none")
    model = dataclasses.replace(preset.model, encoder=encoder)
    torch.manual_seed(0)
    captioner = build_captioner(model, len(prepare.vocabulary), None, pretrained=False).to(device)
    optimizer = torch.optim.AdamW(captioner.decoder.parameters(), lr=1e-3, fused=True)

    def stream() -> Iterator[Batch]:
        slices = plan_epoch([u.rows for u in units], rank=0, world_size=1, shuffle=(0, 0))
        yield from batches(
            units, slices, prepare, batch_size=preset.train.batch_size, cpus=cores, keep_order=False
        )

    def step(example: loop.DeviceBatch) -> None:
        loop.train_step(captioner, example, optimizer, preset.train, dtype)

    waited: list[float] = []

    def train() -> float:
        captions, waiting, begun = 0, 0.0, time.perf_counter()
        asked = begun
        for batch in stream():
            example = loop.to_device(batch.inputs, batch.tokens, size, device)
            waiting += time.perf_counter() - asked
            step(example)
            captions += len(batch.numbers)
            asked = time.perf_counter()
        measuring.synchronize()
        waited.append(waiting / (time.perf_counter() - begun))
        return float(captions)

    first = next(stream())
    resident = loop.to_device(first.inputs, first.tokens, size, device)
    pixels = np.random.default_rng(0).integers(
        0, 256, (len(first.numbers), size, size, 3), np.uint8
    )
    encoded = loop.to_device(pixels, first.tokens, size, device)

    def repeat(example: loop.DeviceBatch, count: int) -> float:
        for _ in range(count):
            step(example)
        return float(count * len(first.numbers))

    rates = measuring.in_turn(
        {
            "encoder at each step": lambda: repeat(encoded, 1),
            "steps on features in memory": lambda: repeat(resident, 10),
            "features streamed": lambda: float(sum(len(b.numbers) for b in stream())),
            "training from features": train,
        },
        rounds,
    )
    precision = "bfloat16" if dtype else "float32"
    title = f"cache: seed, {preset.train.batch_size} captions a step, {precision}, {cores} cores"
    found = measuring.report("cache", title, "captions", rates, "encoder at each step")
    seconds = {name: EPOCH / statistics.median(rate) for name, rate in rates.items()}
    print(f"an epoch of {EPOCH} captions: {seconds['training from features']:.0f} s from features, "
          f"{seconds['encoder at each step']:.0f} s with the encoder at each step (JPEGs not "
          "counted)")  # fmt: skip
    print(f"waiting for features: {100 * statistics.median(waited[1:]):.1f} % of the time")
    measuring.record(
        {
            **found,
            "epoch_s": {name: round(value, 1) for name, value in seconds.items()},
            "wait_share": round(statistics.median(waited[1:]), 4),
        }
    )
    _check(captioner, resident)


def _check(captioner: Captioner, example: loop.DeviceBatch) -> None:
    """Asserts that the features have the shape of the grid that the decoder expects."""
    assert example.inputs.shape[1:] == (REGIONS, REGION_DIM)
    assert captioner.grid[0] * captioner.grid[1] == REGIONS
