"""What Ray Data's read tasks do: read the rows of a slice, tokenise them, decode them if decoding
is far, and yield them as blocks.

Their processes must not load torch unless they decode: it costs each of them 250 MiB of memory and
more than a second at its start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray

from caption_ray.data.dataset import PictureUnit, Unit
from caption_ray.data.plan import ShardSlice
from caption_ray.data.preparation import Preparation

BLOCK_ROWS = 64
"""Pictures that a task yields at a time."""

COLUMNS = ("image_id", "file_name", "image", "captions", "error")
"""The columns that training reads; boxes and the like would only cost time."""


def _to_block(rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        is_array = isinstance(values[0], np.ndarray)
        columns[name] = ArrowTensorArray.from_numpy(np.stack(values)) if is_array else values
    columns["file_name"] = pa.array(columns["file_name"], pa.string())
    return pa.table(columns)


class SliceSource(Datasource):
    """A Ray Data source with one read task per slice."""

    def __init__(
        self,
        units: Sequence[Unit],
        slices: list[ShardSlice],
        prepare: Preparation,
        *,
        decode: bool = True,
        block_rows: int | None = BLOCK_ROWS,
    ):
        """block_rows: pictures in a block; None makes one block of each slice."""
        super().__init__()
        self.units, self.slices = units, slices
        self.decode, self.block_rows = decode, block_rows
        # once for all tasks: it holds the vocabulary
        self.prepare = ray.put(prepare)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(
                    _read_slice,
                    self.units[shard_slice.shard],
                    shard_slice,
                    self.prepare,
                    self.decode,
                    self.block_rows,
                ),
                BlockMetadata(len(shard_slice.rows), None, None, None),
            )
            for shard_slice in self.slices
        ]


def _read_slice(
    unit: Unit,
    shard_slice: ShardSlice,
    prepare: ray.ObjectRef,
    decode: bool,
    block_rows: int | None,
) -> Iterable[pa.Table]:
    preparation: Preparation = ray.get(prepare)
    step = block_rows or len(shard_slice.rows)
    parts = [
        shard_slice.rows[start : start + step] for start in range(0, len(shard_slice.rows), step)
    ]
    if decode:
        rows = unit.read(COLUMNS)
        for part in parts:
            yield _to_block([preparation(rows[i], shard_slice.first + int(i)) for i in part])
        return
    table = cast(PictureUnit, unit).table(COLUMNS)
    rows = table.drop_columns("image").to_pylist()
    for part in parts:
        block = _to_block(
            [preparation.without_inputs(rows[i], shard_slice.first + int(i)) for i in part]
        )
        yield block.append_column("encoded", table["image"].take(pa.array(part)))
