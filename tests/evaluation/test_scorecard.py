"""A checkpoint's scorecard: every picture once, the files, and what they hold."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running_jobs import run_job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caption_ray import cluster, config, storage
from caption_ray.captioning import metrics, run_folder
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import SearchConfig
from caption_ray.data.dataset import open_shards, open_source
from caption_ray.data.tokenizer import PTB
from caption_ray.evaluation import scorecard


@pytest.fixture(scope="module")
def card(
    tiny_run: str, shards: str, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> scorecard.Scorecard:
    out = str(tmp_path_factory.mktemp("out"))
    loaded = run_folder.load(tiny_run)
    return scorecard.make(loaded, open_shards(shards), "val", out, java=False, progress=False)


def read(card: scorecard.Scorecard, file: str) -> str:
    return storage.read_text(storage.join(card.out, file))


def rows_of(shards: str) -> list[dict[str, Any]]:
    """The validation pictures, by image."""
    units = open_shards(shards).splits["val"]
    return sorted((row for unit in units for row in unit.read()), key=lambda row: row["image_id"])


def captions_of(run: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the run's captioner says of them, without Ray."""
    predictor = Predictor(run_folder.load(run), torch.device("cpu"))
    images = np.stack([predictor.prepare(row["image"]) for row in rows])
    return [captions[0].text for captions in predictor.predict(images)]


def test_every_picture_is_captioned_once_and_scored_as_by_hand(
    card: scorecard.Scorecard, tiny_run: str, shards: str
) -> None:
    rows = rows_of(shards)
    captions = captions_of(tiny_run, rows)
    results = json.loads(read(card, "captions_val_caption_ray_results.json"))
    assert results == [
        {"image_id": row["image_id"], "caption": caption}
        for row, caption in zip(rows, captions, strict=True)
    ]
    assert len(rows) == 12
    by_hand = metrics.score(captions, [row["captions"] for row in rows])
    for name, value in by_hand.corpus.items():
        assert card.figures[name] == pytest.approx(value)
    lines = [json.loads(line) for line in read(card, "per_image.jsonl").splitlines()]
    assert [line["scores"] for line in lines] == by_hand.per_image


def test_figures_are_written_and_shown(card: scorecard.Scorecard) -> None:
    document = json.loads(read(card, "metrics.json"))
    assert document["split"] == "val" and document["images"] == 12
    assert document["skipped"] == {"METEOR": "not asked for", "SPICE": "not asked for"}
    assert document["unread"] == [] and "not scored" not in card.table()
    for name, value in card.figures.items():
        assert document[name] == value
        assert f"{name:28} {value:10.4f}" in card.table()


def test_the_report_is_one_file_with_all_pictures_inside(
    card: scorecard.Scorecard, shards: str
) -> None:
    page = read(card, "report.html")
    assert not re.findall(r"(?:src|href)=\"?(?!\"?data:)", page), "it refers to something outside"
    assert page.count("data:image/jpeg") > 12
    for name in ("CIDEr-D", "Best captions", "Worst captions", "Where each word looked"):
        assert name in page
    nearest = re.findall(r"Nearest in training \((\d+)%\): <i>(.*?)</i>", page)
    known = set(open_shards(shards).training_captions())
    assert nearest and {text for _, text in nearest} <= known


def test_a_word_cannot_become_markup(card: scorecard.Scorecard) -> None:
    from caption_ray.evaluation import report

    record = {
        "caption": "<script>alert(1)</script>", "references": ["<b>"], "file": "<i>",
        "scores": {"CIDEr-D": 1.0, "BLEU-4": 0.0, "ROUGE-L": 0.0},
    }  # fmt: skip
    page = report.page("<u>", {"<s>": 1.0}, {}, [record], {"<a>": b""}, {"<f>": [record]})
    assert not {"<script>", "<i>", "<u>", "<s>", "<a>"} & set(re.findall(r"<\w+>", page))
    assert "&lt;script&gt;" in page and "&lt;b&gt;" in page


def test_search_can_be_another_than_the_checkpoints(
    tiny_run: str, shards: str, local_ray: None, tmp_path: Path
) -> None:
    loaded = run_folder.load(tiny_run)
    short = dataclasses.replace(SearchConfig(), beam_size=1, max_length=2)
    found = scorecard.make(
        loaded, open_shards(shards), "val", str(tmp_path), search=short, java=False, progress=False
    )
    assert found.figures["words per caption"] <= 2


def test_the_report_shows_the_curves_of_the_run(
    tiny_run: str, shards: str, local_ray: None, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    history = [{"step": 1, "train/loss": 2.0}, {"step": 1, "val/loss": 1.0, "val/CIDEr-D": 0.5}]
    (run / "history.json").write_text(json.dumps(history))
    found = scorecard.make(
        run_folder.load(str(run)), open_shards(shards), "val", java=False, limit=2, progress=False
    )
    assert found.out == f"{run}/evaluation/val"
    page = read(found, "report.html")
    assert page.count("data:image/png") == 2
    assert "<h2>Loss of run</h2>" in page and "<h2>CIDEr-D of run</h2>" in page


def test_an_ensemble_has_a_scorecard_of_its_own(
    tiny_run: str, shards: str, local_ray: None, tmp_path: Path
) -> None:
    runs = [shutil.copytree(tiny_run, tmp_path / name) for name in ("one", "two")]
    loaded = run_folder.load(",".join(map(str, runs)))
    found = scorecard.make(loaded, open_shards(shards), "val", java=False, progress=False)
    assert found.out == f"{runs[0]}/evaluation/val+two"
    assert json.loads(read(found, "metrics.json"))["checkpoint"] == loaded.uri
    assert "one, checkpoint-00000001 + two, checkpoint-00000001, val" in read(found, "report.html")
    results = json.loads(read(found, "captions_val_caption_ray_results.json"))
    assert [one["caption"] for one in results] == captions_of(tiny_run, rows_of(shards))
    assert scorecard.log(found, loaded, "val") is None, "it belongs to no run"


def test_pictures_that_cannot_be_read_are_told_and_the_others_scored(
    tiny_run: str, scenes: Path, local_ray: None, tmp_path: Path
) -> None:
    source = shutil.copytree(scenes, tmp_path / "source")
    first, second, *others = sorted((source / "val").iterdir())
    first.unlink()
    second.write_bytes(b"no picture")
    loaded, dataset = run_folder.load(tiny_run), open_source(str(source), seed=0)

    def make(out: Path) -> scorecard.Scorecard:
        return scorecard.make(loaded, dataset, "val", str(out), java=False, progress=False)

    found = make(tmp_path / "out")
    assert found.figures["images"] == len(others) == 10
    document = json.loads(read(found, "metrics.json"))
    assert [one["file"] for one in document["unread"]] == [first.name, second.name]
    assert [one["error"][:7] for one in document["unread"]] == ["missing", "corrupt"]
    assert f"2 unreadable pictures, the first: {first.name}: missing" in found.table()
    assert len(json.loads(read(found, "captions_val_caption_ray_results.json"))) == 10
    shutil.rmtree(source / "val")
    with pytest.raises(ValueError, match=f"no picture of val can be read, .*{first.name}: missing"):
        make(tmp_path / "none")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "none"])
def test_figures_captions_and_heat_maps_go_to_the_page_of_the_run(
    card: scorecard.Scorecard, tiny_run: str, tmp_path: Path, tracker: Any
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    uri = run_folder.find(str(run))
    settings = dataclasses.replace(
        config.shapes(), run=config.RunConfig(str(tmp_path), "run", tracker)
    )
    (run / "config.json").write_text(json.dumps(config.to_dict(settings)))
    if tracker == "wandb":
        state = Path(uri, "state.json")
        state.write_text(json.dumps({**json.loads(state.read_text()), "tracker_id": "abc"}))
        manifest = Path(uri, "manifest.json")
        entry = {"bytes": state.stat().st_size, "digest": storage.digest(state.read_bytes())}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "state.json": entry}))
    page = scorecard.log(card, run_folder.load(uri), "val")
    if tracker == "none":
        assert page is None and not list(run.glob("**/*tfevents*")) + list(run.glob("wandb"))
    elif tracker == "wandb":
        assert page == "abc" and len(list(run.rglob("*/val/captions*.table.json"))) == 1
        pictures = [path.name for path in run.rglob("*.png")]
        heat_maps = card.tables["attention"].rows
        assert sum(name.startswith("pictures") for name in pictures) == 12 + len(heat_maps)
    else:
        events = EventAccumulator(str(run), {"images": 0, "scalars": 0}).Reload()
        assert events.Scalars("val/CIDEr-D")[0].value == pytest.approx(card.figures["CIDEr-D"])
        assert len(events.Tags()["images"]) == 12 + len(card.tables["attention"].rows)


def test_the_job_prints_the_table_and_says_where_the_files_are(
    tiny_run: str, shards: str, local_ray: None, tmp_path: Path
) -> None:
    done = run_job(
        "evaluate", "--checkpoint", tiny_run, "--shards", shards, "--out", "out", "--no-java",
        "--limit", "6", "--search.max-length", "3", "--search.min-length", "3", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"CIDEr-D +\d", done.stdout) and f"Files: {tmp_path}/out" in done.stdout
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert figures["images"] == 6 and figures["words per caption"] == 3


def test_the_job_names_what_is_wrong_before_ray_starts(
    tiny_run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_: pytest.fail("Ray was started"))
    for asked, message in (
        (("--shards", tmp_path), f"{tmp_path}/index.json: no index"),
        (("--shards", shards, "--split", "test"), "no split 'test'; it has train, val"),
    ):
        done = run_job("evaluate", "--checkpoint", tiny_run, *asked, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr


def test_captions_that_nobody_wrote_for_training_are_novel(shards: str, local_ray: None) -> None:
    dataset = open_shards(shards)
    units = [unit.captions() for unit in dataset.splits["train"]]
    rows = [row for unit in dataset.splits["train"] for row in unit.read()]
    assert [captions for unit in units for captions in unit] == [row["captions"] for row in rows]
    known = rows[-1]["captions"][0]
    told = [known, known.upper() + ".", "nobody ever wrote this", "nor this"]
    records = [{"caption": caption, "objects": []} for caption in told]
    learnt = scorecard.training_captions(dataset, PTB)
    figures = scorecard.describe(records, learnt, 1.0, PTB)
    assert figures["share of novel captions"] == 0.5
    alone = dataclasses.replace(dataset, splits={"val": dataset.splits["val"]})
    assert "share of novel captions" not in scorecard.describe(
        records, scorecard.training_captions(alone, PTB), 1.0, PTB
    )
