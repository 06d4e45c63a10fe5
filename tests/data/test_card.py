"""The data card: its figures are those of the shards, and its page needs nothing beside it."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption_ray import storage
from caption_ray.data import card, card_page
from caption_ray.data import shards as format
from caption_ray.data.dataset import read_index
from caption_ray.data.ingest import ingest
from caption_ray.data.ptb import tokenize
from caption_ray.data.shards import Index, LeftOut


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A pattern of its own for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def row(name: str, data: bytes, *captions: str) -> dict[str, Any]:
    return {"file_name": name, "image": data, "captions": captions, "width": 0, "height": 0}


def made(**splits: list[dict[str, Any]]) -> dict[str, Any]:
    surveys = {name: card.survey(rows, storage.checksum, 9) for name, rows in splits.items()}
    return card.card(Index("here", "f", None, 0, {}, {"a": 6, "dog": 3, "cat": 1}), surveys)


def test_duplicates_are_found_and_those_across_splits_come_first() -> None:
    found = made(
        train=[row("a", picture(1), "a"), row("b", picture(2), "b"), row("c", picture(2), "c"),
               row("d", picture(3), "d")],
        val=[row("e", picture(3, "PNG"), "e"), row("f", picture(5), "f")],
    )["duplicates"]  # fmt: skip
    assert found == {
        "groups": 2, "pictures": 4, "groups_across_splits": 1,
        "first": [["train: d", "val: e"], ["train: b", "train: c"]],
    }  # fmt: skip


def test_the_vocabulary_has_a_curve() -> None:
    found = made(train=[row("a", picture(1), "a dog")])["vocabulary"]
    assert (found["words"], found["text"], found["most_frequent"]) == (3, 10, ["a", "dog", "cat"])
    assert list(found["words_that_stand_at_least"].values()) == [3, 2, 2, 1, 0, 0, 0, 0]
    assert found["share_of_the_text_by_words"] == {"3": 1.0}


def test_left_out_entries_are_counted_by_reason() -> None:
    left_out = [LeftOut("train", "1", "missing"), LeftOut("train", "2", "missing", 4)]
    index = Index("here", "f", None, 0, {}, {}, left_out)
    assert card.card(index, {})["left_out"] == [
        {"split": "train", "reason": "missing", "entries": 5, "first": "1"}
    ]


def test_what_people_wrote_is_text_on_the_page() -> None:
    evil = '<script>alert("a dog")</script>'
    rows = [row(evil, picture(1), evil, evil)]
    found = made(train=rows)
    samples = card.survey(rows, storage.checksum, 9).sample
    page = card_page.page({**found, "source": evil}, {"train": samples})
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


def test_a_page_of_odd_lengths_and_of_nothing() -> None:
    found = made(train=[row("a", picture(1), "a " * 300, "a")])
    assert "or more" in card_page.page(found, {})
    assert "None." in card_page.page(found, {}) and "Nothing." in card_page.page(found, {})


@pytest.mark.usefixtures("local_ray")
def test_ingest_leaves_a_card_of_what_it_wrote(shards: str, scenes: Path, tmp_path: Path) -> None:
    figures = json.loads(Path(shards, "card.json").read_text())
    index = read_index(shards)
    for split in ("train", "val"):
        rows = [
            row
            for shard in index.shards(split)
            for row in format.from_bytes(Path(shards, shard.file).read_bytes()).to_pylist()
        ]
        lengths = Counter(len(tokenize(text)) for row in rows for text in row["captions"])
        there = figures["splits"][split]
        assert (there["pictures"], there["captions"]) == (len(rows), 5 * len(rows))
        assert there["words_per_caption"]["captions"] == {
            str(words): lengths[words] for words in sorted(lengths)
        }
        assert there["bytes"] == sum(len(row["image"]) for row in rows)
        assert there["kinds"] == {"JPEG": len(rows)}
        assert there["shorter_side"]["most"] == 128 or there["shorter_side"]["least"] > 0
    page = Path(shards, "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * card.SAMPLE
    assert not re.search(r'(src|href)=(?!"data:)', page), "nothing beside it, nor from afar"

    # an ingest of an earlier version has none: the next one makes the same
    before = {name: Path(shards, name).read_bytes() for name in ("card.json", "index.html")}
    settings = {"image_size": None, "images_per_shard": 15, "seed": 0, "progress": False}
    ingest(str(scenes), str(tmp_path), splits=("train", "val"), **settings)
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    assert ingest(str(scenes), str(tmp_path), splits=("train", "val"), **settings) == index
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content


def test_surveys_of_parts_add_up() -> None:
    rows = [row(str(i), picture(i), "a dog", "a " * i + "cat") for i in range(1, 6)]
    whole = card.survey(rows, storage.checksum, 0)
    parts = card.Survey()
    for one in rows:
        parts.add(card.survey([one], storage.checksum, 0))
    assert dataclasses.asdict(parts) == dataclasses.asdict(whole)
