import dataclasses
import json
import shutil

import pytest
import torch
from running_jobs import run_job

from caption_ray import storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.predictor import Predictor
from caption_ray.data.dataset import open_shards, open_source
from caption_ray.evaluation import evaluate
from caption_ray.evaluation.finding import find_images


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return run_folder.load(tiny_run)


@pytest.mark.usefixtures("local_ray")
def test_a_split_is_captioned_exactly_once_as_the_predictor_does(loaded, shards, scenes):
    dataset = open_shards(shards)
    records = evaluate.caption_split(loaded, dataset, "val", progress=False)
    rows = {row["image_id"]: row for unit in dataset.splits["val"] for row in unit.read()}
    assert [record["image_id"] for record in records] == sorted(rows)
    predictor = Predictor(loaded, torch.device("cpu"))
    for record in records:
        row = rows[record["image_id"]]
        assert record["file"] == row["file_name"] and record["error"] is None
        assert record["references"] == row["captions"] and record["objects"] == row["objects"]
        ((caption,),) = predictor.predict(predictor.prepare(row["image"])[None])
        assert record["caption"] == caption.text
        assert record["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)


@pytest.mark.usefixtures("local_ray")
def test_a_limit_captions_the_first_ones_and_raw_pictures_work_too(loaded, scenes):
    records = evaluate.caption_split(
        loaded, open_source(str(scenes), seed=0), "train", limit=7, progress=False
    )
    assert len({record["image_id"] for record in records}) == 7
    assert all(record["caption"] is not None for record in records)


@pytest.mark.usefixtures("local_ray")
def test_files_get_a_line_each_and_unreadable_ones_their_error(loaded, scenes, tmp_path):
    pictures = shutil.copytree(scenes / "val", tmp_path / "pictures")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out" / "captions.jsonl"
    assert evaluate.caption_files(loaded, find_images(str(pictures)), str(out), progress=False) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(str(path) for path in pictures.iterdir())
    for line in lines:
        if line["file"].endswith("broken.jpg"):
            assert set(line) == {"file", "error"} and "accepted format" in line["error"]
        else:
            assert set(line) == {"file", "caption", "log_prob"} and line["log_prob"] < 0


@pytest.mark.usefixtures("local_ray")
def test_the_job_captions_with_an_ensemble_as_it_is_asked_to(tiny_run, scenes, tmp_path):
    done = run_job(
        "caption", "--checkpoint", f"{tiny_run},{tiny_run}", "--images", scenes / "val",
        "--out", "out.jsonl", "--search.min-length", "7", "--search.no-repeat-ngram-size", "2",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    uri = run_folder.find(tiny_run, "best")
    assert f"Captions of {uri},{uri} in" in done.stdout
    loaded = checkpoint.load(uri)
    search = dataclasses.replace(loaded.search, min_length=7, no_repeat_ngram_size=2)
    predictor = Predictor(loaded, torch.device("cpu"), search)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        picture = predictor.prepare(storage.read_bytes(line["file"]))
        ((caption,),) = predictor.predict(picture[None])
        assert line["caption"] == caption.text and len(caption.words) >= 7
        assert line["log_prob"] == pytest.approx(caption.log_prob, abs=1e-3)


def test_the_judge_counts_true_complete_and_exact_captions():
    objects = [
        {"category": "small red star", "bbox": [0.1, 0.4, 0.2, 0.2]},
        {"category": "large blue ring", "bbox": [0.6, 0.4, 0.3, 0.3]},
    ]
    captions = [
        "a small red star left of a large blue ring",
        "a small red star",
        "a small red star above a large blue ring",
        None,
    ]
    records = [{"caption": caption, "objects": objects} for caption in captions]
    assert evaluate.judge_shapes(records) == {"true": 0.5, "complete": 0.5, "exact": 0.25}


def test_the_loss_curve_is_a_picture_in_the_run(tmp_path):
    from PIL import Image

    from caption_ray.evaluation import report

    history = [{"step": n, "train/loss": 3.0 / n} for n in range(1, 9)]
    history.append({"step": 8, "val/loss": 0.5})
    uri = report.write_loss_curve(history, str(tmp_path))
    assert uri == storage.join(str(tmp_path), report.LOSS_CURVE)
    picture = Image.open(uri).convert("RGB")
    assert picture.width > 600
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # both curves are drawn
