"""Parquet files of the Hugging Face Hub: written and read back by Hugging Face's own library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import Photo, captions_of, pictures_of, reasons_of

from caption_ray.config import SourceConfig
from caption_ray.data import locations
from caption_ray.data.formats import find_splits
from caption_ray.data.order import shuffled
from caption_ray.data.rows import to_rows
from caption_ray.data.sources import Split

TRAIN = ("train",)


def train(source: Path, **options: Any) -> Split:
    return find_splits(str(source), splits=TRAIN, options=SourceConfig(**options))["train"]


def as_hub(photos: Sequence[Photo], path: Path, captions: Any, rows: int = 5) -> Any:
    """A file that Hugging Face datasets writes, in row groups of so many rows; and its data set."""
    datasets = pytest.importorskip("datasets", reason="the format's own writer")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": photo.data, "path": photo.name} for photo in photos]
    columns = {"image": pictures, **captions}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    dataset.to_parquet(str(path), batch_size=rows)
    return dataset


def table(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_what_hugging_face_writes_is_read_as_hugging_face_reads_it(
    photos: list[Photo], tmp_path: Path
) -> None:
    for split, part in {
        "train": photos[:7],
        "validation": photos[7:10],
        "test": photos[10:],
    }.items():
        captions = {"captions": [photo.captions for photo in part]}
        as_hub(part, tmp_path / "data" / f"{split}-00000-of-00001.parquet", captions)
    found = find_splits(str(tmp_path))
    datasets = pytest.importorskip("datasets")
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    for split, split_there in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = theirs[split_there].cast_column("image", datasets.Image(decode=False))
        assert pictures_of(found[split]) == [row["image"]["bytes"] for row in rows]
        assert captions_of(found)[split] == {row["image"]["path"]: row["captions"] for row in rows}
        assert found[split].left_out == []


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"caption": ["a", "b"], "text": ["no", "no"]}, {}, [["a"], ["b"]]),
        ({"Text": ["a", "b"]}, {}, [["a"], ["b"]]),
        ({"raw": [["a", "aa"], ["b"]]}, {}, [["a", "aa"], ["b"]]),
        ({"sentences": [[{"raw": "a", "imgid": 1}, {"raw": "aa", "imgid": 1}],
                        [{"raw": "b", "imgid": 2}]]}, {}, [["a", "aa"], ["b"]]),
        ({"sentences": [{"raw": "a", "tokens": ["a"]}, {"raw": "b", "tokens": ["b"]}]}, {},
         [["a"], ["b"]]),
        ({"said": [{"en": "a"}, {"en": "b"}]}, {"caption_column": ("said.en",)}, [["a"], ["b"]]),
        ({"caption_0": ["a", "b"], "caption_1": ["aa", "bb"]}, {}, [["a", "aa"], ["b", "bb"]]),
        ({"x": ["a", "b"], "y": ["aa", "bb"]}, {"caption_column": ("y", "x")},
         [["aa", "a"], ["bb", "b"]]),
    ],
)  # fmt: skip
def test_captions_may_be_texts_lists_and_structs(
    tmp_path: Path, columns: Any, options: Any, expected: list[list[str]]
) -> None:
    table(tmp_path / "a.parquet", picture=[b"A", b"B"], **columns)
    split = train(tmp_path, **options)
    assert [record.picture.captions for record in split.records] == expected
    assert pictures_of(split) == [b"A", b"B"]
    assert [record.picture.file_name for record in split.records] == ["a-0", "a-1"]


def test_nulls_are_left_out_and_counted(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array(
        [{"bytes": b"A", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None,
         {"bytes": b"D", "path": None}, {"bytes": b"E", "path": "e.jpg"}], kind
    )  # fmt: skip
    table(tmp_path / "a.parquet", image=pictures, caption=["a", "b", "c", None, "..."])
    split = train(tmp_path)
    assert [record.picture.file_name for record in split.records] == ["a.jpg", "b.jpg", "a-2"]
    assert pictures_of(split) == [b"A", *["missing: null in the table"] * 2]
    assert reasons_of(split) == {
        "no captions": 2, "caption that is no text": 1, "caption without a word": 1
    }  # fmt: skip


def test_a_row_group_is_read_once_by_a_task_that_has_many_of_its_rows(
    photos: list[Photo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [photos[i % 12] for i in range(96)]
    captions = {"caption": [f"a dog {i}" for i in range(96)]}
    as_hub(many, tmp_path / "train.parquet", captions, rows=8)
    records = shuffled(train(tmp_path).records, seed=0, together=24)
    read: list[int] = []
    real = locations.Block.read
    monkeypatch.setattr(
        locations.Block, "read", lambda block: read.append(block.row_group) or real(block)
    )
    numbers = set()
    for start in range(0, 96, 24):
        read.clear()
        rows = to_rows(records[start : start + 24], None)
        for record, row in zip(records[start : start + 24], rows, strict=True):
            assert row["captions"] == record.picture.captions and row["error"] is None
            number = int(row["captions"][0].split()[-1])
            assert row["image"] == many[number].data
            numbers.add(number)
        assert len(read) == len(set(read)) <= 8, "of 12 row groups; those of two windows"
    assert numbers == set(range(96))


def test_a_split_column_beats_the_file_name(tmp_path: Path) -> None:
    """As in nlphuji/flickr30k, where all is in files called test."""
    table(
        tmp_path / "data" / "TEST-00000-of-00001.parquet",
        image=[b"A", b"B", b"C", b"D"],
        caption=[["a"], ["b"], ["c"], ["d"]],
        split=["train", "val", "test", "restval"],
    )
    found = find_splits(str(tmp_path))
    assert {split: len(it.records) for split, it in found.items()} == {
        "train": 2, "val": 1, "test": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [b"A"], "words": ["a"]}, {},
         r"a\.parquet has the columns words: name the one with captions with --caption-column"),
        ({"words": ["a"]}, {}, r"parquet: .*\(a\.parquet has no column of encoded pictures, but w"),
        ({"left": [b"A"], "right": [b"B"], "caption": ["a"]}, {},
         r"columns left, right: name the one with pictures with --image-column"),
        ({"image": [b"A"], "caption": ["a"]}, {"image_column": "picture"},
         r"--image-column picture: a\.parquet has the columns image, caption; name one of them"),
        ({"image": [b"A"], "caption": ["a"]}, {"image_column": "caption", "format": "parquet"},
         r"--image-column caption is string, not bytes"),
        ({"image": [b"A"], "caption": ["a"]}, {"caption_column": ("text",)},
         r"--caption-column text: a\.parquet has the columns caption; name one of them"),
        ({"image": [b"A"], "caption": ["a"]}, {"split_column": "fold"},
         r"--split-column fold: a\.parquet has the columns caption; name one of them"),
        ({"image": [b"A"], "caption": [None]}, {},
         r"split 'train' has no picture with a caption \(a-0: no captions"),
        ({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, {},
         r"split 'train' has no picture with a caption \(no rows\)"),
    ],
)  # fmt: skip
def test_wrong_columns_are_named_with_the_remedy(
    tmp_path: Path, columns: Any, options: Any, message: str
) -> None:
    table(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


def test_one_empty_file_among_others_does_no_harm(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", image=[b"A"], caption=["a"])
    table(tmp_path / "train-1.parquet", image=pa.array([], pa.binary()),
          caption=pa.array([], pa.string()))  # fmt: skip
    assert len(train(tmp_path).records) == 1


def test_a_test_split_whose_captions_are_withheld_is_as_good_as_not_there(tmp_path: Path) -> None:
    for split, caption in {"train": "a", "val": "b", "test": None}.items():
        column = pa.array([caption], pa.string())
        table(tmp_path / f"{split}.parquet", image=[b"A"], caption=column)
    found = find_splits(str(tmp_path))
    assert found["test"].records == [] and reasons_of(found["test"])["no captions"] == 1
    with pytest.raises(ValueError, match="split 'test' has no picture with a caption"):
        find_splits(str(tmp_path), splits=("train", "val", "test"))


def test_two_data_sets_side_by_side_are_not_mixed(tmp_path: Path) -> None:
    for language in ("en", "de"):
        table(tmp_path / language / "train" / "0.parquet", image=[b"A"], caption=["a"])
    with pytest.raises(ValueError, match=r"several folders .* \('de', 'en'\).* as --source"):
        train(tmp_path)
    assert len(train(tmp_path / "de").records) == 1


def test_a_broken_file_is_refused_by_its_name(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", image=[b"A" * 5000], caption=["a"])
    data = (tmp_path / "a.parquet").read_bytes()
    for part in (data[: len(data) // 2], b"", b"PAR1", b"x" * 100):
        (tmp_path / "a.parquet").write_bytes(part)
        with pytest.raises(ValueError, match=r"a\.parquet: a broken Parquet file"):
            train(tmp_path)


def test_a_damaged_row_group_costs_its_own_pictures_only(tmp_path: Path) -> None:
    pictures = pa.table({"image": [bytes([i]) * 5000 for i in range(4)], "caption": list("abcd")})
    pq.write_table(pictures, tmp_path / "a.parquet", row_group_size=2, compression="gzip")
    split = train(tmp_path)
    place = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    data[start + 30 : start + 60] = bytes(30)
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    rows = to_rows(split.records, None)
    assert ["corrupt: row group 1" in str(row["error"]) for row in rows] == [False] * 2 + [True] * 2
