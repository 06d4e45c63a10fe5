"""What jobs print as the next command can be pasted into a shell, and says nothing untrue."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caption_ray import cluster, command
from caption_ray.captioning import checkpoint
from caption_ray.data import ingest
from caption_ray.data.shards import Index, LeftOut, Shard
from caption_ray.evaluation import evaluate, report
from caption_ray.training import trainer

JOBS = Path(__file__).resolve().parents[1] / "jobs"
ODD = "my data; rm -r $HOME/it's here"


def run(job: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [job, *arguments])
        patch.setattr(cluster, "connect", lambda *_: None)
        patch.setattr(command, "check_output", lambda *_, **__: None)
        runpy.run_path(str(JOBS / job), run_name="__main__")


def printed_command(printed: str, job: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if f"python jobs/{job}" in line]
    return shlex.split(line)


def test_ingest_names_its_output_and_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = [LeftOut("train", f"{i}.jpg", "missing") for i in range(5)]
    shards = {"train": [Shard("a", 7, 100, "")]}
    index = Index("source", "", None, 0, shards, {}, left_out)
    monkeypatch.setattr(ingest, "ingest", lambda **_: index)
    run("ingest.py", "--source", "s", "--out", ODD)
    printed = capsys.readouterr().out
    assert printed_command(printed, "train.py")[-2:] == ["--data.shards", ODD]
    assert "left out: train: 5 x missing (the first: 0.jpg)" in printed


def test_train_names_its_run_and_why_a_picture_has_no_caption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[dict[str, Any]] = [
        {"file": "a.jpg", "caption": "a dog", "error": None},
        {"file": "b.jpg", "caption": None, "error": "missing"},
        {"file": "c.jpg", "caption": "", "error": None},
    ]
    finished = SimpleNamespace(run=ODD, checkpoint="c", history=[])
    monkeypatch.setattr(trainer, "check", lambda settings: None)
    monkeypatch.setattr(trainer, "train", lambda settings: finished)
    monkeypatch.setattr(checkpoint, "load", lambda uri: uri)
    monkeypatch.setattr(trainer, "open_data", lambda settings: None)
    monkeypatch.setattr(report, "write_loss_curve", lambda *_: "loss.png")
    monkeypatch.setattr(evaluate, "caption_split", lambda *_, **__: records)
    run("train.py", "coco", "--data.shards", "s")
    printed = capsys.readouterr().out
    assert ODD in printed_command(printed, "caption.py")
    assert "a.jpg: a dog\n" in printed and "b.jpg: unreadable (missing)\n" in printed
    assert "None" not in printed
