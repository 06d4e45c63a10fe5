"""Training starts from formats that are not COCO's: streamed, and ingested by the job."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import pictures_of
from running_jobs import run_job
from tiny_runs import losses_of, tiny_config

from caption_ray import config, storage
from caption_ray.data.dataset import open_shards
from caption_ray.data.formats import find_splits
from caption_ray.training import trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def tars(scenes: Path, tmp_path: Path) -> Path:
    """The 40 + 12 scenes as tars without splits."""
    source = tmp_path / "tars"
    source.mkdir()
    found = find_splits(str(scenes))
    records = [record for split in found.values() for record in split.records]
    pictures = [picture for split in found.values() for picture in pictures_of(split)]
    for number in range(2):
        with tarfile.open(source / f"{number:05d}.tar", "w") as archive:
            for record, data in list(zip(records, pictures, strict=True))[number::2]:
                assert isinstance(data, bytes)
                text = json.dumps({"caption": record.picture.captions}).encode()
                for ending, content in (("jpg", data), ("json", text)):
                    member = tarfile.TarInfo(f"{record.picture.image_id}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return source


@pytest.mark.usefixtures("local_ray")
def test_training_streams_tars(tars: Path, tmp_path: Path) -> None:
    settings = tiny_config(None, tmp_path / "runs", "tars", epochs=2)
    data = dataclasses.replace(
        settings.data, source=str(tars), reading=config.SourceConfig(split="val=0.3")
    )
    finished = trainer.train(dataclasses.replace(settings, data=data))
    assert len(losses_of(finished)) == 2
    assert losses_of(finished)[1] < losses_of(finished)[0]


@pytest.mark.usefixtures("local_ray")
def test_training_ingests_parquet_of_the_hub(scenes: Path, tmp_path: Path) -> None:
    source = tmp_path / "parquet"
    source.mkdir()
    for name, split in find_splits(str(scenes)).items():
        pictures = [{"bytes": data, "path": None} for data in pictures_of(split)]
        captions = [record.picture.captions for record in split.records]
        table = pa.table({"image": pictures, "captions": captions})
        pq.write_table(table, source / f"{name}-00000-of-00001.parquet", row_group_size=8)
    settings = tiny_config(None, tmp_path / "runs", "parquet", epochs=1)
    data = dataclasses.replace(settings.data, source=str(source), ingest=True)
    finished = trainer.train(dataclasses.replace(settings, data=data))
    assert len(losses_of(finished)) == 1


def test_the_job_ingests_tars_by_a_pattern(tars: Path, tmp_path: Path) -> None:
    pattern = str(tars / "{00000..00001}.tar")
    job = run_job("ingest", "--source", pattern, "--out", "out", cwd=tmp_path)
    assert job.returncode == 1 and "--split val=0.02" in job.stderr
    job = run_job(
        "ingest", "--source", pattern, "--out", "out", "--split", "val=0.2,test=0.1",
        cwd=tmp_path,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    dataset = open_shards(str(tmp_path / "out"))
    assert sum(sum(dataset.rows(split)) for split in ("train", "val", "test")) == 52


def test_a_bucket_gives_what_a_folder_gives(tars: Path, bucket: str) -> None:
    storage.upload(tars, f"{bucket}/tars")
    table = pa.table({"image": [b"A", b"B", b"C"], "caption": ["a", "b", "c"]})
    pq.write_table(table, tars / "train.parquet", row_group_size=2)
    storage.write_bytes(f"{bucket}/parquet/train.parquet", (tars / "train.parquet").read_bytes())
    for there, here in {
        f"{bucket}/tars": tars,
        f"{bucket}/tars/{{00000..00001}}.tar": tars,
        f"{bucket}/tars/0000": tars,
        f"{bucket}/tars/00001.tar": tars / "00001.tar",
        f"{bucket}/parquet": tars / "train.parquet",
    }.items():
        remote = find_splits(there, splits=("train",))["train"]
        local = find_splits(str(here), splits=("train",))["train"]
        assert [r.picture for r in remote.records] == [r.picture for r in local.records], there
        assert pictures_of(remote) == pictures_of(local)
    with pytest.raises(ValueError, match="no captions in a format that is known; it holds nothing"):
        find_splits(f"{bucket}/nowhere")
