"""Paths on this machine."""

from __future__ import annotations

import glob
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caption_ray.storage.common import PARTIAL, Buffer, read_into, wrong_kind
from caption_ray.storage.failures import lasting


def opened(path: str) -> io.BufferedReader:
    """Open a file for reading. A folder, or a path below a file, counts as a missing file."""
    try:
        return open(path, "rb")
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file ({error.strerror})") from None


@contextmanager
def _creating(uri: str) -> Iterator[None]:
    """Turns FileNotFoundError while a file is created (in /proc, say) into another error, since no
    object is missing."""
    try:
        yield
    except FileNotFoundError as error:
        raise lasting(uri, error) from error


def _new_partial(folder: Path, name: str) -> tuple[int, str]:
    """Create a temporary file that listings leave out; returns its handle and path."""
    return tempfile.mkstemp(prefix=f".{name}.", suffix=PARTIAL, dir=folder)


class Local:
    """Paths on this machine, resolved by `storage.resolve`."""

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        with opened(uri) as file:
            if window is None:
                return file.read()
            file.seek(window[0])
            return file.read(window[1])

    def read_large(self, uri: str) -> Buffer:
        with opened(uri) as file:
            return read_into(file.raw.readinto, os.fstat(file.fileno()).st_size)

    def write(self, uri: str, data: bytes) -> None:
        path = Path(uri)
        if path.exists() and not path.is_file():  # a device would become a plain file
            raise wrong_kind(uri, folder=False)
        with _creating(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = _new_partial(path.parent, path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the rename must not become durable before the bytes
            os.chmod(partial, 0o644)  # mkstemp makes private files; runs are read by others
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def create(self, uri: str, data: bytes) -> bool:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(uri, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def size(self, uri: str) -> int:
        path = Path(uri)
        if not path.is_file():
            raise FileNotFoundError(f"{uri}: no such file")
        return path.stat().st_size

    def walk(self, uri: str) -> Iterator[str]:
        for path in Path(uri).rglob("*"):
            if path.is_file() and path.suffix != PARTIAL:
                yield str(path)

    def folders(self, uri: str) -> Iterator[str]:
        root = Path(uri)
        return (path.name for path in (root.iterdir() if root.is_dir() else ()) if path.is_dir())

    def delete(self, uri: str) -> None:
        path = Path(uri)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def delete_partial(self, uri: str) -> None:
        path = Path(uri)
        for partial in [
            *path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"),
            *path.rglob(f".*{PARTIAL}"),
        ]:
            partial.unlink(missing_ok=True)

    def check_writable(self, uri: str, folder: bool) -> None:
        path = Path(uri)
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise wrong_kind(uri, folder)
        there = path if folder else path.parent
        while not there.exists():  # where a folder can be made, a file can
            there = there.parent
        with _creating(uri):
            handle, partial = _new_partial(there, path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            Path(partial).unlink()
