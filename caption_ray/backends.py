"""The kinds of storage behind `storage.py`: local folders, S3, web servers, and pyarrow's.

Each does one thing once. Whether it is worth trying again is decided in storage.py.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

import numpy as np

READ_TIMEOUT_VARIABLE = "CAPTION_RAY_READ_TIMEOUT"
"""Environment variable that changes READ_TIMEOUT, on all nodes."""

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = float(os.environ.get(READ_TIMEOUT_VARIABLE, 30))
"""Seconds of silence after which a remote server counts as hung."""

SLOWEST_RATE = 100_000
"""Bytes a second, below which a body that trickles in counts as hung (READ_TIMEOUT on top): time
enough for eight readers that share a slow line, and an end to one byte a second."""

PART_BYTES = 8 << 20
"""Larger objects go to S3 in parts of this size."""

READ_BYTES = 1 << 20
"""How much of a large object is read at a time."""

PARTIAL = ".part"
"""Suffix of files that are being written."""


class StorageError(OSError):
    """Storage that does not answer, refuses, or holds something else than it should."""


class DamagedError(StorageError):
    """Bytes that are not those that were written. Damage on the way is mended by another try."""


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


class Local:
    """Paths on this machine, as `storage.resolve` makes them."""

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        with open(uri, "rb") as file:
            if window is None:
                return file.read()
            file.seek(window[0])
            return file.read(window[1])

    def read_large(self, uri: str) -> Buffer:
        with open(uri, "rb", buffering=0) as file:
            return _read_into(file.readinto, os.fstat(file.fileno()).st_size)

    def write(self, uri: str, data: bytes) -> None:
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
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


class S3:
    """`s3://bucket/key` through boto3."""

    def __init__(self) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        # a session of its own: the default one remembers the first credentials it saw
        self.client = boto3.session.Session().client(
            "s3",
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                # one quick retry of each request, so that a part which fails does not cost the
                # whole object; the patience is in storage.py
                retries={"mode": "standard", "total_max_attempts": 2},
                max_pool_connections=32,
            ),
        )
        self.transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES
        )
        self.doubted: dict[str, str] = {}
        """URI -> MD5 of what was read last where the server's ETag is another one."""
        self.opaque: set[str] = set()
        """Buckets whose ETags are no MD5 of the content."""

    @staticmethod
    def split(uri: str) -> tuple[str, str]:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r}: give s3://bucket/key")
        return bucket, key

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        extra = {"Range": f"bytes={window[0]}-{window[0] + window[1] - 1}"} if window else {}
        with self.opened(uri, **extra) as answer:
            data: bytes = answer["Body"].read()
        if window is None:
            self.compare_with_etag(uri, data, answer)
        return data

    def read_large(self, uri: str) -> Buffer:
        # not compared with its ETag: an MD5 takes longer than all else together
        with self.opened(uri) as answer:
            return _read_into(answer["Body"].readinto, answer["ContentLength"])

    @contextmanager
    def opened(self, uri: str, **options: str) -> Iterator[dict[str, Any]]:
        """The server's answer, its `Body` still to be read within the time that it may take."""
        bucket, key = self.split(uri)
        answer = self.client.get_object(Bucket=bucket, Key=key, **options)
        # boto3 offers no other way to the connection than this private name
        with _time_limit(answer["Body"]._raw_stream, answer["ContentLength"]):
            yield answer

    def compare_with_etag(self, uri: str, data: bytes, answer: dict[str, Any]) -> None:
        """Raise DamagedError if the server's ETag says that these are not the object's bytes.

        Not every ETag is an MD5 (objects in parts, encryption, directory buckets). One that is
        not contradicts any number of equal reads, while no two damaged reads are alike.
        """
        bucket, _ = self.split(uri)
        etag = answer.get("ETag", "").strip('"')
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest == etag or "-" in etag or bucket in self.opaque:
            return
        if self.doubted.pop(uri, None) == digest:
            self.opaque.add(bucket)
            return
        self.doubted[uri] = digest
        raise DamagedError(f"{uri}: bytes of MD5 {digest} where the server's ETag is {etag}")

    def write(self, uri: str, data: bytes) -> None:
        bucket, key = self.split(uri)
        # objects above PART_BYTES go in parts; either way they appear at once
        self.client.upload_fileobj(io.BytesIO(data), bucket, key, Config=self.transfer)
        # servers that know the checksums which boto3 sends have compared them; not all do
        stored = self.client.head_object(Bucket=bucket, Key=key)
        if stored["ContentLength"] == len(data) and stored.get("ETag", "").strip('"') == _etag(
            data
        ):
            return
        if self.read(uri, None) != data:  # an ETag that is no MD5 is no reason to complain
            raise DamagedError(f"{uri}: the server does not hold what was sent")

    def size(self, uri: str) -> int:
        bucket, key = self.split(uri)
        if not key:
            raise FileNotFoundError(f"{uri}: a bucket, not an object")
        return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])

    def pages(self, operation: str, uri: str, **options: str) -> Iterator[dict[str, Any]]:
        bucket, key = self.split(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        paginator = self.client.get_paginator(operation)
        return iter(paginator.paginate(Bucket=bucket, Prefix=prefix, **options))

    def walk(self, uri: str) -> Iterator[str]:
        bucket, _ = self.split(uri)
        for page in self.pages("list_objects_v2", uri):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield f"s3://{bucket}/{item['Key']}"

    def folders(self, uri: str) -> Iterator[str]:
        for page in self.pages("list_objects_v2", uri, Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield item["Prefix"].rstrip("/").rsplit("/", 1)[-1]

    def delete(self, uri: str) -> None:
        # one by one: the batch call needs a Content-MD5 that not every S3 server still accepts
        for file in [*self.walk(uri), uri]:
            bucket, key = self.split(file)
            self.client.delete_object(Bucket=bucket, Key=key)

    def delete_partial(self, uri: str) -> None:
        from botocore.exceptions import ClientError

        bucket, key = self.split(uri)
        pages = self.client.get_paginator("list_multipart_uploads")
        try:
            for page in pages.paginate(Bucket=bucket, Prefix=key):
                for upload in page.get("Uploads", []):
                    if not key or f"{upload['Key']}/".startswith(f"{key}/"):
                        where = {"Bucket": bucket, "Key": upload["Key"]}
                        self.client.abort_multipart_upload(**where, UploadId=upload["UploadId"])
        except ClientError as error:
            # not allowed, or not known to this server: the parts cost money, but harm nobody
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 405, 501):
                raise
            logging.getLogger(__name__).warning("%s: unfinished uploads stay (%s)", uri, error)


def _etag(data: bytes) -> str:
    """What S3 servers name an unencrypted object: its MD5, or that of the MD5s of its parts."""

    def md5(part: bytes | memoryview) -> Any:
        return hashlib.md5(part, usedforsecurity=False)

    if len(data) < PART_BYTES:
        return str(md5(data).hexdigest())
    view = memoryview(data)
    parts = [md5(view[start : start + PART_BYTES]) for start in range(0, len(data), PART_BYTES)]
    return f"{md5(b''.join(part.digest() for part in parts)).hexdigest()}-{len(parts)}"


class Http:
    """Read-only: COCO's own zips by URL."""

    def __init__(self) -> None:
        import urllib3

        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5)
        self.pool = urllib3.PoolManager(maxsize=32, timeout=timeout, retries=retries)

    def request(self, method: str, uri: str, headers: dict[str, str]) -> Any:
        """The answer, its body still to be read; raises for an error."""
        response = self.pool.request(
            method, quote(uri, safe=":/?&=%+~@,"), headers=headers, preload_content=False
        )
        if response.status < 400:
            return response
        response.close()
        if response.status in (404, 410):
            raise FileNotFoundError(f"{uri}: HTTP {response.status}")
        raise HttpStatus(response.status)

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        headers = {}
        if window is not None:
            headers["Range"] = f"bytes={window[0]}-{window[0] + window[1] - 1}"
        response = self.request("GET", uri, headers)
        if window is not None and response.status != 206:
            response.close()  # instead of reading the whole of it
            raise ValueError(f"{uri}: this server does not serve ranges; download the file first")
        with _time_limit(response, int(response.headers.get("Content-Length", 0))):
            data: bytes = response.read()
        response.release_conn()
        return data

    def read_large(self, uri: str) -> Buffer:
        return self.read(uri, None)

    def write(self, uri: str, data: bytes) -> None:
        raise ValueError(f"{uri}: cannot write to a web server; give a local path or a bucket")

    def size(self, uri: str) -> int:
        response = self.request("HEAD", uri, {})
        response.release_conn()
        length = response.headers.get("Content-Length")
        if length is None:
            raise ValueError(f"{uri}: the server does not say how long this is; download it first")
        return int(length)

    def walk(self, uri: str) -> Iterator[str]:
        return iter(())  # a web server has no listing

    folders = walk

    def delete(self, uri: str) -> None:
        self.write(uri, b"")

    delete_partial = delete


@contextmanager
def _time_limit(response: Any, length: int) -> Iterator[None]:
    """Break off a body of `length` bytes that comes too slowly, which no socket time-out notices:
    each byte starts that anew. `response` is urllib3's."""
    limit, expired = READ_TIMEOUT + length / SLOWEST_RATE, threading.Event()

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


def _read_into(readinto: Callable[[memoryview], int | None], length: int) -> memoryview:
    """At most `length` bytes of a stream, fewer if it ends before, in memory of huge pages: numpy
    asks for these, which spares two thirds of the time of a plain read of a file."""
    buffer = np.empty(length, np.uint8).data
    at = 0
    # a stream that makes its own copy of what is asked for shall ask for little
    while at < length and (count := readinto(buffer[at : at + READ_BYTES])):
        at += count
    return buffer[:at]


class Arrow:
    """Any other scheme that pyarrow knows (gs://, hdfs://, abfs://)."""

    def open(self, uri: str) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

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
                yield f"{uri.rstrip('/')}/{entry.path[len(root) :].strip('/')}"

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
        _, beside = self.entries(uri.rstrip("/").rsplit("/", 1)[0], recursive=False)
        _, below = self.entries(uri, recursive=True)
        for entry in [*beside, *below]:
            ours = entry.path.startswith((f"{path}.", f"{path}/"))
            if ours and entry.is_file and entry.path.endswith(PARTIAL):
                filesystem.delete_file(entry.path)


def _arrow_filesystem(kind: Any, uri: str) -> tuple[Any, str]:
    try:
        filesystem, path = kind.from_uri(uri)
    except Exception as error:
        raise ValueError(
            f"{uri!r}: no storage of this kind ({error}); give a local path, s3://, https:// or "
            "another scheme that pyarrow.fs.FileSystem.from_uri knows"
        ) from None
    return filesystem, path
