"""What the kinds of storage share: what each can do, how it fails, and how long it waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np

READ_TIMEOUT_VARIABLE = "CAPTION_RAY_READ_TIMEOUT"
"""Environment variable: seconds of silence after which a remote server counts as hung, 30 unless
it is set; on all nodes."""

CONNECT_TIMEOUT = 10.0

SLOWEST_RATE = 100_000
"""Bytes a second, below which a body that trickles in counts as hung (the read time-out on top):
time enough for eight readers that share a slow line, and an end to one byte a second."""

READ_BYTES = 1 << 20
"""How much of a large object is read at a time."""

PARTIAL = ".part"
"""Suffix of files that are being written."""


class StorageError(OSError):
    """Storage that does not answer, refuses, or holds something else than it should."""


class DamagedError(StorageError):
    """Bytes that are not those that were written. Damage on the way is mended by another try."""


def wrong_kind(uri: str, folder: bool) -> ValueError:
    """The error for a file where a folder is meant, or the reverse."""
    if folder:
        return ValueError(f"{uri}: is there, and no folder; name another")
    return ValueError(f"{uri}: a folder (or a device); name a file")


class HttpStatus(Exception):
    """An answer of a web server that is an error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


Buffer: TypeAlias = bytes | memoryview


class Backend(Protocol):
    """What a kind of storage must be able to do."""

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        """The whole object, or (start, length) of it."""

    def read_large(self, uri: str) -> Buffer:
        """The whole object in the least time, for a caller who knows what it must be."""

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace the object at once; DamagedError if something else arrived there."""

    def create(self, uri: str, data: bytes) -> bool:
        """Create the object unless there is one; whether it did."""

    def size(self, uri: str) -> int:
        """Bytes of the object."""

    def walk(self, uri: str) -> Iterator[str]:
        """All objects below a folder."""

    def folders(self, uri: str) -> Iterator[str]:
        """Names of the folders directly below a folder."""

    def delete(self, uri: str) -> None:
        """Remove the object, or the folder with all that is below it."""

    def delete_partial(self, uri: str) -> None:
        """Remove what writers left behind that were killed, of the object or below the folder."""

    def check_writable(self, uri: str, folder: bool) -> None:
        """Raise an error unless the object, or objects below the folder, can be written."""


def read_timeout() -> float:
    """Seconds, read from the environment at each use and not at import."""
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
    """Break off a body of `length` bytes that comes too slowly, which no socket time-out notices:
    each byte starts that anew. `response` is urllib3's."""
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
    """At most `length` bytes of a stream, fewer if it ends before, in memory of huge pages: numpy
    asks for these, which spares two thirds of the time of a plain read of a file."""
    buffer = np.empty(length, np.uint8).data
    at = 0
    # a stream that makes its own copy of what is asked for shall ask for little
    while at < length and (count := readinto(buffer[at : at + READ_BYTES])):
        at += count
    return buffer[:at]


def create_after_a_look(backend: Backend, uri: str, data: bytes) -> bool:
    """`Backend.create` where storage offers nothing better: two who look at once both create it."""
    try:
        backend.size(uri)
    except FileNotFoundError:
        backend.write(uri, data)
        return True
    return False
