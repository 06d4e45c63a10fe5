"""A format that the project does not know: its function and one line are all that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import shards
from caption_ray.data.dataset import open_source
from caption_ray.data.formats import FORMATS, Format, find_splits
from caption_ray.data.formats.source import Source
from caption_ray.data.locations import File
from caption_ray.data.rows import to_row
from caption_ray.data.sources import Picture, Record, Split

CAPTIONS = {
    "train": "red.png\tA red picture.\nblue.png\tA blue picture.\nred.png\tAll is red.\n",
    "val": "green.png\tA green picture.\n",
}


def find_mine(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """`<split>.mine`, each line a picture's name and one of its captions, beside the pictures."""
    found = {}
    for split in ("train", "val"):
        listed = storage.join(source.uri, f"{split}.mine")
        if not storage.exists(listed):
            return None
        captions: dict[str, list[str]] = {}
        for line in storage.read_text(listed).splitlines():
            name, _, caption = line.partition("\t")
            captions.setdefault(name, []).append(caption)
        records = [
            Record(
                Picture(number, name, 0, 0, captions[name], []),
                File(storage.join(source.uri, name)),
            )
            for number, name in enumerate(sorted(captions))
        ]
        found[split] = Split(records, left_out=[])
    return found


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "mine", Format(find_mine, "train.mine and val.mine"))  # the line


@pytest.fixture
def source(tmp_path: Path) -> str:
    for split, lines in CAPTIONS.items():
        (tmp_path / f"{split}.mine").write_text(lines)
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


def test_a_source_in_no_known_format_says_what_is_there_and_what_each_needs(source: str) -> None:
    Path(source, "val.mine").unlink()
    with pytest.raises(ValueError) as caught:
        find_splits(source)
    said = str(caught.value)
    assert "it holds blue.png, green.png, red.png, train.mine" in said
    for name in FORMATS:
        assert f"\n  {name}: " in said
    assert said.endswith("mine: train.mine and val.mine")


def test_a_format_may_be_named_and_must_be_one(source: str, scenes: Path) -> None:
    assert find_splits(source, options=SourceConfig(format="mine")).keys() == {"train", "val"}
    with pytest.raises(ValueError, match=r"--format yours: give one of coco, .*, mine"):
        find_splits(source, options=SourceConfig(format="yours"))
    with pytest.raises(ValueError, match=r"Needed is one of\n  coco: captions_train.json"):
        find_splits(source, options=SourceConfig(format="coco"))
