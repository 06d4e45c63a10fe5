"""From ingest to captions on real pictures and a real S3 server, with a user's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from patience import scaled

from caption_ray import storage
from caption_ray.data.formats import find_splits
from caption_ray.data.ingest import read_index
from caption_ray.data.locations import read_picture

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--model.encoder.name small --model.encoder.weights none --model.encoder.trainable-from all "
    "--model.encoder.image-size 64 --model.decoder.hidden-dim 32 "
    "--model.decoder.embedding-dim 32 --model.decoder.attention-dim 32 --train.warmup-steps 5 "
    "--data.min-word-count 2"
).split()


@pytest.fixture(scope="module")
def buckets(s3, coco_mini):
    """Buckets `coco` (the zips as COCO ships them) and `out`, which are removed at the end."""
    client = boto3.client("s3")
    for name in ("coco", "out"):
        client.create_bucket(Bucket=name)
    for file in coco_mini.iterdir():
        client.upload_file(str(file), "coco", file.name)
    yield
    for name in ("coco", "out"):
        boto3.resource("s3").Bucket(name).objects.all().delete()
        client.delete_bucket(Bucket=name)


def _run(name, *arguments):
    """Run a job as a user would, with its own Ray."""
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # even beside a running cluster
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=scaled(500),
    )


def _job(name, *arguments):
    """The output of a job, which must succeed."""
    result = _run(name, *arguments)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    # Ray Train's cleaner complains unless it finds the dashboard of its own Ray
    assert "PlacementGroupCleaner" not in result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(1200)
def test_from_zips_in_a_bucket_to_captions_in_a_bucket(buckets):
    printed = _job(
        "ingest", "--source", "s3://coco", "--out", "s3://out/shards", "--image-size", "96",
        "--images-per-shard", "30",
    )  # fmt: skip
    assert "train: 80 images, 3 shards" in printed and "val: 79 images, 3 shards" in printed
    index = read_index("s3://out/shards")
    for split in ("train", "val"):
        for shard in index.shards(split):
            data = storage.read_bytes(storage.join("s3://out/shards", shard.file))
            assert storage.checksum(data) == shard.checksum

    printed = _job(
        "train", "coco", "--data.shards", "s3://out/shards", "--run.storage", "s3://out/my runs?",
        "--run.name", "mini", "--train.num-workers", "2", "--train.cpus-per-worker", "0.5",
        "--train.epochs", "2", "--train.batch-size", "8", "--train.log-every", "2", *TINY,
    )  # fmt: skip
    assert "2 worker(s) on CPU" in printed
    assert "Epoch 1 Batch 0 Loss" in printed and "Epoch 2 Loss" in printed
    assert "Time taken for 1 epoch" in printed
    run = "s3://out/my runs?/mini"
    step = json.loads(storage.read_bytes(f"{run}/latest.json"))["step"]
    assert step == 2 * 5  # 80 pictures, 2 workers, batches of 8
    assert storage.exists(f"{run}/checkpoint-{step:08d}/model.safetensors")
    assert storage.read_bytes(f"{run}/loss.png")[:4] == b"\x89PNG"
    assert any(file.endswith(".wandb") for file in storage.list_files(f"{run}/wandb"))

    _upload_pictures()
    _job(
        "caption", "--checkpoint", run, "--images", "s3://coco/pictures", "--out",
        "s3://out/captions.jsonl",
    )  # fmt: skip
    lines = [json.loads(x) for x in storage.read_text("s3://out/captions.jsonl").splitlines()]
    assert [storage.name(line["file"]) for line in lines] == ["bad.jpg", "one.jpg", "two.jpg"]
    assert "error" in lines[0] and "caption" not in lines[0]
    for line in lines[1:]:
        assert isinstance(line["caption"], str) and line["log_prob"] < 0


def _upload_pictures():
    records = find_splits("s3://coco", splits=("val",))["val"].records
    for name, record in zip(("one", "two"), records, strict=False):
        storage.write_bytes(f"s3://coco/pictures/{name}.jpg", read_picture(record.location))
    storage.write_bytes("s3://coco/pictures/bad.jpg", b"not a picture")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--run.storage", "s3://not-there/runs"],
        ["ingest", "--source", "s3://coco", "--out", "s3://not-there/shards"],
    ],
    ids=lambda command: command[0],
)
def test_a_missing_bucket_ends_a_job_with_one_message_and_is_not_made(buckets, command):
    result = _run(*command)
    said = [line for line in result.stderr.splitlines() if "not-there" in line]
    assert result.returncode == 1 and len(said) == 1, result.stderr
    assert said[0].startswith("error: --") and "is 's3://not-there/" in said[0], said
    assert said[0].endswith("there is no bucket 'not-there'; create it, or correct its name")
    assert "Traceback" not in result.stderr
    assert {b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"]} == {"coco", "out"}
