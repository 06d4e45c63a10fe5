"""Ray Data: shards -> decoded, augmented, tokenised, shuffled batches.

Each training worker builds its own dataset for each epoch from `plan_epoch`: which pictures it
reads is then a pure function of (seed, epoch, rank), nothing is dropped to make the shares equal,
and an interrupted epoch can be continued with what is left of it. A shard is one Ray Data task,
which reads and tokenises. Pictures are decoded there as well (far: on any node, and they cross the
object store as uint8 tensors of fixed shape) or in threads of the process that wants the batches
(near: what crosses is encoded, a fifth of the bytes or less). Batches are the same either way, but
for rounding where the near process has a GPU decode.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.extensions import ArrowTensorArray

from caption_ray import storage
from caption_ray.data import features, near, shards
from caption_ray.data.ingest import READ_THREADS, plan_digest, read_index, to_row
from caption_ray.data.plan import Piece
from caption_ray.data.preparation import Preparation
from caption_ray.data.shards import Index, Shard
from caption_ray.data.sources import Record, find_splits
from caption_ray.data.tokenizer import tokenize

BLOCK_ROWS = 64
"""Pictures in one block on the object store: small enough to stream, large enough to be cheap."""

COLUMNS = ("image_id", "file_name", "image", "captions", "error")
"""What training reads of a shard; boxes and the like cost time."""


class TooManyBadImages(RuntimeError):
    """More pictures of an epoch were unreadable than `data.max_bad_images` allows."""


@dataclass(frozen=True)
class ShardFile:
    """A unit of reading: one Parquet shard below the URI of its data set."""

    uri: str
    shard: Shard

    @property
    def rows(self) -> int:
        return self.shard.rows

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows, verified against the index; DamagedError naming the shard if they differ."""
        rows: list[dict[str, Any]] = self.table(columns).to_pylist()
        return rows

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """What `read` gives, without a copy of each picture."""
        try:
            data = storage.read_verified(self.uri, self.shard.bytes, self.shard.digest)
        except storage.DamagedError as error:
            raise storage.DamagedError(
                f"{error}: not what the index names; ingest again into an empty folder"
            ) from None
        return shards.from_bytes(data, columns)

    def captions(self) -> list[list[str]]:
        """What people wrote of each picture, without reading the pictures."""
        with storage.open_seekable(self.uri) as file:
            return shards.read_captions(file)


@dataclass(frozen=True)
class RawImages:
    """A unit of reading: pictures streamed one by one from where they lie."""

    records: tuple[Record, ...]

    @property
    def rows(self) -> int:
        return len(self.records)

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows, always whole; unreadable pictures have an `error` instead of an `image`."""
        with ThreadPoolExecutor(READ_THREADS) as threads:
            return list(threads.map(lambda record: to_row(record, None), self.records))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as in a shard file."""
        return pa.Table.from_pylist(self.read(), schema=shards.SCHEMA)

    def captions(self) -> list[list[str]]:
        """What people wrote of each picture."""
        return [list(record.picture.captions) for record in self.records]


@dataclass(frozen=True)
class FeatureFile:
    """A unit of reading: what a frozen encoder made of the pictures of a shard, row by row."""

    uri: str
    shard: Shard
    pictures: ShardFile

    @property
    def rows(self) -> int:
        return self.shard.rows

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows, always whole, verified, with regions float16 (N, E) as `image`; DamagedError if
        they are not what was written."""
        try:
            data = storage.read_verified(self.uri, self.shard.bytes, self.shard.digest)
        except storage.DamagedError as error:
            raise storage.DamagedError(f"{error}: delete it, and it is made again") from None
        return features.from_bytes(data)

    def captions(self) -> list[list[str]]:
        """What people wrote of each picture."""
        return self.pictures.captions()


Unit: TypeAlias = ShardFile | RawImages | FeatureFile


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set as units of reading, and the words of its training captions."""

    uri: str
    splits: Mapping[str, Sequence[Unit]]
    word_counts: dict[str, int]
    digest: str
    """Of which pictures with which captions stand where: what an epoch's ledger refers to."""

    def rows(self, split: str) -> list[int]:
        """Pictures in each unit of a split; ValueError naming the splits there are."""
        if split not in self.splits:
            raise ValueError(f"{self.uri}: no split {split!r}; it has {', '.join(self.splits)}")
        return [unit.rows for unit in self.splits[split]]


def open_shards(uri: str) -> DataSet:
    """The data set that ingest wrote below `uri`; ValueError if there is none."""
    uri = storage.resolve(uri)
    index: Index = read_index(uri)
    return DataSet(
        uri,
        {
            split: [ShardFile(storage.join(uri, shard.file), shard) for shard in listed]
            for split, listed in index.splits.items()
        },
        index.word_counts,
        index.plan,
    )


def open_source(uri: str, *, seed: int) -> DataSet:
    """The pictures of a COCO layout as they lie, without ingest, in a shuffled order."""
    splits: dict[str, list[Unit]] = {}
    counts: dict[str, int] = {}
    order_of: dict[str, list[list[Record]]] = {}
    for split, content in find_splits(uri).items():
        order = np.random.default_rng(seed).permutation(len(content.records))
        records = [content.records[i] for i in order]
        order_of[split] = [records]
        splits[split] = [
            RawImages(tuple(records[start : start + BLOCK_ROWS]))
            for start in range(0, len(records), BLOCK_ROWS)
        ]
        if split == "train":
            for record in records:
                for caption in record.picture.captions:
                    for word in tokenize(caption):
                        counts[word] = counts.get(word, 0) + 1
    return DataSet(storage.resolve(uri), splits, counts, plan_digest(order_of, None))


# Pieces through Ray Data ------------------------------------------------------------------------


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


# Batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one step sees. images uint8 (B, S, S, 3), on the device that decoded them if any, or
    what a frozen encoder made of them, float16 (B, N, E); tokens int32 (B, K, L), numbers int64
    (B,) of the pictures in their split, image_ids int64 (B,), errors: the unreadable ones,
    captions: what people wrote, if Preparation was told to bring it."""

    images: NDArray[np.uint8] | NDArray[np.float16] | torch.Tensor
    tokens: NDArray[np.int32]
    numbers: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    errors: list[str]
    captions: list[list[str]]


def batches(
    units: Sequence[Unit],
    pieces: list[Piece],
    prepare: Preparation,
    *,
    batch_size: int,
    cpus: float,
    keep_order: bool,
    decode_threads: int = 0,
    decode_on: torch.device | None = None,
) -> Iterator[Batch]:
    """The pictures of `pieces`, read by at most `cpus` CPUs of the cluster at a time and decoded by
    them (far), or by so many threads of this process (near), which may have a GPU do it."""
    if not pieces:
        return
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus)
    context.execution_options.preserve_order = keep_order
    is_near = decode_threads > 0 and not isinstance(units[0], FeatureFile)
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            Pieces(units, pieces, prepare, decode=not is_near), override_num_blocks=len(pieces)
        )
        if is_near:
            # whole blocks as they lie in the object store: Ray's batches would be copies
            blocks = dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=2
            )
            stream = near.decoded(
                _rebatched(blocks, batch_size), prepare, decode_threads, decode_on
            )
        else:
            stream = iter(
                dataset.iter_batches(
                    batch_size=batch_size, batch_format="numpy", prefetch_batches=2
                )
            )
        for columns in stream:
            yield Batch(
                columns["image"],
                columns["tokens"],
                columns["number"],
                columns["image_id"],
                [error for error in columns["error"] if error],
                [json.loads(text) if text else [] for text in columns["captions"]],
            )


def _rebatched(
    blocks: Iterable[pa.Table], batch_size: int
) -> Iterator[tuple[list[pa.Scalar], near.Columns]]:
    """The same rows in batches: the encoded pictures as views of the blocks, and the rest."""
    parts: list[pa.Table] = []
    wanted = batch_size
    for block in blocks:
        start = 0
        while start < len(block):
            part = block.slice(start, wanted)
            parts.append(part)
            start += len(part)
            wanted -= len(part)
            if not wanted:
                yield _apart(parts)
                parts, wanted = [], batch_size
    if parts:
        yield _apart(parts)


def _apart(parts: list[pa.Table]) -> tuple[list[pa.Scalar], near.Columns]:
    pictures = [picture for part in parts for picture in part["image"]]
    others = [
        BlockAccessor.for_block(part.drop_columns("image")).to_batch_format("numpy")
        for part in parts
    ]
    # arrays of their own, to be written to: Ray's are read-only
    return pictures, {name: np.concatenate([part[name] for part in others]) for name in others[0]}
