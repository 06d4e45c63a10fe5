"""A layout of pictures and captions that is not COCO's: its function and one line are all that it
needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from caption_ray import storage
from caption_ray.data import coco, shards
from caption_ray.data.dataset import open_source
from caption_ray.data.rows import to_row
from caption_ray.data.sources import LAYOUTS, Location, Record, Split, find_splits

CAPTIONS = {
    "train": "red.png\tA red picture.\nblue.png\tA blue picture.\nred.png\tAll is red.\n",
    "val": "green.png\tA green picture.\n",
}


def find_tsv(source: str, split: str) -> Split | None:
    """`<split>.tsv`, each line a picture's name and one of its captions, beside the pictures."""
    listed = storage.join(source, f"{split}.tsv")
    if not storage.exists(listed):
        return None
    captions: dict[str, list[str]] = {}
    for line in storage.read_text(listed).splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name, []).append(caption)
    records = [
        Record(
            coco.CocoImage(number, name, 0, 0, captions[name], []),
            Location(storage.join(source, name)),
        )
        for number, name in enumerate(sorted(captions))
    ]
    return Split(records, left_out=[])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "tsv", find_tsv)  # the line


@pytest.fixture
def source(tmp_path: Path) -> str:
    for split, lines in CAPTIONS.items():
        (tmp_path / f"{split}.tsv").write_text(lines)
    for name in ("red", "green", "blue"):
        Image.new("RGB", (48, 32), name).save(tmp_path / f"{name}.png")
    return str(tmp_path)


def test_its_pictures_become_rows_of_a_shard(source: str) -> None:
    """As each of ingest's tasks makes them."""
    records = find_splits(source)["train"].records
    data = shards.to_bytes([to_row(record, image_size=16) for record in records])
    blue, red = shards.from_bytes(data).to_pylist()
    assert red["captions"] == ["A red picture.", "All is red."] and red["error"] is None
    assert (blue["file_name"], blue["captions"]) == ("blue.png", ["A blue picture."])
    assert blue["image"].startswith(b"\xff\xd8"), "shrunk, and a JPEG from there on"


def test_it_is_streamed_without_ingest(source: str) -> None:
    dataset = open_source(source, seed=0)
    assert dataset.word_counts == {"a": 2, "red": 2, "picture": 2, "blue": 1, "all": 1, "is": 1}
    (unit,) = dataset.splits["val"]
    (green,) = unit.read()
    assert green["captions"] == ["A green picture."] and green["error"] is None


def test_other_sources_are_read_as_before(scenes: Path) -> None:
    assert len(find_splits(str(scenes))["val"].records) == 12


def test_what_is_missing_is_said_as_before(source: str) -> None:
    Path(source, "val.tsv").unlink()
    with pytest.raises(ValueError, match=r"no captions for split 'val'.*captions_val2017"):
        find_splits(source)
