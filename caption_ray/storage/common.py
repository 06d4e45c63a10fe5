"""What all kinds of storage share: their interface, their errors and their time-outs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np

READ_TIMEOUT_VARIABLE = "CAPTION_RAY_READ_TIMEOUT"
"""Environment variable, to be set on all nodes: after so many seconds without data a remote server
counts as hung (default: 30)."""

CONNECT_TIMEOUT = 10.0

SLOWEST_RATE = 100_000
"""A body that arrives at fewer bytes a second than this, after the read time-out, counts as hung.
Low enough for eight readers that share a slow line; high enough to end one byte a second."""

READ_BYTES = 1 << 20
"""Size of one read from a large object, in bytes."""

PARTIAL = ".part"
"""Suffix of files that are being written."""


class StorageError(OSError):
    """Storage does not answer, refuses the request, or does not hold what it should."""


class DamagedError(StorageError):
    """The bytes read differ from those that were written. If that happened on the way, another
    attempt succeeds."""


def wrong_kind(uri: str, folder: bool) -> ValueError:
    """The error for a file in place of a folder, or a folder in place of a file."""
    if folder:
        return ValueError(f"{uri}: is there, and no folder; name another")
    return ValueError(f"{uri}: a folder (or a device); name a file")


class HttpStatus(Exception):
    """A web server has answered with an error status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


Buffer: TypeAlias = bytes | memoryview


class Backend(Protocol):
    """The operations of a kind of storage, each of which is tried once."""

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        """The whole object, or (start, length) of it."""

    def read_large(self, uri: str) -> Buffer:
        """The whole object, as fast as possible and unverified: the caller knows its checksum."""

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace the object atomically. Raises DamagedError if the storage received
        other bytes."""

    def create(self, uri: str, data: bytes) -> bool:
        """Create the object unless it exists. Returns whether it was created."""

    def size(self, uri: str) -> int:
        """The object's size in bytes."""

    def walk(self, uri: str) -> Iterator[str]:
        """All objects below a folder."""

    def folders(self, uri: str) -> Iterator[str]:
        """Names of the folders directly below a folder."""

    def delete(self, uri: str) -> None:
        """Remove the object, or the folder with all that is below it."""

    def delete_partial(self, uri: str) -> None:
        """Remove the incomplete files of killed writers, of the object or below the folder."""

    def check_writable(self, uri: str, folder: bool) -> None:
        """Raise an error if the object, or objects below the folder, cannot be written."""


def read_timeout() -> float:
    """The read time-out in seconds. Reads the environment at each use, not at import."""
    value = os.environ.get(READ_TIMEOUT_VARIABLE, "30")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{READ_TIMEOUT_VARIABLE} is {value!r}: give a number of seconds above 0")
    return seconds


@contextmanager
def time_limit(response: Any, length: int) -> Iterator[None]:
    """Break off a body of `length` bytes that arrives too slowly. A socket's time-out does not do
    that, since it starts again with every byte. `response` is urllib3's."""
    limit, expired = read_timeout() + length / SLOWEST_RATE, threading.Event()

    def end() -> None:
        expired.set()
        try:
            response.shutdown()
        except (RuntimeError, OSError):
            pass  # it has just been read, or the connection has ended by itself

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if expired.is_set():
            raise TimeoutError(f"{length} bytes did not come within {limit:.0f} s") from error
        raise
    finally:
        timer.cancel()


def read_into(readinto: Callable[[memoryview], int | None], length: int) -> memoryview:
    """Read at most `length` bytes of a stream, fewer if it ends before. Reads into a numpy array:
    numpy asks for huge pages, which saves two thirds of the time of a plain read of a file."""
    buffer = np.empty(length, np.uint8).data
    at = 0
    # a stream that makes its own copy of what is asked for shall ask for little
    while at < length and (count := readinto(buffer[at : at + READ_BYTES])):
        at += count
    return buffer[:at]


def create_after_a_look(backend: Backend, uri: str, data: bytes) -> bool:
    """`Backend.create` for storage without an atomic operation for it: of two callers at the same
    time, both may create the object."""
    try:
        backend.size(uri)
    except FileNotFoundError:
        backend.write(uri, data)
        return True
    return False
