"""From a record (where a picture lies, and what people said of it) to a row of a shard.

Shared by ingest, which writes rows into shards, and by data sets that stream raw pictures.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from caption_ray import storage
from caption_ray.data import shards, transforms
from caption_ray.data.sources import PictureError, Record, read_picture

READ_THREADS = 8
"""Pictures that one task fetches at a time: the latency of storage, not its bandwidth, is what
costs."""


def to_row(record: Record, image_size: int | None) -> dict[str, Any]:
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
        data = read_picture(record.location)
        if image_size is None:
            transforms.decode(data)  # the only proof that it can be decoded
        else:
            data = transforms.shrink(data, image_size)
        row["image"] = data
    except PictureError as error:
        row["error"] = str(error)
    except transforms.ImageError as error:
        row["error"] = f"corrupt: {error}"
    return row


def fingerprint(parts: dict[str, list[list[Record]]], image_size: int | None) -> str:
    """Digest of all that determines the shards of each split: which pictures with which captions,
    from where, in which order and shard, under which settings."""
    text = json.dumps(
        {
            "format": shards.FORMAT,
            "image_size": image_size,
            "pieces": {
                split: [[dataclasses.astuple(record) for record in part] for part in listed]
                for split, listed in parts.items()
            },
        },
        default=str,
    )
    return storage.digest(text.encode())
