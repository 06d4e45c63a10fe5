"""imagefolder: read as Hugging Face's own library reads it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import Photo, captions_of, pictures_of, reasons_of

from caption_ray.config import SourceConfig
from caption_ray.data.formats import find_splits
from caption_ray.data.sources import Split

TRAIN = ("train",)


def write(folder: Path, photos: Sequence[Photo], kind: str, inner: str = "") -> None:
    """Pictures in `folder`/`inner`, and metadata of this kind, a row a picture, in `folder`."""
    (folder / inner).mkdir(parents=True, exist_ok=True)
    rows = []
    for photo in photos:
        (folder / inner / photo.name).write_bytes(photo.data)
        rows.append({"file_name": f"{inner}{photo.name}", "text": photo.captions[0]})
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def train(source: Path, **options: Any) -> Split:
    return find_splits(str(source), splits=TRAIN, options=SourceConfig(**options))["train"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_it_is_read_as_hugging_face_reads_it(
    photos: list[Photo], tmp_path: Path, kind: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="the format's own reader")
    source = tmp_path / "source"
    for split, part in {
        "train": photos[:7],
        "validation": photos[7:10],
        "test": photos[10:],
    }.items():
        write(source / split, part, kind)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(source), cache_dir=str(tmp_path / "cache")
    )
    found = find_splits(str(source))
    for split, split_there in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = theirs[split_there].cast_column("image", datasets.Image(decode=False))
        their_pictures = {
            row["text"]: row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
            for row in rows
        }
        ours = dict(zip(
            (record.picture.captions[0] for record in found[split].records),
            pictures_of(found[split]), strict=True,
        ))  # fmt: skip
        assert ours == their_pictures
        assert found[split].left_out == []


def test_a_picture_may_have_several_rows_or_a_list(photos: list[Photo], tmp_path: Path) -> None:
    write(tmp_path / "train", photos[:2], "jsonl")
    rows = [
        {"file_name": photo.name, "text": text} for photo in photos[:2] for text in photo.captions
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert captions_of({"train": train(tmp_path)})["train"] == {
        f"train/{photo.name}": photo.captions for photo in photos[:2]
    }
    rows = [{"file_name": photo.name, "captions": photo.captions} for photo in photos[:2]]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r.picture.captions for r in train(tmp_path).records] == [p.captions for p in photos[:2]]


def test_one_table_above_the_folders_says_by_paths_what_belongs_where(
    photos: list[Photo], tmp_path: Path
) -> None:
    write(tmp_path, photos[:3], "jsonl", "train/")
    first = (tmp_path / "metadata.jsonl").read_text()
    write(tmp_path, photos[3:5], "jsonl", "val/deeper/")
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(first)
    found = find_splits(str(tmp_path))
    assert {split: len(it.records) for split, it in found.items()} == {"train": 3, "val": 2}
    assert pictures_of(found["val"]) == [photo.data for photo in photos[3:5]]


def test_a_missing_picture_is_missing_when_read(photos: list[Photo], tmp_path: Path) -> None:
    write(tmp_path / "train", photos, "csv")
    (tmp_path / "train" / photos[3].name).unlink()
    expected: list[bytes | str] = [photo.data for photo in photos]
    expected[3] = "missing"
    assert pictures_of(train(tmp_path)) == expected


def test_hostile_rows(photos: list[Photo], tmp_path: Path) -> None:
    write(tmp_path / "train", photos[:3], "jsonl")
    path = tmp_path / "train" / "metadata.jsonl"
    rows: list[Any] = [
        {"file_name": photos[0].name, "text": None},
        {"file_name": None, "text": "a dog"},
        ["no", "object"],
        {"text": "a dog"},
        {"file_name": photos[1].name, "text": "\ud800"},
        {"file_name": photos[2].name, "text": "a dog"},
    ]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in rows))
    split = train(tmp_path)
    assert captions_of({"train": split})["train"] == {f"train/{photos[2].name}": ["a dog"]}
    assert reasons_of(split) == {
        "no captions": 2,
        "caption that is no text": 2,
        "captions but no picture": 2,
        "row with another number of cells": 1,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"file_name": "../a.jpg", "text": "a"},
            r"line 1: '\.\./a\.jpg' is no path below the p",
        ),
        ({"name": "a.jpg", "text": "a"}, r"metadata\.jsonl has no column file_name: name, text"),
        ({"file_name": "a.jpg", "words": "a"}, r"metadata\.jsonl has the columns file_name, words"),
        ({"file_name": "z.jpg", "text": "a"}, r"no pictures: looked for"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(
    tmp_path: Path, row: dict[str, str], message: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        train(tmp_path)
