"""Where the bytes of a picture lie, and how they are read from there.

The formats write down locations; the tasks of ingest and training read them later, each by itself
and in any order. Pictures of one row group of a Parquet file are best read together: `readers`
puts these together.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from caption_ray import storage
from caption_ray.data import downloads

MAX_PICTURE_BYTES = 64 << 20
"""A picture that claims to have more bytes than this is refused."""

HEADER, SLACK = 30, 64
"""Bytes of the fixed part of a zip entry's local header, and of the room for its extra field."""


class PictureError(Exception):
    """A picture that cannot be had; the message is the reason that the index records."""


@dataclass(frozen=True)
class File:
    """A file of its own."""

    uri: str

    def read(self) -> bytes:
        return storage.read_bytes(self.uri)


@dataclass(frozen=True)
class ZipEntry:
    """An entry of a zip."""

    uri: str
    offset: int
    """Of the entry's local header."""
    stored_bytes: int
    method: int
    crc: int
    picture_bytes: int
    name_bytes: int

    def read(self) -> bytes:
        _check_size(max(self.picture_bytes, self.stored_bytes))
        # what was damaged on its way is read again before it counts as corrupt
        return storage.retry_damaged(self.uri, self._unpack)

    def _unpack(self) -> bytes:
        # one request for the local header and the data: the header's extra field is usually empty,
        # and the zip's directory (68 bytes at least) always follows, so that the slack never
        # overruns
        block = storage.read_range(
            self.uri, self.offset, HEADER + self.name_bytes + self.stored_bytes + SLACK
        )
        if block[:4] != b"PK\x03\x04":
            raise storage.DamagedError("no zip entry where the directory says")
        start = (
            HEADER + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        )
        data = block[start : start + self.stored_bytes]
        if len(data) < self.stored_bytes:
            data = storage.read_range(self.uri, self.offset + start, self.stored_bytes)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.picture_bytes + 1)
            except zlib.error as error:
                raise storage.DamagedError(str(error)) from None
        elif self.method != zipfile.ZIP_STORED:
            raise PictureError(
                f"zip compression method {self.method}, which is not read: zip it with deflate"
            )
        if len(data) != self.picture_bytes or zlib.crc32(data) != self.crc:
            raise storage.DamagedError("bad CRC in the zip")
        return data


@dataclass(frozen=True)
class ByteRange:
    """Some bytes of a file: a member of a tar."""

    uri: str
    offset: int
    picture_bytes: int

    def read(self) -> bytes:
        _check_size(self.picture_bytes)
        return storage.read_range(self.uri, self.offset, self.picture_bytes)


class Block(NamedTuple):
    """The cells of a column in one row group of a Parquet file, which are read as a whole."""

    uri: str
    row_group: int
    column: str
    """A path with dots: `image.bytes`."""

    def read(self) -> Any:
        """All cells, a pyarrow array of bytes. Raises DamagedError if they stay damaged."""
        return storage.retry_damaged(self.uri, self._read)

    def _read(self) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            with storage.open_seekable(self.uri) as file:
                table = pq.ParquetFile(file, pre_buffer=False).read_row_group(
                    self.row_group, columns=[self.column]
                )
        except (FileNotFoundError, storage.StorageError):
            raise
        except (pa.ArrowException, OSError) as error:
            raise storage.DamagedError(f"row group {self.row_group}: {error}") from None
        cells = table.column(0).combine_chunks()
        for name in self.column.split(".")[1:]:
            cells = pc.struct_field(cells, name)
        return cells


@dataclass(frozen=True)
class Cell:
    """A cell of a Parquet file that holds the encoded picture."""

    uri: str
    row_group: int
    row: int
    """Within the row group."""
    column: str

    @property
    def block(self) -> Block:
        return Block(self.uri, self.row_group, self.column)

    def read(self) -> bytes:
        return self.pick(self.block.read())

    def pick(self, cells: Any) -> bytes:
        """The picture among the cells of its block."""
        data: bytes | None = cells[self.row].as_py()
        if data is None:
            raise PictureError("missing: null in the table")
        _check_size(len(data))
        return data


@dataclass(frozen=True)
class WebAddress:
    """An address of a web server that is not ours: fetched politely, and from public ones only."""

    url: str
    hosts: tuple[str, ...] = ()
    """Further hosts that may be asked although they are not public: see `caption_ray.fetch`."""

    def read(self) -> bytes:
        try:
            return downloads.fetch_politely(self.url, self.hosts)
        except downloads.DeadLink as error:
            raise PictureError(f"{downloads.DEAD_LINK}{error}") from None


Location: TypeAlias = File | ZipEntry | ByteRange | Cell | WebAddress


def read_picture(location: Location | None) -> bytes:
    """The encoded picture.

    Raises PictureError if it is missing or its bytes are damaged, StorageError if the storage
    does not answer.
    """
    if location is None:
        raise PictureError("missing")
    data: bytes = _explained(location.read)
    return data


def readers(
    locations: Sequence[Location | None],
) -> Iterator[tuple[list[int], Callable[[Location | None], bytes]]]:
    """The places of the locations with the function that reads the pictures there, as
    `read_picture` does; those of one block together, which is read once, when its turn comes."""
    blocks: dict[Block | None, list[int]] = {}
    for place, location in enumerate(locations):
        blocks.setdefault(location.block if isinstance(location, Cell) else None, []).append(place)
    for block, places in blocks.items():
        yield places, read_picture if block is None else _opened(block)


def _opened(block: Block) -> Callable[[Location | None], bytes]:
    try:
        cells = _explained(block.read)
    except PictureError as error:
        reason = str(error)

        def refuse(location: Location | None) -> bytes:
            raise PictureError(reason)

        return refuse

    def pick(location: Location | None) -> bytes:
        assert isinstance(location, Cell)
        return location.pick(cells)

    return pick


def _explained(read: Callable[[], Any]) -> Any:
    """What `read` returns; PictureError if there is nothing, or nothing whole."""
    try:
        return read()
    except FileNotFoundError:
        raise PictureError("missing") from None
    except storage.DamagedError as error:
        raise PictureError(f"corrupt: {error}") from None


def _check_size(claimed: int) -> None:
    if claimed > MAX_PICTURE_BYTES:
        raise PictureError(f"corrupt: claims to unpack to {claimed} bytes")
