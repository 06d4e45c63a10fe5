"""Splits for sources that have none: by what pictures show, and by nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from captioned import Photo, captions_of
from PIL import Image

from caption_ray.config import SourceConfig
from caption_ray.data.formats import find_splits
from caption_ray.data.locations import WebAddress

HALF = SourceConfig(split="val=0.3,test=0.2")


def write(folder: Path, photos: dict[str, bytes], rows: list[str] | None = None) -> str:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, data in photos.items():
        (folder / "pictures" / name).write_bytes(data)
    lines = [f"{name},a dog" for name in photos] + (rows or [])
    (folder / "any.csv").write_text("\n".join(["image,caption", *lines]))
    return str(folder)


def split_of(source: str, options: SourceConfig = HALF) -> dict[str, str]:
    found = captions_of(find_splits(source, options=options))
    return {name: split for split, names in found.items() for name in names}


@pytest.fixture(scope="module")
def many(coco_mini: Path) -> dict[str, bytes]:
    from captioned import pictures_of

    """Half of the photographs of the excerpt."""
    found = find_splits(str(coco_mini)).values()
    names = [record.picture.file_name for split in found for record in split.records]
    pictures = [picture for split in found for picture in pictures_of(split)]
    half = list(zip(names, pictures, strict=True))[::2]
    return {name: data for name, data in half if isinstance(data, bytes)}


def test_each_picture_is_in_one_split_and_shares_are_about_right(
    many: dict[str, bytes], tmp_path: Path
) -> None:
    splits = split_of(write(tmp_path, many))
    assert splits.keys() == many.keys()
    counts = [list(splits.values()).count(split) for split in ("train", "val", "test")]
    assert 28 <= counts[0] <= 52 and 12 <= counts[1] <= 36 and 6 <= counts[2] <= 26


def test_the_split_depends_on_the_picture_and_neither_on_its_name_nor_on_others(
    many: dict[str, bytes], tmp_path: Path
) -> None:
    before = split_of(write(tmp_path / "all", many))
    fewer = {f"x{name}": data for name, data in reversed(list(many.items())[::2])}
    after = split_of(write(tmp_path / "fewer", fewer))
    assert after == {f"x{name}": before[name] for name in list(many)[::2]}


def test_pictures_that_look_the_same_stay_together(many: dict[str, bytes], tmp_path: Path) -> None:
    twins: dict[str, bytes] = {}
    some = list(many.items())[::4]
    for number, (name, data) in enumerate(some):
        buffer = io.BytesIO()
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        Image.open(io.BytesIO(data)).convert("RGB").save(buffer, kind)
        twins |= {name: data, f"copy-{name}": data, f"anew-{name}": buffer.getvalue()}
    splits = split_of(write(tmp_path, twins))
    for name, _ in some:
        assert splits[name] == splits[f"copy-{name}"] == splits[f"anew-{name}"]
    assert set(splits.values()) == {"train", "val", "test"}


def test_what_cannot_be_read_and_what_is_on_the_web_has_a_split_too(
    many: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures on the web are known by their addresses: none is fetched for it."""
    monkeypatch.setattr(WebAddress, "read", lambda *_: 1 / 0)
    rows = ["gone.jpg,a dog", "http://example.org/a.jpg,a dog", "http://example.org/b.jpg,a cat"]
    source = write(tmp_path, {**many, "no-picture.jpg": b"text"}, rows)
    assert len(split_of(source)) == len(many) + 4


@pytest.mark.parametrize(
    "text", ["val", "val=x", "val=0", "val=1", "val=1.5", "train=0.1", "other=0.1", "val:0.1",
             "val=0.1,", "=0.1", "val=nan", "val=0.1,val=0.2"],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"--split .*: give shares between 0 and 1 as in val=0.02"):
        find_splits(str(tmp_path), options=SourceConfig(split=text))


def test_shares_of_more_than_there_is_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is left to train on"):
        find_splits(str(tmp_path), options=SourceConfig(split="val=0.6,test=0.5"))


def test_a_split_that_the_source_has_is_not_made(photos: list[Photo], tmp_path: Path) -> None:
    source = write(tmp_path, {photo.name: photo.data for photo in photos})
    for split, part in {"train": photos[:8], "val": photos[8:]}.items():
        rows = "\n".join(f"{photo.name},a dog" for photo in part)
        (tmp_path / f"{split}.csv").write_text(f"image,caption\n{rows}")
    (tmp_path / "any.csv").unlink()
    with pytest.raises(
        ValueError, match=r"--split val=0.3: .* has a split val of its own \(4 pict"
    ):
        find_splits(source, options=HALF)
    found = find_splits(source, options=SourceConfig(split="test=0.5"))
    assert len(found["train"].records) + len(found["test"].records) == 8
    assert len(found["val"].records) == 4


def test_coco_with_training_pictures_alone_gets_the_rest_by_shares(scenes: Path) -> None:
    with pytest.raises(ValueError, match="--split train=0.02|give shares"):
        find_splits(str(scenes), options=SourceConfig(split="train=0.5"))
    found = find_splits(
        str(scenes), splits=("train", "test"), options=SourceConfig(split="test=0.4")
    )
    assert list(found) == ["train", "test"]
    assert sum(len(split.records) for split in found.values()) == 40
