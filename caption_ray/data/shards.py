"""The shard format: Parquet files of encoded pictures with their captions, and the index of them.

Pure functions of bytes; the caller reads and writes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AliasChoices, Field

from caption_ray.config import from_dict

INDEX_FILE = "index.json"
"""Name of the index; its presence says that the shards beside it are complete."""

FORMAT = 1
"""Version of the layout of shards and index."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),  # of the original, upright
        ("height", pa.int32()),
        ("image", pa.binary()),  # encoded; null: unreadable, and `error` says why
        ("captions", pa.list_(pa.string())),
        # bbox: x, y, width, height as fractions of the picture's width and height
        ("objects", pa.list_(pa.struct([("category", pa.string()),
                                        ("bbox", pa.list_(pa.float32(), 4))]))),
        ("error", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One shard file, as the index names it."""

    file: str
    """Path below the index's folder."""
    rows: int
    bytes: int
    checksum: Annotated[str, Field(validation_alias=AliasChoices("checksum", "digest"))]
    """`storage.checksum` of the file. (Written as `digest` by earlier versions.)"""


@dataclass(frozen=True)
class LeftOut:
    """A picture that is in no shard, or entries of the annotations that could not be used."""

    split: str
    file_name: str
    """Or what else names it: see sources.Unusable."""
    reason: str
    entries: int = 1
    """How many there are; `file_name` is the first."""


def outline(left_out: Iterable[LeftOut]) -> str:
    """For people: how much was left out for each reason, and the first of it; empty if nothing."""
    first: dict[tuple[str, str], str] = {}
    entries: Counter[tuple[str, str]] = Counter()
    for one in left_out:
        first.setdefault((one.split, one.reason), one.file_name)
        entries[one.split, one.reason] += one.entries
    return "; ".join(
        f"{split}: {entries[split, reason]} x {reason} (the first: {name})"
        for (split, reason), name in first.items()
    )


def counted(left_out: Iterable[LeftOut], prefix: str) -> list[LeftOut]:
    """The same, sorted, with those whose reason begins like this as one for each split and reason:
    of millions of addresses, a third may be dead."""
    result, merged = [], dict[tuple[str, str], LeftOut]()
    for one in sorted(left_out, key=dataclasses.astuple):
        key = (one.split, one.reason)
        if not one.reason.startswith(prefix):
            result.append(one)
        elif key in merged:
            entries = merged[key].entries + one.entries
            merged[key] = dataclasses.replace(merged[key], entries=entries)
        else:
            merged[key] = one
    return sorted([*result, *merged.values()], key=dataclasses.astuple)


@dataclass(frozen=True)
class Index:
    """What an ingest wrote: every shard of every split, and the pictures that it left out."""

    source: str
    """Where the pictures came from."""
    fingerprint: Annotated[str, Field(validation_alias=AliasChoices("fingerprint", "plan"))]
    """Digest of all that determines the shards: pictures, captions, settings. (Written as `plan` by
    earlier versions.)"""
    image_size: int | None
    """Shorter side, in pixels, that larger pictures were shrunk to; None: originals."""
    seed: int
    """Of the shuffle over shards."""
    splits: dict[str, list[Shard]]
    word_counts: dict[str, int]
    """How often each word stands in the captions of the training split (tokenizer `ptb`)."""
    left_out: list[LeftOut] = field(default_factory=list)
    format: int = FORMAT

    def rows(self, split: str) -> list[int]:
        """Rows of each shard of a split."""
        return [shard.rows for shard in self.shards(split)]

    def shards(self, split: str) -> list[Shard]:
        """Shards of a split; ValueError naming the valid ones if there is no such split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r}; this data set has {', '.join(self.splits)}")
        return self.splits[split]

    def summary(self) -> str:
        """For people: a line for each split."""
        return "\n".join(
            f"{split}: {sum(self.rows(split))} images, {len(shards)} shards, "
            f"{sum(shard.bytes for shard in shards) / 1e6:.1f} MB"
            for split, shards in self.splits.items()
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str, origin: str) -> Index:
        """The index in `text`; ValueError naming `origin` if it is none, or of another version."""
        try:
            values: Any = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{origin}: not JSON ({error})") from None
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else None
            raise ValueError(
                f"{origin}: format {found!r}, this version reads {FORMAT}: run jobs/ingest.py again"
            )
        return from_dict(Index, dict(values), origin)


def to_bytes(rows: list[dict[str, Any]]) -> bytes:
    """A shard file with these rows (see SCHEMA); the same rows always give the same bytes."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    # JPEG does not compress further, and statistics over pictures would only cost space
    pq.write_table(table, sink, compression="none", write_statistics=False, use_dictionary=False)
    return bytes(sink.getvalue())


def from_bytes(data: bytes | memoryview, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard file, with these columns only (None: all)."""
    names = None if columns is None else list(columns)
    return pq.read_table(pa.BufferReader(data), schema=SCHEMA, columns=names)


def read_captions(file: BinaryIO) -> list[list[str]]:
    """The captions of each row of a shard file, without reading the pictures."""
    table = pq.read_table(pa.PythonFile(file, mode="r"), columns=["captions"], pre_buffer=False)
    captions: list[list[str]] = table["captions"].to_pylist()
    return captions
