"""What Ray Data's read tasks do: the rows of a piece, tokenised and maybe decoded, as blocks.

Their processes load no torch unless they decode: it would take each of them 250 MiB of memory and
more than a second at its start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray

from caption_ray.data.dataset import FeatureFile, Unit
from caption_ray.data.plan import Piece
from caption_ray.data.preparation import Preparation

BLOCK_ROWS = 64
"""Pictures that a task yields at a time."""

COLUMNS = ("image_id", "file_name", "image", "captions", "error")
"""What training reads of a shard; boxes and the like cost time."""


def _to_block(rows: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        is_array = isinstance(values[0], np.ndarray)
        columns[name] = ArrowTensorArray.from_numpy(np.stack(values)) if is_array else values
    columns["file_name"] = pa.array(columns["file_name"], pa.string())
    return pa.table(columns)


class Pieces(Datasource):
    """One read task per piece, which reads, tokenises and maybe decodes, and yields blocks."""

    def __init__(
        self,
        units: Sequence[Unit],
        pieces: list[Piece],
        prepare: Preparation,
        *,
        decode: bool = True,
        block_rows: int | None = BLOCK_ROWS,
    ):
        """block_rows: None for one block a piece."""
        super().__init__()
        self.units, self.pieces = units, pieces
        self.decode, self.block_rows = decode, block_rows
        # once for all tasks: it holds the vocabulary
        self.prepare = ray.put(prepare)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(
                    _read_piece,
                    self.units[piece.shard],
                    piece,
                    self.prepare,
                    self.decode,
                    self.block_rows,
                ),
                BlockMetadata(len(piece.rows), None, None, None),
            )
            for piece in self.pieces
        ]


def _read_piece(
    unit: Unit, piece: Piece, prepare: ray.ObjectRef, decode: bool, block_rows: int | None
) -> Iterable[pa.Table]:
    preparation: Preparation = ray.get(prepare)
    step = block_rows or len(piece.rows)
    parts = [piece.rows[start : start + step] for start in range(0, len(piece.rows), step)]
    if decode:
        rows = unit.read(COLUMNS)
        for part in parts:
            yield _to_block([preparation(rows[i], piece.first + int(i)) for i in part])
        return
    assert not isinstance(unit, FeatureFile)
    table = unit.table(COLUMNS)
    rows = table.drop_columns("image").to_pylist()
    for part in parts:
        block = _to_block([preparation.but_for_image(rows[i], piece.first + int(i)) for i in part])
        yield block.append_column("image", table["image"].take(pa.array(part)))
