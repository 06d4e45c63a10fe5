"""All access to files goes through here: local paths, `s3://`, `http(s)://` and pyarrow's schemes.

A `uri` may be remote or local; a `path` is local. Writes are atomic: a reader sees the old file or
the complete new one. S3 is accessed with boto3 (its credential chain, and `AWS_ENDPOINT_URL` for
other servers). boto3 does not retry a body that breaks off, stalls or arrives with a wrong byte, so
reads are verified and retried as a whole. The modules beside this one, one for each kind of
storage, try each operation once; the retries are here. Functions raise FileNotFoundError if there
is no such file, and StorageError, naming the URI, if the retries did not help.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from caption_ray.storage.arrow import Arrow
from caption_ray.storage.common import READ_TIMEOUT_VARIABLE as READ_TIMEOUT_VARIABLE
from caption_ray.storage.common import Backend, Buffer, wrong_kind
from caption_ray.storage.common import DamagedError as DamagedError
from caption_ray.storage.common import StorageError as StorageError
from caption_ray.storage.failures import (
    EXPIRED_CODES,
    error_code,
    http_status,
    is_passing,
    lasting,
)
from caption_ray.storage.failures import lasts as lasts
from caption_ray.storage.http import Http
from caption_ray.storage.hub import Hub
from caption_ray.storage.local import Local, opened
from caption_ray.storage.s3 import S3
from caption_ray.storage.uris import arrow_uri as arrow_uri
from caption_ray.storage.uris import is_local as is_local
from caption_ray.storage.uris import join as join
from caption_ray.storage.uris import name as name
from caption_ray.storage.uris import parent as parent
from caption_ray.storage.uris import relative as relative
from caption_ray.storage.uris import resolve as resolve
from caption_ray.storage.uris import scheme as scheme

ATTEMPTS = 6
"""How often a remote operation is tried before its error is raised."""

LONGEST_PAUSE = 20.0
"""The longest pause between two attempts, in seconds."""

T = TypeVar("T")


# Operations -----------------------------------------------------------------------------------


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    return _retried(uri, lambda backend, where: backend.read(where, None))


def read_verified(uri: str, length: int, expected: str) -> Buffer:
    """The whole object, whose size and checksum are known; DamagedError if it stays another."""
    # earlier versions wrote SHA-256 where checksums are now
    compute = checksum if len(expected) == len(checksum(b"")) else digest

    def read(backend: Backend, where: str) -> Buffer:
        data = backend.read_large(where)
        if len(data) != length or compute(data) != expected:
            raise DamagedError(
                f"{uri}: {len(data)} bytes that are not those which were written "
                f"({length} bytes, checksum {expected[:12]}...)"
            )
        return data

    return _retried(uri, read)


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start` on; DamagedError if the object ends before."""

    def read(backend: Backend, where: str) -> bytes:
        data = backend.read(where, (start, length))
        if len(data) != length:
            raise DamagedError(f"{uri}: {len(data)} bytes at {start} where {length} were asked for")
        return data

    return _retried(uri, read) if length else b""


def read_text(uri: str) -> str:
    """The whole object, decoded as UTF-8; ValueError naming the URI if it is something else."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text ({error})") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace the object at once: nobody ever reads a half-written one.

    What arrived at a remote server is compared with what was sent.
    """
    _retried(uri, lambda backend, where: backend.write(where, data))


def check_writable(uri: str, *, folder: bool) -> None:
    """Raise ValueError or StorageError, naming `uri`, unless a file of this name, or files in this
    `folder`, can be written now. To be asked before long work; changes nothing there."""
    where = resolve(uri)
    if not folder and uri.endswith("/"):
        raise wrong_kind(uri, folder)
    _retried(where, lambda backend, where: backend.check_writable(where, folder))


def create(uri: str, data: bytes) -> bool:
    """Create the object unless there is one of this name. Returns whether it did; of several who
    try at once, one succeeds. That is not certain on a server without conditional writes, or if its
    answer was lost: whoever needs to be sure must read the object back. On a disk, a reader may
    find it empty for a moment."""
    return _retried(uri, lambda backend, where: backend.create(where, data))


def size(uri: str) -> int:
    """Bytes of the object; FileNotFoundError if there is none."""
    return _retried(uri, lambda backend, where: backend.size(where))


def exists(uri: str) -> bool:
    """Whether there is an object (not a folder) of this name."""
    try:
        size(uri)
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> list[str]:
    """URIs of all objects below the folder `uri`, sorted; empty if there are none."""
    return sorted(_retried(uri, lambda backend, where: list(backend.walk(where))))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; empty if there are none."""
    return sorted(_retried(uri, lambda backend, where: list(backend.folders(where))))


def delete(uri: str) -> None:
    """Remove the object or the folder with all that is below it; nothing there is no error."""
    _retried(uri, lambda backend, where: backend.delete(where))


def delete_partial(uri: str) -> None:
    """Remove what killed writers left half-written, of the object or anywhere below the folder
    `uri`: files that were never renamed, parts that were never put together.

    Only for the one who writes there: it would end the write of another.
    """
    _retried(uri, lambda backend, where: backend.delete_partial(where))


def upload(path: str | Path, uri: str) -> None:
    """Copy the files of a local folder below `uri`."""
    uri = resolve(uri)
    for file in sorted(Path(path).rglob("*")):
        if file.is_file():
            write_bytes(join(uri, file.relative_to(path).as_posix()), file.read_bytes())


def download(uri: str, path: str | Path) -> Path:
    """Copy one object, or all objects below a folder, to the local `path`; returns it."""
    target = Path(path)
    if exists(uri):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(uri))
        return target
    files = list_files(uri)
    if not files:
        raise FileNotFoundError(f"{uri}: nothing there")
    for file in files:
        copy = target / relative(file, resolve(uri))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(read_bytes(file))
    return target


def digest(data: Buffer) -> str:
    """SHA-256 of the bytes, in hexadecimal: to tell things from all others."""
    return hashlib.sha256(data).hexdigest()


def checksum(data: Buffer) -> str:
    """XXH3 (128 bits) of the bytes, in hexadecimal: to find damage, in a fourteenth of the time of
    SHA-256. What somebody forges to have the same checksum passes, as it would with an index that
    is forged along with it."""
    return xxhash.xxh3_128_hexdigest(data)


def open_seekable(uri: str, buffer_bytes: int = 1 << 20) -> BinaryIO:
    """A read-only file object that fetches only the ranges that are read (zip directories), from
    remote storage at least `buffer_bytes` at a time."""
    if scheme(uri) == "file":
        return _retried(uri, lambda _, where: opened(where))
    return io.BufferedReader(_RangeFile(uri), buffer_bytes)


class _RangeFile(io.RawIOBase):
    def __init__(self, uri: str) -> None:
        self.uri, self.length, self.position = uri, size(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        buffer[:count] = read_range(self.uri, self.position, count)
        self.position += count
        return count


# Trying again ---------------------------------------------------------------------------------


def retry_damaged(uri: str, operation: Callable[[], T]) -> T:
    """What `operation` returns, which reads from `uri`; again while it raises DamagedError."""
    return _retried(uri, lambda backend, where: operation())


@functools.cache
def _backend(kind: str, process: int) -> Backend:
    """One client per process: connection pools must not be shared across a fork."""
    kinds: dict[str, Callable[[], Backend]] = {
        "file": Local,
        "s3": S3,
        "http": Http,
        "https": Http,
        "hf": Hub,
    }
    return kinds.get(kind, Arrow)()


def _retried(uri: str, operation: Callable[[Backend, str], T]) -> T:
    """`operation(backend, resolved uri)`, tried until it succeeds or there is no hope."""
    kind, where = scheme(uri), resolve(uri)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation(_backend(kind, os.getpid()), where)
        except Exception as error:
            if isinstance(error, (FileNotFoundError, ValueError)):
                raise
            if isinstance(error, StorageError) and not isinstance(error, DamagedError):
                raise  # of a retry inside of this one, or known to last
            if kind == "file":
                if isinstance(error, DamagedError) or not isinstance(error, OSError):
                    raise
                raise lasting(where, error) from error
            if error_code(error) in EXPIRED_CODES:
                _backend.cache_clear()
            elif not is_passing(error):
                if http_status(error) == 404 and error_code(error) != "NoSuchBucket":
                    raise FileNotFoundError(f"{where}: nothing there") from None
                raise lasting(where, error, attempt) from error
            if attempt == ATTEMPTS:
                raise lasting(where, error, attempt) from error
            # full jitter: many workers that fail together must not come back together
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2**attempt)))
    raise AssertionError("unreachable")
