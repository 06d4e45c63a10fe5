"""All other storage that pyarrow supports."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from caption_ray.storage.common import (
    PARTIAL,
    Buffer,
    DamagedError,
    StorageError,
    create_after_a_look,
    wrong_kind,
)
from caption_ray.storage.uris import join, parent

GOOGLE_RETRY_SECONDS = 5
"""How long Google's client retries a request by itself (15 minutes by default). Our own retries
come on top, as for every storage."""


class Arrow:
    """Any other scheme that pyarrow knows (gs://, hdfs://, abfs://)."""

    def open(self, uri: str) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
            uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE_RETRY_SECONDS}"
        return _arrow_filesystem(FileSystem, uri)

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        filesystem, path = self.open(uri)
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(window[1], window[0]) if window else file.read())

    def read_large(self, uri: str) -> Buffer:
        return self.read(uri, None)

    def write(self, uri: str, data: bytes) -> None:
        filesystem, path = self.open(uri)
        partial = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with filesystem.open_output_stream(partial) as file:
            file.write(data)
        with filesystem.open_input_file(partial) as file:  # there is no digest to ask for
            if file.read() != data:
                raise DamagedError(f"{uri}: the server does not hold what was sent")
        filesystem.move(partial, path)

    def create(self, uri: str, data: bytes) -> bool:
        return create_after_a_look(self, uri, data)

    def size(self, uri: str) -> int:
        from pyarrow.fs import FileType

        filesystem, path = self.open(uri)
        info = filesystem.get_file_info(path)
        if info.type != FileType.File:
            raise FileNotFoundError(f"{uri}: no such file")
        return int(info.size)

    def entries(self, uri: str, recursive: bool) -> tuple[str, Any]:
        from pyarrow.fs import FileSelector

        filesystem, path = self.open(uri)
        selector = FileSelector(path, allow_not_found=True, recursive=recursive)
        return path, filesystem.get_file_info(selector)

    def walk(self, uri: str) -> Iterator[str]:
        root, entries = self.entries(uri, recursive=True)
        for entry in entries:
            if entry.is_file and not entry.path.endswith(PARTIAL):
                yield join(uri, entry.path[len(root) :])

    def folders(self, uri: str) -> Iterator[str]:
        _, entries = self.entries(uri, recursive=False)
        return (entry.base_name for entry in entries if not entry.is_file)

    def delete(self, uri: str) -> None:
        from pyarrow.fs import FileType

        filesystem, path = self.open(uri)
        kind = filesystem.get_file_info(path).type
        if kind == FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == FileType.File:
            filesystem.delete_file(path)

    def delete_partial(self, uri: str) -> None:
        filesystem, path = self.open(uri)
        _, beside = self.entries(parent(uri), recursive=False)
        _, below = self.entries(uri, recursive=True)
        for entry in [*beside, *below]:
            ours = entry.path.startswith((f"{path}.", f"{path}/"))
            if ours and entry.is_file and entry.path.endswith(PARTIAL):
                filesystem.delete_file(entry.path)

    def check_writable(self, uri: str, folder: bool) -> None:
        from pyarrow.fs import FileType

        filesystem, path = self.open(uri)
        if filesystem.get_file_info(path).type == (FileType.File if folder else FileType.Directory):
            raise wrong_kind(uri, folder)
        there = path if folder else path.rpartition("/")[0]
        while there and filesystem.get_file_info(there).type == FileType.NotFound:
            there = there.rpartition("/")[0]
        if not there and not path.startswith("/"):
            raise StorageError(f"{uri}: no such bucket or container; create it, or name another")
        probe = f"{there}/.{uuid.uuid4().hex}{PARTIAL}"
        with filesystem.open_output_stream(probe) as file:
            file.write(b"1")
        filesystem.delete_file(probe)


def _arrow_filesystem(kind: Any, uri: str) -> tuple[Any, str]:
    try:
        filesystem, path = kind.from_uri(uri)
    except Exception as error:
        raise ValueError(
            f"{uri!r}: no storage of this kind ({error}); give a local path, s3://, https:// or "
            "another scheme that pyarrow.fs.FileSystem.from_uri knows"
        ) from None
    return filesystem, path
