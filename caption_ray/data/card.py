"""The data card: what is in a data set, in figures. Pure functions of the rows of its shards.

`ingest.py` has each shard surveyed by a task of its own, puts the surveys together, and writes
`card.json` beside the index; `card_page.py` shows it to people.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caption_ray.data import likeness, transforms
from caption_ray.data.shards import Index
from caption_ray.data.tokenizer import PTB

CARD_FILE, PAGE_FILE = "card.json", "index.html"
"""Names of the card beside the index: for programs, and for people."""

SAMPLE = 12
"""Pictures of each split that the card shows, the first of its shuffled shards."""

THUMBNAIL_SIDE = 240
"""Pixels of their longer side."""

AT_LEAST = (1, 2, 3, 5, 10, 20, 50, 100)
"""Counts from which on words are kept, for the curve of the vocabulary."""

LARGEST = (100, 300, 1_000, 3_000, 10_000, 30_000)
"""Sizes of vocabularies of the most frequent words, for their share of the text."""

SHOWN = 20
"""Groups of duplicates that the card names."""


@dataclass(frozen=True)
class Sample:
    """A picture that the card shows."""

    file_name: str
    captions: list[str]
    thumbnail: bytes


@dataclass
class Survey:
    """What is known of some rows of one split; surveys of parts add up."""

    files: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    fingerprints: list[int | None] = field(default_factory=list)
    """See `likeness.fingerprint`."""
    captions: Counter[int] = field(default_factory=Counter)
    """How many pictures have so many captions."""
    words: Counter[int] = field(default_factory=Counter)
    """How many captions have so many words, by the tokenizer `ptb`."""
    sides: Counter[int] = field(default_factory=Counter)
    """How many pictures have a shorter side of so many pixels, originally if that is known."""
    kinds: Counter[str] = field(default_factory=Counter)
    """How many pictures are of a file format."""
    image_bytes: int = 0
    sample: list[Sample] = field(default_factory=list)

    def add(self, other: Survey) -> None:
        self.files += other.files
        self.digests += other.digests
        self.fingerprints += other.fingerprints
        self.captions.update(other.captions)
        self.words.update(other.words)
        self.sides.update(other.sides)
        self.kinds.update(other.kinds)
        self.image_bytes += other.image_bytes
        self.sample += other.sample


def survey(
    rows: Iterable[Mapping[str, Any]], digest: Callable[[bytes], str], sample: int
) -> Survey:
    """What is in these rows of a shard, and so many of its pictures; `digest` tells the bytes of
    one picture from others."""
    found = Survey()
    for row in rows:
        data = row["image"]
        found.files.append(row["file_name"])
        found.digests.append(digest(data))
        found.fingerprints.append(likeness.fingerprint(data))
        found.captions[len(row["captions"])] += 1
        found.words.update(len(PTB(caption)) for caption in row["captions"])
        size = (row["width"], row["height"])
        found.sides[min(size if all(size) else transforms.image_size(data))] += 1
        found.kinds[transforms.format_of(data)] += 1
        found.image_bytes += len(data)
        if len(found.sample) < sample:
            small = transforms.thumbnail(data, THUMBNAIL_SIDE)
            found.sample.append(Sample(row["file_name"], list(row["captions"]), small))
    return found


def card(index: Index, surveys: Mapping[str, Survey]) -> dict[str, Any]:
    """The figures of a data set: plain values, the same for the same shards."""
    return {
        "source": index.source,
        "fingerprint": index.fingerprint,
        "image_size": index.image_size,
        "splits": {split: _split(one) for split, one in surveys.items()},
        "vocabulary": _vocabulary(index.word_counts),
        "left_out": _left_out(index),
        "duplicates": _duplicates(surveys),
    }


def _split(one: Survey) -> dict[str, Any]:
    return {
        "pictures": len(one.files),
        "captions": sum(one.words.values()),
        "captions_per_picture": _by_number(one.captions),
        "words_per_caption": {**_spread(one.words), "captions": _by_number(one.words)},
        "shorter_side": _spread(one.sides),
        "kinds": dict(sorted(one.kinds.items())),
        "bytes": one.image_bytes,
    }


def _by_number(counts: Counter[int]) -> dict[str, int]:
    return {str(number): counts[number] for number in sorted(counts)}


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Smallest, middle and largest of the numbers, and their mean."""
    numbers = sorted(counts.elements())
    return {
        "least": numbers[0],
        "median": statistics.median(numbers),
        "mean": round(statistics.fmean(numbers), 2),
        "most": numbers[-1],
    }


def _vocabulary(counts: Mapping[str, int]) -> dict[str, Any]:
    """Of the training captions."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    return {
        "words": len(ranked),
        "text": total,
        "most_frequent": [word for word, _ in ranked[:50]],
        "words_that_stand_at_least": {
            str(least): sum(count >= least for count in counts.values()) for least in AT_LEAST
        },
        "share_of_the_text_by_words": {
            str(size): round(sum(count for _, count in ranked[:size]) / max(total, 1), 4)
            for size in (*(size for size in LARGEST if size < len(ranked)), len(ranked))
        },
    }


def _left_out(index: Index) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in index.left_out:
        entry = found.setdefault(
            (one.split, one.reason),
            {"split": one.split, "reason": one.reason, "entries": 0, "first": one.file_name},
        )
        entry["entries"] += one.entries
    return list(found.values())


def _duplicates(surveys: Mapping[str, Survey]) -> dict[str, Any]:
    """Pictures that look like others, in one split or across two."""
    place = [(split, file) for split, one in surveys.items() for file in one.files]
    digests = [digest for one in surveys.values() for digest in one.digests]
    fingerprints = [bits for one in surveys.values() for bits in one.fingerprints]
    groups: dict[int, list[tuple[str, str]]] = {}
    for at, first in enumerate(likeness.groups(digests, fingerprints)):
        groups.setdefault(first, []).append(place[at])
    several = [group for group in groups.values() if len(group) > 1]
    across = [group for group in several if len({split for split, _ in group}) > 1]
    within = [group for group in several if len({split for split, _ in group}) == 1]
    return {
        "groups": len(several),
        "pictures": sum(map(len, several)),
        "groups_across_splits": len(across),
        "first": [_names(group) for group in (across + within)[:SHOWN]],
    }


def _names(group: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{split}: {file}" for split, file in group[:SHOWN]]
