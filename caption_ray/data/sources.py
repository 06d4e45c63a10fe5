"""What every format gives: pictures with their captions, by split, and what cannot be used.

The formats (`formats/`) make these values; ingest and training read them. Nothing here reads files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from caption_ray.data.json_entries import is_unicode
from caption_ray.data.locations import Location
from caption_ray.data.ptb import tokenize

SPLITS = ("train", "val", "test")
"""The splits that there can be, in their order."""

LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""


@dataclass(frozen=True)
class Picture:
    """One picture with what people said of it and, if known, what it shows."""

    image_id: int
    file_name: str
    width: int
    """In pixels; 0 if the source does not say."""
    height: int
    captions: list[str]
    objects: list[dict[str, Any]]
    """`category` and `bbox`: [x, y, width, height] as fractions of the picture."""


@dataclass(frozen=True)
class Record:
    """One picture with its captions, and where to read it."""

    picture: Picture
    location: Location | None
    """None: the source has no such file."""


class Unusable(NamedTuple):
    """What is left out, and why."""

    name: str
    """A file name, the id of an image that is not there, or the place of an entry."""
    reason: str
    entries: int = 1
    """How many there are; `name` is the first."""


@dataclass(frozen=True)
class Split:
    """All pictures of one split in a fixed order, and what of it cannot be used."""

    records: list[Record]
    left_out: list[Unusable]


class OddEntries:
    """Entries that are left out, by the reason: one of each is named, for there may be as many as
    the source has."""

    def __init__(self) -> None:
        self.by_reason: dict[str, Unusable] = {}

    def add(self, name: str, reason: str) -> None:
        first = self.by_reason.get(reason, Unusable(name, reason, 0))
        self.by_reason[reason] = first._replace(entries=first.entries + 1)


def caption_fault(caption: Any) -> str | None:
    """Why this cannot be a caption, as the left-out list has it; None if it can."""
    if not isinstance(caption, str) or not is_unicode(caption):
        return "caption that is no text"
    return None if has_word(caption) else "caption without a word"


def has_word(caption: str) -> bool:
    """Whether the tokenizer of COCO's evaluation finds a word in it."""
    # most captions need no tokenizer to tell, which would take ten times as long
    return re.search("[A-Za-z]", caption) is not None or bool(tokenize(caption))


def is_inside(file_name: str) -> bool:
    """Whether this can only be a file below the folder that it is joined to."""
    parts = file_name.replace("\\", "/").split("/")
    is_short = all(len(part.encode(errors="replace")) <= LONGEST_NAME for part in parts)
    return is_short and "\0" not in file_name and not {"", ".", ".."} & set(parts)
