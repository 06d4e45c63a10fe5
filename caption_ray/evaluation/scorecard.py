"""How good a checkpoint is: a split captioned, scored, and written down for people and tools.

<out>/captions_<split>_<name>_results.json   as COCO's evaluation server takes it
<out>/metrics.json                           the figures
<out>/per_image.jsonl                        caption and scores of each image
<out>/report.html                            all of it to look at
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_ray import storage
from caption_ray.config import Config, SearchConfig, from_dict
from caption_ray.data.pipeline import DataSet
from caption_ray.data.tokenizer import tokenize
from caption_ray.evaluation import evaluate, metrics, report
from caption_ray.evaluation.pointing import Pointing, point
from caption_ray.training import checkpoint, tracking

METRICS_FILE, PER_IMAGE_FILE, REPORT_FILE = "metrics.json", "per_image.jsonl", "report.html"


@dataclass(frozen=True)
class Scorecard:
    """What was found."""

    figures: dict[str, float]
    """By name; metrics of `metrics.score` first."""
    skipped: dict[str, str]
    """Metrics that could not be computed, and why."""
    out: str
    """URI of the folder with the files."""

    def table(self) -> str:
        lines = [f"{name:28} {value:10.4f}" for name, value in self.figures.items()]
        return "\n".join([*lines, *(f"{name:28} - {why}" for name, why in self.skipped.items())])


def make(
    uri: str,
    dataset: DataSet,
    split: str,
    out: str,
    *,
    name: str = "caption_ray",
    search: SearchConfig | None = None,
    java: bool = True,
    limit: int | None = None,
    progress: bool = True,
) -> Scorecard:
    """Caption a split with the checkpoint at `uri` and score it; the files go below `out`.

    `search` is how captions are searched for (default: as the checkpoint says). Raises ValueError
    if pictures of the split cannot be read or have no captions to compare with.
    """
    start = time.monotonic()
    records = evaluate.caption_split(
        uri, dataset, split, search=search, attention=True, limit=limit, progress=progress
    )
    seconds = time.monotonic() - start
    unread = [record for record in records if record["error"]]
    if unread:
        raise ValueError(
            f"{len(unread)} pictures of {split} cannot be read, the first is {unread[0]['file']}: "
            f"{unread[0]['error']}; ingest the data set again"
        )
    scores = metrics.score(
        [record["caption"] for record in records],
        [record["references"] for record in records],
        java,
    )
    for record, values in zip(records, scores.per_image, strict=True):
        record["scores"] = values
    figures = {**scores.corpus, **describe(records, dataset, seconds)}
    card = Scorecard(figures, scores.skipped, storage.resolve(out))
    _write(card, records, uri, split, name)
    return card


def describe(records: list[dict[str, Any]], dataset: DataSet, seconds: float) -> dict[str, float]:
    """Figures that need no reference, and the pointing game."""
    told = [tokenize(record["caption"]) for record in records]
    figures = {
        "images": float(len(records)),
        "words per caption": sum(map(len, told)) / len(told),
        "different words": float(len({word for words in told for word in words})),
        "different captions": float(len({tuple(words) for words in told})),
        "images per second": len(records) / seconds,
    }
    pointing = Pointing(0, 0, 0.0)
    for record in records:
        if record.get("attention") is not None:
            pointing += point(
                record["words"], record["attention"], record["objects"], record["box"]
            )
    if pointing.words:
        figures["pointing game"] = pointing.score
        figures["pointing game by chance"] = pointing.chance_score
    drawn = evaluate.judge_shapes(records)
    if drawn["true"] > 0:  # captions that follow the grammar of the drawn scenes
        figures |= {f"scenes {what}": share for what, share in drawn.items()}
    return figures


def _write(card: Scorecard, records: list[dict[str, Any]], uri: str, split: str, name: str) -> None:
    results = [{"image_id": r["image_id"], "caption": r["caption"]} for r in records]
    lines = [
        json.dumps(
            {key: record[key] for key in ("image_id", "file", "caption", "log_prob", "scores")},
            ensure_ascii=False,
        )
        for record in records
    ]
    document = {"checkpoint": uri, "split": split, **card.figures, "skipped": card.skipped}
    curve = storage.join(storage.parent(uri), report.LOSS_CURVE)
    page = report.page(
        f"{storage.name(storage.parent(uri))}, {storage.name(uri)}, {split}",
        card.figures,
        card.skipped,
        records,
        storage.read_bytes(curve) if storage.exists(curve) else None,
    )
    for file, text in (
        (f"captions_{split}_{name}_results.json", json.dumps(results, ensure_ascii=False)),
        (PER_IMAGE_FILE, "\n".join(lines) + "\n"),
        (REPORT_FILE, page),
        (METRICS_FILE, json.dumps(document, indent=1)),
    ):
        storage.write_bytes(storage.join(card.out, file), text.encode())


def log(card: Scorecard, uri: str, split: str) -> str | None:
    """Add the figures to the page of the run that the checkpoint belongs to; its id, None if the
    run was not followed."""
    run = storage.parent(uri)
    config_uri = storage.join(run, checkpoint.CONFIG)
    state = checkpoint.load(uri).state
    if state.tracker_id is None or not storage.exists(config_uri):
        return None
    config = from_dict(Config, json.loads(storage.read_bytes(config_uri)), config_uri)
    folder = Path(run) if storage.is_local(run) else Path(tempfile.mkdtemp())
    tracker = tracking.start(config, folder, state.tracker_id)
    tracker.log({f"{split}/{name}": value for name, value in card.figures.items()}, state.step)
    tracker.finish()
    return state.tracker_id
