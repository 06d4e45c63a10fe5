"""Paths on this machine."""

from __future__ import annotations

import glob
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from caption_ray.storage.common import PARTIAL, Buffer, StorageError, read_into
from caption_ray.storage.failures import lasting


def opened(path: str) -> io.BufferedReader:
    """The file, for reading; a folder, or what is below a file, is as little there as nothing."""
    try:
        return open(path, "rb")
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file ({error.strerror})") from None


class Local:
    """Paths on this machine, as `storage.resolve` makes them."""

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
            raise StorageError(f"{uri}: a folder or a device; name a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent
            )
        except FileNotFoundError as error:  # in /proc, say; to a reader that would mean another
            raise lasting(uri, error) from error
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
