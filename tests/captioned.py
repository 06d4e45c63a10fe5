"""Real pictures with their captions, and what a format makes of them: for the tests of formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from caption_ray.data.locations import PictureError, read_picture
from caption_ray.data.sources import Split


class Photo(NamedTuple):
    """A photograph of COCO."""

    name: str
    data: bytes
    captions: list[str]


def captions_of(found: Mapping[str, Split]) -> dict[str, dict[str, list[str]]]:
    """The captions by split and file name."""
    return {
        split: {record.picture.file_name: record.picture.captions for record in content.records}
        for split, content in found.items()
    }


def pictures_of(split: Split) -> list[bytes | str]:
    """The bytes of each picture, or the reason why it cannot be had."""
    pictures: list[bytes | str] = []
    for record in split.records:
        try:
            pictures.append(read_picture(record.location))
        except PictureError as error:
            pictures.append(str(error))
    return pictures


def reasons_of(split: Split) -> dict[str, int]:
    """How many entries were left out for each reason."""
    reasons: dict[str, int] = {}
    for one in split.left_out:
        reasons[one.reason] = reasons.get(one.reason, 0) + one.entries
    return reasons
