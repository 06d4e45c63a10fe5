"""The format of feature shards: the features that a frozen encoder computed for the pictures of a
shard, in Arrow's IPC format, whose numbers can be used in place, without a copy.

Pure functions of bytes; the caller reads and writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FORMAT = 1
"""Version of the layout."""

_SHAPE = b"shape"


def to_bytes(
    regions: NDArray[np.float16],
    image_ids: NDArray[np.int64],
    captions: Sequence[Sequence[str]],
    errors: Sequence[str],
) -> bytes:
    """A feature shard: regions float16 (rows, N, E), and for each row the picture's id, its
    captions, and why it could not be read ("" if it could)."""
    rows, *shape = regions.shape
    flat = pa.FixedSizeListArray.from_arrays(pa.array(regions.reshape(-1)), int(np.prod(shape)))
    columns = {
        "regions": flat,
        "image_id": pa.array(image_ids, pa.int64()),
        "captions": pa.array([list(lines) for lines in captions], pa.list_(pa.string())),
        "error": pa.array(errors, pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({_SHAPE: json.dumps(shape).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, rows))
    return bytes(sink.getvalue())


def from_bytes(data: bytes | memoryview) -> list[dict[str, Any]]:
    """Its rows, in the form of those of a picture shard, but with `regions` float16 (N, E), a view
    of `data`, in the place of `image`."""
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    shape = json.loads(table.schema.metadata[_SHAPE])
    (chunk,) = table["regions"].chunks
    regions = chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape)
    rows: list[dict[str, Any]] = table.drop_columns("regions").to_pylist()
    for row, image in zip(rows, regions, strict=True):
        row["regions"], row["error"] = image, row["error"] or None
    return rows
