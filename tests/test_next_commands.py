"""What jobs print as the next command can be pasted into a shell, and says nothing untrue."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running_jobs import run_job

from caption_ray import cluster, command
from caption_ray.captioning import checkpoint
from caption_ray.data import ingest
from caption_ray.data.shards import Index, LeftOut, Shard
from caption_ray.evaluation import evaluate, report
from caption_ray.training import trainer

ODD = "my data; rm -r $HOME/it's here"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_: None)
    monkeypatch.setattr(command, "check_output", lambda *_, **__: None)


def printed_command(printed: str, job: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if f"python jobs/{job}" in line]
    return shlex.split(line)


def test_ingest_names_its_output_and_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left_out = [LeftOut("train", f"{i}.jpg", "missing") for i in range(5)]
    shards = {"train": [Shard("a", 7, 100, "")]}
    index = Index("source", "", None, 0, shards, {}, left_out)
    monkeypatch.setattr(ingest, "inspect", lambda **_: SimpleNamespace(at=lambda out: None))
    monkeypatch.setattr(ingest, "write", lambda _: index)
    printed = run_job("ingest", "--source", "s", "--out", ODD, cwd=tmp_path).stdout
    assert printed_command(printed, "train.py")[-2:] == ["--data.shards", ODD]
    assert "left out: train: 5 x missing (the first: 0.jpg)" in printed


def test_train_names_its_run_and_why_a_picture_has_no_caption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = [
        {"file": "a.jpg", "caption": "a dog", "error": None},
        {"file": "b.jpg", "caption": None, "error": "missing"},
        {"file": "c.jpg", "caption": "", "error": None},
    ]
    finished = SimpleNamespace(run=ODD, checkpoint="c", history=[])
    monkeypatch.setattr(trainer, "check", lambda settings: None)
    monkeypatch.setattr(trainer, "check_inputs", lambda settings: None)
    monkeypatch.setattr(trainer, "train", lambda settings: finished)
    monkeypatch.setattr(checkpoint, "load", lambda uri: uri)
    monkeypatch.setattr(trainer, "open_data", lambda settings: None)
    monkeypatch.setattr(report, "write_loss_curve", lambda *_: "loss.png")
    monkeypatch.setattr(evaluate, "caption_split", lambda *_, **__: records)
    printed = run_job("train", "coco", "--data.shards", "s", cwd=tmp_path).stdout
    assert ODD in printed_command(printed, "caption.py")
    assert "a.jpg: a dog\n" in printed and "b.jpg: unreadable (missing)\n" in printed
    assert "None" not in printed
