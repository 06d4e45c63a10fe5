"""The one seam to files: local paths, `s3://`, `http(s)://` and what pyarrow's filesystems know.

A `uri` may be remote or local, a `path` is local. Writes commit atomically: a reader sees the old
file or the whole new one. S3 goes through boto3 (its credential chain, `AWS_ENDPOINT_URL` for
MinIO-like servers); reads are retried as a whole, because a body that breaks off half-way is an
error that boto3 does not retry by itself. Functions raise FileNotFoundError for what is not there
and StorageError, naming the URI, for what stays broken.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote

ATTEMPTS = 6
"""How often a remote operation is tried before it counts as broken."""

LONGEST_PAUSE = 20.0
"""Seconds; the upper bound of the pause between two tries."""

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0
"""Seconds of silence after which a remote server counts as hung."""

T = TypeVar("T")


class StorageError(OSError):
    """Storage that does not answer, refuses, or holds something else than it should."""


# URIs -----------------------------------------------------------------------------------------


def scheme(uri: str) -> str:
    """`s3`, `http`, ... or `file` for a local path."""
    head, separator, _ = uri.partition("://")
    return head.lower() if separator else "file"


def resolve(uri: str) -> str:
    """An absolute form of `uri` that means the same in every process and folder."""
    if scheme(uri) != "file":
        return uri.rstrip("/")
    return str(Path(uri.removeprefix("file://")).expanduser().resolve())


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def parent(uri: str) -> str:
    """`uri` without its last part."""
    return uri.rstrip("/").rsplit("/", 1)[0]


# Operations -----------------------------------------------------------------------------------


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    return _retried(uri, lambda backend: backend.read(uri, None))


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start` on; StorageError if the object ends before."""

    def read(backend: Backend) -> bytes:
        data = backend.read(uri, (start, length))
        if len(data) != length:
            raise StorageError(f"{uri}: {len(data)} bytes at {start} where {length} were asked for")
        return data

    return _retried(uri, read) if length else b""


def read_text(uri: str) -> str:
    """The whole object, decoded as UTF-8; ValueError naming the URI if it is something else."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text ({error})") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace the object at once: nobody ever reads a half-written one."""
    _retried(uri, lambda backend: backend.write(uri, data))


def size(uri: str) -> int:
    """Bytes of the object; FileNotFoundError if there is none."""
    return _retried(uri, lambda backend: backend.size(uri))


def exists(uri: str) -> bool:
    """Whether there is an object (not a folder) of this name."""
    try:
        size(uri)
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> list[str]:
    """URIs of all objects below the folder `uri`, sorted; empty if there are none."""
    return sorted(_retried(uri, lambda backend: list(backend.walk(uri))))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; empty if there are none."""
    return sorted(_retried(uri, lambda backend: list(backend.folders(uri))))


def delete(uri: str) -> None:
    """Remove the object or the folder with all that is below it; nothing there is no error."""
    _retried(uri, lambda backend: backend.delete(uri))


def upload(path: str | Path, uri: str) -> None:
    """Copy the files of a local folder below `uri`."""
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
        copy = target / file[len(uri.rstrip("/")) + 1 :]
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(read_bytes(file))
    return target


def digest(data: bytes) -> str:
    """SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def open_seekable(uri: str) -> BinaryIO:
    """A read-only file object that fetches only the ranges that are read (zip directories)."""
    if scheme(uri) == "file":
        return open(resolve(uri), "rb")
    return io.BufferedReader(_RangeFile(uri), buffer_size=1 << 20)


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


# Backends -------------------------------------------------------------------------------------


class Backend(Protocol):
    """What a kind of storage must be able to do."""

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def size(self, uri: str) -> int: ...
    def walk(self, uri: str) -> Iterator[str]: ...
    def folders(self, uri: str) -> Iterator[str]: ...
    def delete(self, uri: str) -> None: ...


class _Local:
    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        with open(resolve(uri), "rb") as file:
            if window is None:
                return file.read()
            file.seek(window[0])
            return file.read(window[1])

    def write(self, uri: str, data: bytes) -> None:
        path = Path(resolve(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
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
        path = Path(resolve(uri))
        if not path.is_file():
            raise FileNotFoundError(f"{uri}: no such file")
        return path.stat().st_size

    def walk(self, uri: str) -> Iterator[str]:
        root = Path(resolve(uri))
        for path in root.rglob("*"):
            if path.is_file() and not path.name.endswith(".part"):
                yield str(path)

    def folders(self, uri: str) -> Iterator[str]:
        root = Path(resolve(uri))
        return (path.name for path in (root.iterdir() if root.is_dir() else ()) if path.is_dir())

    def delete(self, uri: str) -> None:
        path = Path(resolve(uri))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _S3:
    def __init__(self) -> None:
        import boto3
        from botocore.config import Config

        # a session of its own: the default one remembers the first credentials it saw
        self.client = boto3.session.Session().client(
            "s3",
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                retries={"mode": "standard", "max_attempts": 3},
                max_pool_connections=32,
            ),
        )

    @staticmethod
    def split(uri: str) -> tuple[str, str]:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r}: give s3://bucket/key")
        return bucket, key

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        bucket, key = self.split(uri)
        extra = {"Range": f"bytes={window[0]}-{window[0] + window[1] - 1}"} if window else {}
        data: bytes = self.client.get_object(Bucket=bucket, Key=key, **extra)["Body"].read()
        return data

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = self.split(uri)
        # upload_fileobj splits large objects into parts; either way the object appears at once
        self.client.upload_fileobj(io.BytesIO(data), bucket, key)

    def size(self, uri: str) -> int:
        bucket, key = self.split(uri)
        if not key:
            raise FileNotFoundError(f"{uri}: a bucket, not an object")
        return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])

    def pages(self, uri: str, **options: str) -> Iterator[dict[str, Any]]:
        bucket, key = self.split(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        paginator = self.client.get_paginator("list_objects_v2")
        return iter(paginator.paginate(Bucket=bucket, Prefix=prefix, **options))

    def walk(self, uri: str) -> Iterator[str]:
        bucket, _ = self.split(uri)
        for page in self.pages(uri):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield f"s3://{bucket}/{item['Key']}"

    def folders(self, uri: str) -> Iterator[str]:
        for page in self.pages(uri, Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield name(item["Prefix"])

    def delete(self, uri: str) -> None:
        # one by one: the batch call needs a Content-MD5 that not every S3 server still accepts
        for file in [*self.walk(uri), uri]:
            bucket, key = self.split(file)
            self.client.delete_object(Bucket=bucket, Key=key)


class _Http:
    """Read-only: COCO's own zips by URL."""

    def __init__(self) -> None:
        import urllib3

        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        self.pool = urllib3.PoolManager(maxsize=32, timeout=timeout, retries=False)

    def request(self, method: str, uri: str, headers: dict[str, str]) -> Any:
        response = self.pool.request(
            method, quote(uri, safe=":/?&=%+~@,"), headers=headers, redirect=True
        )
        if response.status in (404, 410):
            raise FileNotFoundError(f"{uri}: HTTP {response.status}")
        if response.status >= 400:
            raise _HttpStatus(response.status)
        return response

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        if window is None:
            return bytes(self.request("GET", uri, {}).data)
        span = f"bytes={window[0]}-{window[0] + window[1] - 1}"
        response = self.request("GET", uri, {"Range": span})
        if response.status != 206:
            raise ValueError(f"{uri}: this server does not serve ranges; download the file first")
        return bytes(response.data)

    def write(self, uri: str, data: bytes) -> None:
        raise ValueError(f"{uri}: cannot write to a web server; give a local path or a bucket")

    def size(self, uri: str) -> int:
        length = self.request("HEAD", uri, {}).headers.get("Content-Length")
        if length is None:
            raise ValueError(f"{uri}: the server does not say how long this is; download it first")
        return int(length)

    def walk(self, uri: str) -> Iterator[str]:
        return iter(())  # a web server has no listing

    folders = walk

    def delete(self, uri: str) -> None:
        self.write(uri, b"")


class _HttpStatus(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class _Arrow:
    """Any other scheme that pyarrow knows (gs://, hdfs://, abfs://)."""

    def open(self, uri: str) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        return _arrow_filesystem(FileSystem, uri)

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        filesystem, path = self.open(uri)
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(window[1], window[0]) if window else file.read())

    def write(self, uri: str, data: bytes) -> None:
        filesystem, path = self.open(uri)
        partial = f"{path}.{uuid.uuid4().hex}.part"
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with filesystem.open_output_stream(partial) as file:
            file.write(data)
        filesystem.move(partial, path)

    def size(self, uri: str) -> int:
        from pyarrow.fs import FileType

        filesystem, path = self.open(uri)
        info = filesystem.get_file_info(path)
        if info.type != FileType.File:
            raise FileNotFoundError(f"{uri}: no such file")
        return int(info.size)

    def entries(self, uri: str, recursive: bool) -> Any:
        from pyarrow.fs import FileSelector

        filesystem, path = self.open(uri)
        return path, filesystem.get_file_info(
            FileSelector(path, allow_not_found=True, recursive=recursive)
        )

    def walk(self, uri: str) -> Iterator[str]:
        root, entries = self.entries(uri, recursive=True)
        for entry in entries:
            if entry.is_file and not entry.path.endswith(".part"):
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


def _arrow_filesystem(kind: Any, uri: str) -> tuple[Any, str]:
    try:
        filesystem, path = kind.from_uri(uri)
    except Exception as error:
        raise ValueError(
            f"{uri!r}: no storage of this kind ({error}); give a local path, s3://, https:// or "
            "another scheme that pyarrow.fs.FileSystem.from_uri knows"
        ) from None
    return filesystem, path


@functools.cache
def _backend(kind: str, process: int) -> Backend:
    """One client per process: connection pools must not be shared across a fork."""
    kinds: dict[str, Callable[[], Backend]] = {
        "file": _Local,
        "s3": _S3,
        "http": _Http,
        "https": _Http,
    }
    return kinds.get(kind, _Arrow)()


def _retried(uri: str, operation: Callable[[Backend], T]) -> T:
    kind = scheme(uri)
    backend = _backend(kind, os.getpid())
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation(backend)
        except Exception as error:
            if kind == "file" or isinstance(error, (FileNotFoundError, ValueError)):
                raise
            if _missing(error):
                raise FileNotFoundError(f"{uri}: nothing there") from None
            if not _transient(error) or attempt == ATTEMPTS:
                raise StorageError(
                    f"{uri}: {type(error).__name__}: {error} (tried {attempt} times)"
                ) from error
            # full jitter: many workers that fail together must not come back together
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2**attempt)))
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    if isinstance(error, _HttpStatus):
        return error.status
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    return None


def _missing(error: Exception) -> bool:
    return _status(error) == 404


def _transient(error: Exception) -> bool:
    """Whether the same request may well succeed later."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # wrong settings will not mend themselves; everything below HTTP may
    return type(error).__name__ not in (
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "ParamValidationError",
        "NoRegionError",
        "InvalidRegionError",
    )


def is_local(uri: str) -> bool:
    """Whether `uri` is a path on this machine."""
    return scheme(uri) == "file"
