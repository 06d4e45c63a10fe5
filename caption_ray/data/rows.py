"""From a record (where a picture lies, and what people said of it) to a row of a shard.

Shared by ingest, which writes rows into shards, and by data sets that stream raw pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from caption_ray import storage
from caption_ray.data import downloads, shards, transforms
from caption_ray.data.downloads import DEAD_LINK
from caption_ray.data.locations import (
    File,
    Location,
    PictureError,
    WebAddress,
    read_picture,
    readers,
)
from caption_ray.data.sources import Record

READ_THREADS = 8
"""Pictures that one task fetches at a time: the latency of storage, not its bandwidth, is what
costs."""


def to_rows(records: Sequence[Record], image_size: int | None) -> list[dict[str, Any]]:
    """The rows of the records, in their order; see `to_row`. Several are fetched at a time, and
    what can only be read together is read once."""
    rows: list[dict[str, Any]] = [{}] * len(records)
    is_web = any(isinstance(record.location, WebAddress) for record in records)
    with ThreadPoolExecutor(downloads.AT_A_TIME if is_web else READ_THREADS) as threads:
        for places, read in readers([record.location for record in records]):
            done = [threads.submit(to_row, records[place], image_size, read) for place in places]
            for place, row in zip(places, done, strict=True):
                rows[place] = row.result()
    return rows


def to_row(
    record: Record,
    image_size: int | None,
    read: Callable[[Location | None], bytes] = read_picture,
) -> dict[str, Any]:
    """One row of a shard (`shards.SCHEMA`): the picture read, checked, and shrunk if asked for.

    A picture that cannot be had or decoded gives a row without `image`, and `error` says why.
    """
    picture = record.picture
    row: dict[str, Any] = {
        "image_id": picture.image_id,
        "file_name": picture.file_name,
        "width": picture.width,
        "height": picture.height,
        "image": None,
        "captions": picture.captions,
        "objects": picture.objects,
        "error": None,
    }
    try:
        data = read(record.location)
        if image_size is None:
            transforms.decode(data)  # the only proof that it can be decoded
        else:
            data = transforms.shrink(data, image_size)
        row["image"] = data
    except PictureError as error:
        row["error"] = str(error)
    except transforms.ImageError as error:
        row["error"] = f"corrupt: {error}"
        if isinstance(record.location, WebAddress):  # these are counted, not told one by one
            is_other = isinstance(error, transforms.UnknownFormatError)
            row["error"] = DEAD_LINK + ("gives no picture" if is_other else "gives a damaged one")
    return row


def fingerprint(parts: dict[str, list[list[Record]]], image_size: int | None) -> str:
    """Digest of all that determines the shards of each split: which pictures with which captions,
    from where, in which order and shard, under which settings."""
    text = json.dumps(
        {
            "format": shards.FORMAT,
            "image_size": image_size,
            "pieces": {
                split: [[_identity(record) for record in part] for part in listed]
                for split, listed in parts.items()
            },
        },
        default=str,
    )
    return storage.digest(text.encode())


def _identity(record: Record) -> tuple[Any, ...]:
    if isinstance(record.location, File):  # as earlier versions wrote it, which had one kind only
        return dataclasses.astuple(record.picture), (record.location.uri, None, 0, 0, 0, 0, 0)
    return dataclasses.astuple(record)
