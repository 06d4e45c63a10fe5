"""What zips and tars hold, without unpacking them: the formats turn it into locations.

A zip is read by its directory, a tar by its headers. The names in them are compared and shown, but
nothing is ever written under them.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from caption_ray import storage
from caption_ray.data.locations import HEADER, SLACK, ByteRange, ZipEntry

T = TypeVar("T")

TAR_BUFFER = 8 << 20
"""Bytes of a remote tar that are fetched at a time, so that it is read once from begin to end."""

TAR_BLOCK = 512
"""Bytes of a header, and of the mark at the end of a tar."""

MAX_TEXT_BYTES = 1 << 20
"""A text in a tar that claims to have more than this is refused."""


def zip_entries(uri: str) -> list[zipfile.ZipInfo]:
    """The directory of the zip."""

    def read() -> list[zipfile.ZipInfo]:
        with open_zip(uri) as archive:
            return archive.infolist()

    def known(entries: list[zipfile.ZipInfo]) -> list[tuple[Any, ...]]:
        return [(e.filename, e.header_offset, e.file_size, e.CRC) for e in entries]

    def read_twice() -> list[zipfile.ZipInfo]:
        # a zip guards its entries with a CRC, its directory with nothing
        first, second = read(), read()
        if known(first) != known(second):
            raise zipfile.BadZipFile("its directory reads differently each time")
        return second

    entries = retried(uri, read if storage.is_local(uri) else read_twice)
    end = storage.size(uri) - SLACK
    for entry in entries:
        if entry.header_offset + HEADER + entry.compress_size > end:
            raise ValueError(
                f"{uri}: a broken zip ({entry.filename} reaches beyond its end); copy or download "
                "it again"
            )
    return entries


@contextmanager
def open_zip(uri: str) -> Iterator[zipfile.ZipFile]:
    with storage.open_seekable(uri) as file, zipfile.ZipFile(file) as archive:
        yield archive


def retried(uri: str, operation: Callable[[], T]) -> T:
    """`operation` on an archive, again where it finds damage; ValueError naming it if it stays."""
    remedy = "copy or download it again"

    def run() -> T:
        nonlocal remedy
        try:
            return operation()
        except NotImplementedError as error:  # zipfile's, of a way to pack that it does not know
            remedy = "zip it again with deflate, or download it again if it is packed so already"
            raise storage.DamagedError(str(error)) from None
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
            raise storage.DamagedError(str(error)) from None

    try:
        return storage.retry_damaged(uri, run)
    except storage.DamagedError as error:
        kind = "tar" if storage.name(uri).endswith(".tar") else "zip"
        raise ValueError(f"{uri}: a broken {kind} ({error}); {remedy}") from None


def zip_location(uri: str, entry: zipfile.ZipInfo) -> ZipEntry:
    """Where a zip has this entry of its directory."""
    return ZipEntry(
        uri,
        entry.header_offset,
        entry.compress_size,
        entry.compress_type,
        entry.CRC,
        entry.file_size,
        len(entry.orig_filename.encode("utf-8")),
    )


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    location: ByteRange
    text: bytes | None
    """Its content, if it was asked for."""


def tar_members(uri: str, is_text: Callable[[str], bool]) -> list[TarMember]:
    """The plain files in a tar, in their order, those with the content of which `is_text` says so.

    Raises ValueError naming the tar if it is damaged, cut off or compressed.
    """

    def read() -> list[TarMember]:
        with storage.open_seekable(uri, TAR_BUFFER) as file:
            if file.read(2) == b"\x1f\x8b":
                raise ValueError(
                    f"{uri}: a compressed tar, in which no picture can be read by itself; "
                    "unpack it with gzip -d"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members, end = [], 0
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all
                    end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                    if member.isreg() and not member.issparse():
                        members.append(_tar_member(uri, archive, member, is_text))
            if storage.size(uri) < end + TAR_BLOCK:
                raise tarfile.ReadError("it ends without its end mark")
            return members

    return retried(uri, read)


def _tar_member(
    uri: str, archive: tarfile.TarFile, member: tarfile.TarInfo, is_text: Callable[[str], bool]
) -> TarMember:
    text = None
    if is_text(member.name):
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"{uri}: {member.name} has {member.size} bytes, which no caption has")
        content = archive.extractfile(member)
        assert content is not None  # it is a plain file
        text = content.read()
        if len(text) < member.size:
            raise tarfile.ReadError("unexpected end of data")
    return TarMember(member.name, ByteRange(uri, member.offset_data, member.size), text)
