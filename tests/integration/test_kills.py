"""kill -9 at every write to the storage: the next run must recover."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from killing import FILE_CHANGES, REQUESTS, count, ingest_without_ray, kill, spread
from patience import scaled

from caption_ray import config, storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.data.ingest import RECEIPTS
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner

ROOT = Path(__file__).resolve().parents[2]
PARTS = 9 << 20
"""Bytes of the optimizer state in the commit that is killed: it goes to S3 in two parts."""
SIZES = np.array([4])
"""Pictures in each shard, of which the checkpoints have a ledger."""


def _contents(folder):
    """The bytes of every file, including hidden and half-written ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# Ingest ---------------------------------------------------------------------------------------


def test_an_ingest_killed_anywhere_is_completed_to_the_same_bytes(scenes, tmp_path):
    arguments = (str(scenes), str(tmp_path / "undisturbed"), 7)
    total = count(FILE_CHANGES, ingest_without_ray, *arguments)
    expected = _contents(tmp_path / "undisturbed")
    killed = 0
    for at in spread(total, 40):
        out = tmp_path / f"killed-{at}"
        killed += kill(FILE_CHANGES, at, ingest_without_ray, str(scenes), str(out), 7)
        assert ("index.json" in _contents(out)) <= (_contents(out).keys() >= expected.keys())
        kill(FILE_CHANGES, 0, ingest_without_ray, str(scenes), str(out), 7)
        assert _contents(out) == expected, f"killed at change {at} of {total}"
    print(f"\ningest, local: {killed} kills over {total} changes, all completed")
    assert killed >= 30


def test_an_ingest_into_a_bucket_killed_anywhere_is_completed(scenes, bucket, tmp_path):
    source, undisturbed = str(scenes), storage.join(bucket, "undisturbed")
    total = count(REQUESTS, ingest_without_ray, source, undisturbed, 30)

    def contents(uri):
        return {file[len(uri) :]: storage.read_bytes(file) for file in storage.list_files(uri)}

    killed = 0
    for at in spread(total, 8):
        out = storage.join(bucket, f"killed-{at}")
        killed += kill(REQUESTS, at, ingest_without_ray, source, out, 30)
        kill(REQUESTS, 0, ingest_without_ray, source, out, 30)
        assert contents(out) == contents(undisturbed), f"killed at request {at} of {total}"
    print(f"\ningest, S3: {killed} kills over {total} requests, all completed")
    assert killed >= 8


def test_the_ingest_job_killed_in_its_course_is_completed(coco_mini, tmp_path):
    """The real job with its Ray, killed in the middle."""
    out = tmp_path / "out"
    command = [
        sys.executable, str(ROOT / "jobs" / "ingest.py"), "--source", str(coco_mini),
        "--out", str(out), "--image-size", "64", "--images-per-shard", "8",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_ADDRESS": "local"}

    def receipts():
        return len(list(Path(out, RECEIPTS).rglob("*.json")))

    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while receipts() < 7 and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not (out / "index.json").exists()
    assert receipts() >= 7
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=scaled(300)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kill(FILE_CHANGES, 0, ingest_without_ray, str(coco_mini), str(tmp_path / "undisturbed"), 8)
    assert _contents(out) == _contents(tmp_path / "undisturbed")


# Checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """step -> local folder of a saved checkpoint and its state."""
    preset = config.shapes().model
    small = {"embedding_dim": 8, "hidden_dim": 16, "attention_dim": 8}
    vocabulary, folders = Vocabulary(["a", "red", "circle"]), {}
    model = dataclasses.replace(
        preset,
        encoder=dataclasses.replace(preset.encoder, image_size=32),
        decoder=dataclasses.replace(preset.decoder, **small),
    )
    for step in (1, 2, 3):
        torch.manual_seed(step)
        captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
        state = checkpoint.State(step, 1, 0, {"val/loss": 1.0 / step}, None)
        folder = tmp_path_factory.mktemp(f"step-{step}")
        optimizer = {"state": torch.zeros(PARTS if step == 2 else 9, dtype=torch.uint8)}
        ledger = Ledger(SIZES)
        search = config.SearchConfig()
        checkpoint.save(folder, captioner, vocabulary, model, search, state, optimizer, ledger)
        folders[step] = (folder, state)
    return folders


def _commit(saved, run, step):
    """A function that commits the saved checkpoint of `step`."""
    folder, state = saved[step]
    return partial(run_folder.commit, folder, run, state, keep=1, is_best=True)


def _assert_good(run, steps):
    """Both pointers name a checkpoint of one of the steps which loads and verifies."""
    for uri in {run_folder.find(run, which) for which in run_folder.POINTERS}:
        loaded = checkpoint.load(uri)
        assert loaded.state.step in steps
        checkpoint.load_for_resume(uri, loaded.captioner, torch.device("cpu"), SIZES)


def _sweep(saved, runs, events, points, leftovers):
    _commit(saved, f"{runs}/undisturbed", 1)()
    total = count(events, _commit(saved, f"{runs}/undisturbed", 2))
    _commit(saved, f"{runs}/undisturbed", 3)()
    expected, killed = leftovers(f"{runs}/undisturbed"), 0
    for at in spread(total, points):
        run = f"{runs}/killed-{at}"
        _commit(saved, run, 1)()
        killed += kill(events, at, _commit(saved, run, 2))
        _assert_good(run, (1, 2))
        run_folder.release_all(run)
        _commit(saved, run, 3)()
        _assert_good(run, (3,))
        assert leftovers(run) == expected, f"killed at {at} of {total}"
        storage.delete(run)
    print(f"\ncheckpoint, {runs}: {killed} kills over {total} points, all pointers good")
    assert killed >= min(30, points)


def test_a_commit_killed_anywhere_leaves_a_good_checkpoint(saved, tmp_path):
    def leftovers(run):
        return sorted(_contents(run))

    _sweep(saved, str(tmp_path), FILE_CHANGES, 40, leftovers)


def test_a_commit_to_a_bucket_killed_anywhere_leaves_a_good_checkpoint(saved, bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")

    def leftovers(run):
        assert "Uploads" not in client.list_multipart_uploads(Bucket=name)
        return [file[len(run) :] for file in storage.list_files(run)]

    _sweep(saved, bucket, REQUESTS, 8, leftovers)
