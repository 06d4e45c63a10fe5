"""Validation while training goes on: Ray Train runs `validate` on each epoch's checkpoint.

It captions the validation split, compares with what people wrote, and lets best.json name the
checkpoint if none had a better CIDEr-D (see `run_folder.rank`). What it found lies in the run's
folder, `validation/`, from where the workers take it for history, tracker and early stopping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch

from caption_ray import storage
from caption_ray.captioning import metrics, run_folder
from caption_ray.captioning.ownership import Claim, LostError
from caption_ray.captioning.predictor import Predictor
from caption_ray.data.dataset import DataSet
from caption_ray.data.plan import plan_epoch

BATCH_SIZE = 64
DECODE_THREADS = 4
METRICS = ("BLEU-4", "ROUGE-L", "CIDEr-D")
"""What is computed in training; jobs/evaluate.py has all of them."""
DECIDES = {
    run_folder.CRITERION: f"{run_folder.CRITERION} decides which checkpoint is the best",
    run_folder.LOSS: f"{run_folder.CRITERION} is the same in all validations so far: as long as it "
    f"is, {run_folder.LOSS} decides which checkpoint is the best",
}
"""What the console is told when it becomes so; at first, the first does."""


def validate(
    saved: Any, claim: Claim, dataset: ray.ObjectRef, limit: int | None, threads: int
) -> dict[str, float]:
    """Caption the first `limit` validation pictures with a checkpoint of the run, greedily.

    saved: as Ray Train knows it; only its name counts. Returns the metrics, named
    `val/...`, and writes them into the run's folder. An error is written there, too, before it is
    raised: Ray Train only logs it. Nothing is written once the claim on the run is lost.
    """
    uri = storage.join(claim.run, storage.name(str(saved.path)))
    torch.set_num_threads(threads)
    start = time.monotonic()
    try:
        found = score(uri, ray.get(dataset), limit)
        found["val/seconds"] = time.monotonic() - start
        claim.require()
        run_folder.crown(uri, found)
    except LostError:
        raise
    except Exception as error:
        run_folder.write_validation(uri, {"error": f"{type(error).__name__}: {error}"})
        run_folder.release(uri)
        raise
    run_folder.release(uri)
    return found


def score(uri: str, dataset: DataSet, limit: int | None) -> dict[str, float]:
    """METRICS of the checkpoint's captions of the first `limit` validation pictures.

    Raises ValueError if none of them can be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor.from_uri(uri, device)
    # beam search takes several times as long, and ranks checkpoints the same way
    search = replace(predictor.search, beam_size=1, temperature=0.0)
    hypotheses: list[str] = []
    references: list[list[str]] = []
    with ThreadPoolExecutor(DECODE_THREADS) as threads:
        for rows in _batches(dataset, limit):
            pictures = [row["image"] for row in rows]
            for row, one in zip(
                rows, predictor.caption_pictures(pictures, threads, search), strict=True
            ):
                if one.caption is not None:
                    hypotheses.append(one.caption.text)
                    references.append(row["captions"])
    if not hypotheses:
        raise ValueError(f"{dataset.uri}: no picture of its validation split can be read")
    tokenizer = predictor.vocabulary.tokenizer
    corpus = metrics.score(hypotheses, references, tokenizer=tokenizer).corpus
    return {f"val/{name}": corpus[name] for name in METRICS}


def _batches(dataset: DataSet, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    """Rows with captions, as stored."""
    units = dataset.splits["val"]
    for shard in plan_epoch(dataset.rows("val"), rank=0, world_size=1, shuffle=None, limit=limit):
        rows = [row for row in units[shard.shard].read()[: len(shard.rows)] if row["captions"]]
        for start in range(0, len(rows), BATCH_SIZE):
            yield rows[start : start + BATCH_SIZE]


def stale(history: list[dict[str, float]]) -> int:
    """Validations since the best, by the rank that decides about checkpoints, too."""
    losses = {p["step"]: p[run_folder.LOSS] for p in history if run_folder.LOSS in p}
    ranks = [
        run_folder.rank({run_folder.LOSS: losses.get(p.get("val/step", 0.0), math.inf), **p})
        for p in _validations(history)
    ]
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0


def criterion(history: list[dict[str, float]]) -> str:
    """The metric that decides so far, a key of DECIDES."""
    scores = [point[run_folder.CRITERION] for point in _validations(history)]
    tells = len(scores) < 2 or len(set(scores)) > 1
    return run_folder.CRITERION if tells else run_folder.LOSS


def _validations(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [point for point in history if run_folder.CRITERION in point]
