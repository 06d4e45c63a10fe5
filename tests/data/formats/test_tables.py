"""Tables of captions, each in the form in which its data set is handed out, with real pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import Photo, captions_of, pictures_of, reasons_of

from caption_ray.config import SourceConfig
from caption_ray.data.formats import find_splits
from caption_ray.data.locations import WebAddress
from caption_ray.data.sources import Split

TRAIN = ("train",)


def train(source: Path, **options: Any) -> Split:
    return find_splits(str(source), splits=TRAIN, options=SourceConfig(**options))["train"]


def put(folder: Path, photos: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / photo.name).write_bytes(photo.data)


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


# Flickr8k and Flickr30k -----------------------------------------------------------------------


def test_flickr8k_as_a_csv(photos: list[Photo], tmp_path: Path) -> None:
    put(tmp_path / "Images", photos)
    lines = [f"{photo.name},{quoted(text)}" for photo in photos for text in photo.captions]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    split = train(tmp_path)
    assert captions_of({"train": split})["train"] == {p.name: p.captions for p in photos}
    assert pictures_of(split) == [photo.data for photo in photos] and split.left_out == []


def write_flickr8k_text(folder: Path, photos: Sequence[Photo]) -> None:
    """Flickr8k_text as it was handed out: the token file, lemmata, ratings and lists."""
    (folder / "Flickr8k.token.txt").write_text(
        "".join(f"{p.name}#{i}\t{text}\n" for p in photos for i, text in enumerate(p.captions))
    )
    (folder / "Flickr8k.lemma.token.txt").write_text("".join(f"{p.name}#0\tdog\n" for p in photos))
    (folder / "ExpertAnnotations.txt").write_text(f"{photos[0].name}\t{photos[1].name}#2\t1\t1\n")
    (folder / "readme.txt").write_text("Flickr8k.token.txt - the raw captions of the test images\n")
    for name, part in (("train", photos[:6]), ("dev", photos[6:8]), ("test", photos[8:10])):
        names = "".join(f"{photo.name}\n" for photo in part)
        (folder / f"Flickr_8k.{name}Images.txt").write_text(names)


@pytest.mark.parametrize("is_zipped", [False, True])
def test_flickr8k_as_it_was_handed_out(
    photos: list[Photo], tmp_path: Path, is_zipped: bool
) -> None:
    write_flickr8k_text(tmp_path, photos)
    put(tmp_path / "Flicker8k_Dataset", photos)
    if is_zipped:
        archive = str(tmp_path / "Flickr8k_Dataset")
        shutil.make_archive(archive, "zip", tmp_path, "Flicker8k_Dataset")
        shutil.rmtree(tmp_path / "Flicker8k_Dataset")
    found = find_splits(str(tmp_path))
    assert captions_of(found) == {
        "train": {p.name: p.captions for p in photos[:6]},
        "val": {p.name: p.captions for p in photos[6:8]},
        "test": {p.name: p.captions for p in photos[8:10]},
    }
    for split, part in (("train", photos[:6]), ("val", photos[6:8]), ("test", photos[8:10])):
        assert pictures_of(found[split]) == [photo.data for photo in part]
    assert reasons_of(found["train"]) == {"picture that nothing puts in a split": 10}, "2 x 5 rows"


def test_flickr30k_with_its_row_that_lacks_a_separator(photos: list[Photo], tmp_path: Path) -> None:
    put(tmp_path / "flickr30k_images", photos)
    lines = ["image_name| comment_number| comment"]
    for photo in photos:
        lines += [f"{photo.name}| {i}|  {text}" for i, text in enumerate(photo.captions)]
    lines.append(f"{photos[0].name}| 4   A dog runs across the grass .")
    lines.append(f'{photos[1].name}| 5| A " dog')
    (tmp_path / "results.csv").write_text("\n".join(lines))
    split = train(tmp_path)
    expected = {photo.name: list(photo.captions) for photo in photos}
    expected[photos[1].name].append('A " dog')
    assert captions_of({"train": split})["train"] == expected
    assert reasons_of(split) == {"row with another number of cells": 1}
    assert pictures_of(split) == [photo.data for photo in photos]


# Addresses ------------------------------------------------------------------------------------


def test_conceptual_captions_are_addresses(tmp_path: Path) -> None:
    for name, texts in {
        "Train_GCC-training.tsv": ['a " very typical bus', "it's a dog", "..."],
        "Validation_GCC-1.1.0-Validation.tsv": ["author : a life in photography"],
    }.items():
        lines = [f"{text}\thttp://e.org/{name[0]}{i}.jpg" for i, text in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = find_splits(str(tmp_path), options=SourceConfig(hosts=("10.0.0.5",)))
    assert captions_of(found) == {
        "train": {
            "http://e.org/T0.jpg": ['a " very typical bus'],
            "http://e.org/T1.jpg": ["it's a dog"],
        },
        "val": {"http://e.org/V0.jpg": ["author : a life in photography"]},
    }
    assert reasons_of(found["train"]) == {"caption without a word": 1, "no captions": 1}
    assert found["train"].records[0].location == WebAddress("http://e.org/T0.jpg", ("10.0.0.5",))


# Any other table ------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with four files called a.jpg to d.jpg."""
    (tmp_path / "pictures").mkdir()
    for name in "abcd":
        (tmp_path / "pictures" / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("any.csv", 'file_name,caption\na.jpg,"one, two"\nb.jpg,b\n'),
        ("any.csv", '\ufefffile_name,caption\r\na.jpg,"one, two"\r\nb.jpg,b\r\n'),
        ("any.csv", ' Filename ; Caption \na.jpg;one, two\nb.jpg;b'),
        ("any.csv", ',image_path,title,text\n0,a.jpg,x,"one, two"\n1,b.jpg,y,b\n'),
        ("any.tsv", "image\tcaption\na.jpg\tone, two\nb.jpg\tb\n"),
        ("any.tsv", 'image\tcaption\na.jpg\t"one, two"\nb.jpg\tb\n'),
        ("any.jsonl", '{"image": "a.jpg", "caption": "one, two"}\n\n{"image": "b.jpg", '
         '"caption": ["b"]}\n'),
        ("captions.txt", "image,caption\na.jpg,\"one, two\"\nb.jpg,b\n"),
        ("any.csv", 'image,raw\na.jpg,"[""one, two""]"\nb.jpg,"[""b""]"\n'),
    ],
)  # fmt: skip
def test_tables_of_many_kinds_say_the_same(pictures: Path, name: str, content: str) -> None:
    (pictures / name).write_text(content, newline="")
    split = train(pictures)
    assert [record.picture.captions for record in split.records] == [["one, two"], ["b"]]
    assert pictures_of(split) == [b"a", b"b"] and split.left_out == []


def test_a_table_of_parquet(pictures: Path) -> None:
    table = pa.table({"filename": ["a.jpg", "b.jpg"], "captions": [["a", "aa"], ["b"]]})
    pq.write_table(table, pictures / "any.parquet")
    split = train(pictures)
    assert [record.picture.captions for record in split.records] == [["a", "aa"], ["b"]]
    assert pictures_of(split) == [b"a", b"b"]


def test_a_line_end_in_quotes_is_part_of_the_caption(pictures: Path) -> None:
    (pictures / "any.csv").write_text('image,caption\na.jpg,"one\ntwo, ""three"""\nb.jpg,b\n')
    assert [r.picture.captions for r in train(pictures).records] == [['one\ntwo, "three"'], ["b"]]


def test_a_caption_of_a_tsv_that_begins_with_a_quote_swallows_nothing(pictures: Path) -> None:
    (pictures / "any.tsv").write_text('image\tcaption\na.jpg\t"one\nb.jpg\tb\nc.jpg\t"two" three\n')
    captions = [r.picture.captions for r in train(pictures).records]
    assert captions == [['"one'], ["b"], ['"two" three']]


def test_what_concerns_one_row_is_left_out_and_counted(pictures: Path) -> None:
    rows = ["a.jpg,a dog", "a.jpg,a dog", "a.jpg,two dogs", "b.jpg,...", "c.jpg,c,d", "gone.jpg,x",
            ",a cat", "", "d.jpg,", "./d.jpg,d"]  # fmt: skip
    (pictures / "any.csv").write_text("\n".join(["image,caption", *rows]))
    split = train(pictures)
    assert captions_of({"train": split})["train"] == {
        "a.jpg": ["a dog", "two dogs"], "gone.jpg": ["x"], "d.jpg": ["d"]
    }  # fmt: skip
    assert pictures_of(split) == [b"a", "missing", b"d"]
    assert reasons_of(split) == {
        "no captions": 1,
        "caption listed again": 1,
        "caption without a word": 2,
        "row with another number of cells": 1,
        "captions but no picture": 1,
    }


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "..\\a.jpg", "a\0.jpg", "x" * 300])
def test_a_name_that_leads_out_of_the_pictures_refuses_the_table(pictures: Path, name: str) -> None:
    (pictures / "any.jsonl").write_text(json.dumps({"image": name, "caption": "a"}))
    with pytest.raises(ValueError, match=r"any\.jsonl: line 1: .* is no path below the pictures"):
        train(pictures)


REFUSED = [
    ("image,words\na.jpg,a\n", {}, r"any\.csv has the columns image, words: name the one with"),
    ("photo,caption\na.jpg,a\n", {}, r"any\.csv has the columns photo, caption: name the one"),
    ("a.jpg,a dog\n", {}, r"any\.csv has the columns a\.jpg, a dog"),
    ("image\na.jpg\n", {}, r"any\.csv has no header with the names of its columns"),
    ("", {}, r"any\.csv has no header"),
    ("image,caption\n", {}, r"split 'train' has no picture with a caption \(no rows\)"),
    ("image,caption\na.jpg,a\n", {"caption_column": ("text",)},
     r"--caption-column text: any\.csv has the columns image, caption; name one of them"),
    ('image,caption\na.jpg,"a\nb.jpg,b\n', {}, r"any\.csv: line 3: no CSV \(unexpected end"),
    ('image,caption\na.jpg,"a "dog" b"\n', {}, r"any\.csv: line 2: no CSV"),
    ("image,caption\nz.jpg,a dog\n", {}, r"no pictures: looked for .*z\.jpg in .* it holds"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "message"), REFUSED)
def test_a_table_that_cannot_be_meant_is_refused(
    pictures: Path, content: str, options: Any, message: str
) -> None:
    (pictures / "any.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        train(pictures, **options)


def test_text_in_another_encoding_is_named(pictures: Path) -> None:
    (pictures / "any.csv").write_bytes("image,caption\na.jpg,ein Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"any\.csv: not UTF-8 text .* iconv -t UTF-8"):
        train(pictures)


def test_columns_of_any_name_can_be_given(pictures: Path) -> None:
    (pictures / "any.csv").write_text("photo,en,de,fold\na.jpg,a,ä dog,0\nb.jpg,b,b,Val\n")
    options = {"image_column": "photo", "caption_column": ("de",)}
    assert train(pictures, **options).records[0].picture.captions == ["ä dog"]
    (pictures / "any.csv").write_text("photo,en,de,fold\na.jpg,a,ä,train\nb.jpg,b,b,Val\n")
    given = SourceConfig(**options, split_column="fold")
    found = find_splits(str(pictures), options=given)
    assert captions_of(found) == {"train": {"a.jpg": ["ä"]}, "val": {"b.jpg": ["b"]}}


def test_one_table_for_each_split_and_a_file_alone(pictures: Path) -> None:
    for split, name in {"train": "a", "valid": "b", "test": "c"}.items():
        (pictures / f"{split}.csv").write_text(f"image,caption\n{name}.jpg,{name}\n")
    (pictures / "labels.csv").write_text("label,number\ndog,1\n")
    found = find_splits(str(pictures))
    assert captions_of(found) == {
        "train": {"a.jpg": ["a"]}, "val": {"b.jpg": ["b"]}, "test": {"c.jpg": ["c"]}
    }  # fmt: skip
    assert reasons_of(found["train"]) == {"table that is none of captions": 1}
    assert len(train(pictures / "train.csv").records) == 1


def test_a_picture_in_two_splits_is_kept_in_the_later_one(pictures: Path) -> None:
    for split, names in {"train": "abc", "val": "bd"}.items():
        rows = "".join(f"{name}.jpg,{name}\n" for name in names)
        (pictures / f"{split}.csv").write_text(f"image,caption\n{rows}")
    found = find_splits(str(pictures))
    assert {split: len(it.records) for split, it in found.items()} == {"train": 2, "val": 2}
    assert reasons_of(found["train"]) == {"picture that is in val as well": 1}
