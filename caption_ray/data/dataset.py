"""A data set as units that are read as a whole: shards that ingest wrote, raw pictures, features.

Training, evaluation and the feature cache read through it; nothing here needs Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from shlex import quote
from typing import Any, ClassVar, TypeAlias

import pyarrow as pa

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import feature_shards, shards
from caption_ray.data.formats import find_splits
from caption_ray.data.order import shuffled
from caption_ray.data.rows import READ_THREADS, fingerprint, to_rows
from caption_ray.data.shards import INDEX_FILE, Index, Shard
from caption_ray.data.sources import Record
from caption_ray.data.tokenizer import PTB

RAW_IMAGES = 64
"""Raw pictures that one task reads."""


@dataclass(frozen=True)
class ShardFile:
    """A unit of reading: one Parquet shard below the URI of its data set."""

    holds_features: ClassVar[bool] = False

    uri: str
    shard: Shard

    @property
    def rows(self) -> int:
        return self.shard.rows

    @property
    def pictures(self) -> ShardFile:
        """The unit that holds the pictures themselves."""
        return self

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows, verified against the index; DamagedError naming the shard if they differ."""
        rows: list[dict[str, Any]] = self.table(columns).to_pylist()
        return rows

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as `read`, as a table, without copying each picture."""
        try:
            data = storage.read_verified(self.uri, self.shard.bytes, self.shard.checksum)
        except storage.DamagedError as error:
            raise storage.DamagedError(
                f"{error}: not what the index names; ingest again into an empty folder"
            ) from None
        return shards.from_bytes(data, columns)

    def captions(self) -> list[list[str]]:
        """The captions of each picture, without reading the pictures."""
        with storage.open_seekable(self.uri) as file:
            return shards.read_captions(file)


@dataclass(frozen=True)
class RawImages:
    """A unit of reading: pictures streamed one by one from where they lie."""

    holds_features: ClassVar[bool] = False

    records: tuple[Record, ...]

    @property
    def rows(self) -> int:
        return len(self.records)

    @property
    def pictures(self) -> RawImages:
        """The unit that holds the pictures themselves."""
        return self

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows with all columns; unreadable pictures have an `error` instead of an `image`."""
        return to_rows(self.records, None)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as in a shard file."""
        return pa.Table.from_pylist(self.read(), schema=shards.SCHEMA)

    def captions(self) -> list[list[str]]:
        """The captions of each picture."""
        return [list(record.picture.captions) for record in self.records]


@dataclass(frozen=True)
class FeatureFile:
    """A unit of reading: a frozen encoder's features of the pictures of a shard, row by row."""

    holds_features: ClassVar[bool] = True

    uri: str
    shard: Shard
    pictures: ShardFile

    @property
    def rows(self) -> int:
        return self.shard.rows

    def read(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All rows, always whole, verified, with `regions` float16 (N, E) in the place of `image`;
        DamagedError if they are not what was written."""
        try:
            data = storage.read_verified(self.uri, self.shard.bytes, self.shard.checksum)
        except storage.DamagedError as error:
            raise storage.DamagedError(f"{error}: delete it, and it is made again") from None
        return feature_shards.from_bytes(data)

    def captions(self) -> list[list[str]]:
        """The captions of each picture."""
        return self.pictures.captions()


PictureUnit: TypeAlias = ShardFile | RawImages
Unit: TypeAlias = PictureUnit | FeatureFile


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set as units of reading, and the words of its training captions."""

    uri: str
    splits: Mapping[str, Sequence[Unit]]
    word_counts: Mapping[str, int]
    """How often each word, as the tokenizer `ptb` cuts them, stands in the training captions."""
    digest: str
    """Digest of which pictures with which captions stand where: an epoch's ledger is only valid for
    this one."""

    def rows(self, split: str) -> list[int]:
        """Pictures in each unit of a split; ValueError naming the splits there are."""
        if split not in self.splits:
            raise ValueError(f"{self.uri}: no split {split!r}; it has {', '.join(self.splits)}")
        return [unit.rows for unit in self.splits[split]]

    def training_captions(self) -> Iterator[str]:
        """All captions of the training split, read without its pictures."""
        with ThreadPoolExecutor(READ_THREADS) as threads:
            for unit in threads.map(lambda unit: unit.captions(), self.splits["train"]):
                for captions in unit:
                    yield from captions


def read_index(uri: str) -> Index:
    """The index of the shards below `uri`; ValueError if there is none."""
    location = storage.join(storage.resolve(uri), INDEX_FILE)
    try:
        return Index.from_json(storage.read_text(location), location)
    except FileNotFoundError:
        raise ValueError(
            f"{location}: no index, so no complete data set; run jobs/ingest.py --out {quote(uri)}"
        ) from None


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
        index.fingerprint,
    )


def open_source(uri: str, *, seed: int, options: SourceConfig | None = None) -> DataSet:
    """The pictures of a source (see `find_splits`) read from where they are, without ingest, in
    shuffled order."""
    splits: dict[str, list[Unit]] = {}
    counts: Counter[str] = Counter()
    order_of: dict[str, list[list[Record]]] = {}
    for split, content in find_splits(uri, options=options).items():
        if not content.records:
            continue  # a test split whose captions are withheld
        records = shuffled(content.records, seed, RAW_IMAGES)
        order_of[split] = [records]
        splits[split] = [
            RawImages(tuple(records[start : start + RAW_IMAGES]))
            for start in range(0, len(records), RAW_IMAGES)
        ]
        if split == "train":
            for record in records:
                for caption in record.picture.captions:
                    counts.update(PTB(caption))
    return DataSet(storage.resolve(uri), splits, counts, fingerprint(order_of, None))
