"""Evaluates a checkpoint: captions a split, scores the captions, and writes the results as files.

<out>/captions_<split>_<name>_results.json   the captions, for COCO's evaluation server
<out>/metrics.json                           the scores
<out>/per_image.jsonl                        caption and scores of each image
<out>/report.html                            all of it, to look at
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_ray import storage
from caption_ray.captioning import checkpoint, metrics, run_folder, tracking
from caption_ray.captioning.checkpoint import Loaded
from caption_ray.config import SearchConfig
from caption_ray.data import unspaced
from caption_ray.data.dataset import DataSet
from caption_ray.data.tokenizer import Tokenizer
from caption_ray.evaluation import calibration, evaluate, failures, report
from caption_ray.evaluation.pointing import Pointing, point

METRICS_FILE, PER_IMAGE_FILE, REPORT_FILE = "metrics.json", "per_image.jsonl", "report.html"


@dataclass(frozen=True)
class Scorecard:
    """The result of an evaluation."""

    figures: dict[str, float]
    """Value by name; the metrics of `metrics.score` come first."""
    skipped: dict[str, str]
    """Metrics that could not be computed, and why."""
    unread: list[dict[str, Any]]
    """Pictures that could not be read and so are not scored: `image_id`, `file` and `error`."""
    tables: dict[str, tracking.Table]
    """The captions and images of the report, as tables for a tracker."""
    out: str
    """URI of the folder with the files."""

    def table(self) -> str:
        lines = [f"{name:28} {value:10.4f}" for name, value in self.figures.items()]
        lines += [f"{name:28} - {why}" for name, why in self.skipped.items()]
        if self.unread:
            first = f"the first: {self.unread[0]['file']}: {self.unread[0]['error']}"
            lines.append(f"{'not scored':28} - {len(self.unread)} unreadable pictures, {first}")
        return "\n".join(lines)


def make(
    loaded: Loaded,
    dataset: DataSet,
    split: str,
    out: str | None = None,
    *,
    name: str = "caption_ray",
    search: SearchConfig | None = None,
    java: bool = True,
    limit: int | None = None,
    progress: bool = True,
) -> Scorecard:
    """Caption a split with a loaded checkpoint or ensemble and score the captions. The files are
    written below `out` (default: below the run).

    `search` has the search settings (default: those in the checkpoint). Pictures that cannot be
    read are listed in the scorecard but not scored, since that is not the captioner's fault. Raises
    ValueError if no picture can be read, or if one has no reference captions.
    """
    if "train" in dataset.splits:
        dataset.splits["train"][0].captions()  # fail now, not at the end, if storage cannot seek
    start = time.monotonic()
    records = evaluate.caption_split(
        loaded, dataset, split, search=search, attention=True, limit=limit, progress=progress
    )
    seconds = time.monotonic() - start
    unread = [
        {key: record[key] for key in ("image_id", "file", "error")}
        for record in records
        if record["error"]
    ]
    records = [record for record in records if not record["error"]]
    if not records:
        first = f"{unread[0]['file']}: {unread[0]['error']}" if unread else "there is none"
        raise ValueError(f"{dataset.uri}: no picture of {split} can be read, the first: {first}")
    tokenizer = loaded.vocabulary.tokenizer
    unspaced.warn((text for record in records for text in record["references"]), tokenizer)
    scores = metrics.score(
        [record["caption"] for record in records],
        [record["references"] for record in records],
        java,
        tokenizer,
    )
    for record, values in zip(records, scores.per_image, strict=True):
        record["scores"] = values
    known = training_captions(dataset, tokenizer)
    figures = {**scores.corpus, **describe(records, known, seconds, tokenizer)}
    wrong = failures.shown(failures.kinds(records, tokenizer), report.SHOWN)
    shown = {record["image_id"] for record in report.looked_at(records, wrong)}
    chosen = [record for record in records if record["image_id"] in shown]
    told = [tokenizer.scored(record["caption"]) for record in chosen]
    for record, found in zip(chosen, failures.nearest(told, known), strict=True):
        record["nearest"] = found
    tables = report.tables(records)
    card = Scorecard(
        figures,
        scores.skipped,
        unread,
        tables,
        storage.resolve(out or run_folder.evaluation_folder(loaded.uri, split)),
    )
    _write(card, records, wrong, loaded.uri, split, name)
    return card


def training_captions(dataset: DataSet, tokenizer: Tokenizer) -> dict[tuple[str, ...], str]:
    """What people wrote of the training pictures, by its words; empty without a training split."""
    if "train" not in dataset.splits:
        return {}
    return {tuple(tokenizer.scored(text)): text for text in dataset.training_captions()}


def describe(
    records: list[dict[str, Any]],
    known: Mapping[tuple[str, ...], str],
    seconds: float,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Figures that need no reference captions, and the pointing game. known: as
    `training_captions` gives it, of which a captioner may repeat whole captions."""
    told = [tokenizer.scored(record["caption"]) for record in records]
    figures = {
        "images": float(len(records)),
        "words per caption": sum(map(len, told)) / len(told),
        "different words": float(len({word for words in told for word in words})),
        "different captions": float(len({tuple(words) for words in told})),
        "images per second": len(records) / seconds,
    }
    if known:
        novel = sum(tuple(words) not in known for words in told)
        figures["share of novel captions"] = novel / len(told)
    calibrated = calibration.calibration(records)
    if calibrated is not None:
        figures["log-probability and CIDEr-D"] = calibrated.correlation
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


def _write(
    card: Scorecard,
    records: list[dict[str, Any]],
    wrong: Mapping[str, Sequence[report.Record]],
    uri: str,
    split: str,
    name: str,
) -> None:
    results = [{"image_id": r["image_id"], "caption": r["caption"]} for r in records]
    lines = [
        json.dumps(
            {key: record[key] for key in ("image_id", "file", "caption", "log_prob", "scores")},
            ensure_ascii=False,
        )
        for record in records
    ]
    document = {"checkpoint": uri, "split": split, **card.figures}
    document |= {"skipped": card.skipped, "unread": card.unread}
    members = checkpoint.members(uri)
    names = [f"{storage.name(storage.parent(one))}, {storage.name(one)}" for one in members]
    curves: dict[str, bytes] = {}
    for run in dict.fromkeys(storage.parent(one) for one in members):
        found = report.curves(run_folder.read_history(run), storage.name(run))
        curves |= {f"{heading} of {storage.name(run)}": png for heading, png in found.items()}
    calibrated = calibration.calibration(records)
    if calibrated is not None:
        curves["How sure it is, and how good"] = calibration.draw(calibrated)
    title = f"{' + '.join(names)}, {split}"
    page = report.page(title, card.figures, card.skipped, records, curves, wrong)
    for file, text in (
        (f"captions_{split}_{name}_results.json", json.dumps(results, ensure_ascii=False)),
        (PER_IMAGE_FILE, "\n".join(lines) + "\n"),
        (REPORT_FILE, page),
        (METRICS_FILE, json.dumps(document, indent=1)),
    ):
        storage.write_bytes(storage.join(card.out, file), text.encode())


def log(card: Scorecard, loaded: Loaded, split: str) -> str | None:
    """Add figures, captions and attention maps to the tracker's page of the run that the checkpoint
    belongs to. Returns that page's id; None if the run was not tracked. An ensemble has no run."""
    run, state = storage.parent(loaded.uri), loaded.state
    if loaded.members:
        return None
    try:
        config = run_folder.read_config(run)
    except FileNotFoundError:
        return None
    if state.tracker_id is None and config.run.tracker != "tensorboard":
        return None
    is_local = storage.is_local(run)
    with nullcontext(run) if is_local else tempfile.TemporaryDirectory() as folder:
        tracker = tracking.start(config, Path(folder), state.tracker_id)
        tracker.log({f"{split}/{name}": value for name, value in card.figures.items()}, state.step)
        for name, table in card.tables.items():
            tracker.log_table(f"{split}/{name}", table, state.step)
        tracker.finish()
        if not is_local:
            storage.upload(folder, run)
    return state.tracker_id or run
