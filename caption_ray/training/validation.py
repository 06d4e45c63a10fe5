"""Validation while training goes on: Ray Train runs `validate` on each epoch's checkpoint.

It captions the validation split, compares with what people wrote, and lets best.json name the
checkpoint if none had a better CIDEr-D. What it found lies in the run's folder, `validation/`, from
where the workers take it for history, tracker and early stopping.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from caption_ray import storage
from caption_ray.data.dataset import DataSet
from caption_ray.data.plan import plan_epoch
from caption_ray.data.transforms import ImageError
from caption_ray.evaluation import metrics
from caption_ray.serving.predictor import Predictor
from caption_ray.training import checkpoint

FOLDER = "validation"
BATCH_SIZE = 64
DECODE_THREADS = 4
METRICS = ("BLEU-4", "ROUGE-L", "CIDEr-D")
"""What is computed in training; jobs/evaluate.py has all of them."""


def validate(
    saved: Any, run: str, dataset: ray.ObjectRef, limit: int | None, threads: int
) -> dict[str, float]:
    """Caption the first `limit` validation pictures with a checkpoint of the run, greedily.

    saved: as Ray Train knows it; only its name counts. Returns the metrics, named
    `val/...`, and writes them into the run's folder. An error is written there, too, before it is
    raised: Ray Train only logs it.
    """
    uri = storage.join(run, storage.name(str(saved.path)))
    report = storage.join(storage.parent(uri), FOLDER, f"{storage.name(uri)}.json")
    torch.set_num_threads(threads)
    start = time.monotonic()
    try:
        found = score(uri, ray.get(dataset), limit)
        found["val/seconds"] = time.monotonic() - start
        checkpoint.crown(uri, found)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        storage.write_bytes(report, json.dumps({"error": message}).encode())
        raise
    finally:
        checkpoint.release(uri)
    storage.write_bytes(report, json.dumps(found).encode())
    return found


def score(uri: str, dataset: DataSet, limit: int | None) -> dict[str, float]:
    """METRICS of the checkpoint's captions of the first `limit` validation pictures.

    Raises ValueError if none of them can be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor.from_uri(uri, device)
    # the captions of a beam search take several times as long and rank checkpoints the same way
    search = replace(predictor.search, beam_size=1, temperature=0.0)
    told: list[str] = []
    references: list[list[str]] = []
    with ThreadPoolExecutor(DECODE_THREADS) as threads:
        for rows in _batches(dataset, limit):
            prepared = list(threads.map(lambda row: _prepare(predictor, row["image"]), rows))
            images = [image for image in prepared if image is not None]
            if images:
                found = predictor.predict(np.stack(images), search)
                told += [captions[0].text for captions in found]
                references += [
                    row["captions"]
                    for row, image in zip(rows, prepared, strict=True)
                    if image is not None
                ]
    if not told:
        raise ValueError(f"{dataset.uri}: no picture of its validation split can be read")
    corpus = metrics.score(told, references).corpus
    return {f"val/{name}": corpus[name] for name in METRICS}


def _batches(dataset: DataSet, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    """Rows with captions, as stored."""
    units = dataset.splits["val"]
    for piece in plan_epoch(dataset.rows("val"), rank=0, world_size=1, shuffle=None, limit=limit):
        rows = [row for row in units[piece.shard].read()[: len(piece.rows)] if row["captions"]]
        for start in range(0, len(rows), BATCH_SIZE):
            yield rows[start : start + BATCH_SIZE]


def _prepare(predictor: Predictor, data: bytes | None) -> NDArray[np.uint8] | None:
    """None for a picture that cannot be read."""
    try:
        return predictor.prepare(data) if data is not None else None
    except ImageError:
        return None


def collect(run: str, known: Collection[str]) -> dict[str, dict[str, Any]]:
    """Reports in the run's folder by checkpoint, without those `known`; an `error` instead of
    metrics where a validation failed."""
    found = {}
    for uri in storage.list_files(storage.join(run, FOLDER)):
        name = storage.name(uri).removesuffix(".json")
        if name not in known:
            found[name] = json.loads(storage.read_bytes(uri))
    return found


def stale(history: list[dict[str, float]]) -> int:
    """Validations since the one with the best CIDEr-D."""
    scores = [point[checkpoint.CRITERION] for point in history if checkpoint.CRITERION in point]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
