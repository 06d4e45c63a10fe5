"""`s3://` with boto3: its credential chain, and `AWS_ENDPOINT_URL` for servers such as MinIO."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from caption_ray.storage.common import (
    CONNECT_TIMEOUT,
    Buffer,
    DamagedError,
    create_after_a_look,
    read_into,
    read_timeout,
    time_limit,
    wrong_kind,
)
from caption_ray.storage.failures import error_code, http_status, no_bucket
from caption_ray.storage.uris import split_bucket

PART_BYTES = 8 << 20
"""Larger objects are uploaded in parts of this size, in bytes."""


class S3:
    """`s3://bucket/key` with boto3."""

    def __init__(self) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        # a session of its own: the default one remembers the first credentials it saw
        self.client = boto3.session.Session().client(
            "s3",
            config=Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=read_timeout(),
                # one quick retry of each request, so that a part which fails does not cost the
                # whole object; the patience is in storage/__init__.py
                retries={"mode": "standard", "total_max_attempts": 2},
                max_pool_connections=32,
            ),
        )
        self.transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES
        )
        self.doubted: dict[str, str] = {}
        """URI -> MD5 of the bytes last read, where the server's ETag differs from it."""
        self.opaque: set[str] = set()
        """Buckets whose ETags are no MD5 of the content."""
        self.known: set[str] = set()
        """Buckets that are known to exist."""

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
            return read_into(answer["Body"].readinto, answer["ContentLength"])

    @contextmanager
    def opened(self, uri: str, **options: str) -> Iterator[dict[str, Any]]:
        """The server's response. Its `Body` is unread, and must be read within its time limit."""
        bucket, key = split_bucket(uri)
        answer = self.client.get_object(Bucket=bucket, Key=key, **options)
        # boto3 offers no other way to the connection than this private name
        with time_limit(answer["Body"]._raw_stream, answer["ContentLength"]):
            yield answer

    def compare_with_etag(self, uri: str, data: bytes, answer: dict[str, Any]) -> None:
        """Raise DamagedError if the server's ETag says that these are not the object's bytes.

        Not every ETag is an MD5 (objects in parts, encryption, directory buckets). One that is
        not contradicts any number of equal reads, while no two damaged reads are alike.
        """
        bucket, _ = split_bucket(uri)
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
        bucket, key = split_bucket(uri)
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

    def create(self, uri: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        bucket, key = split_bucket(uri)
        try:
            self.client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if http_status(error) == 501:  # a server that knows no conditions
                return create_after_a_look(self, uri, data)
            if http_status(error) not in (409, 412):  # others were at it, or had been
                raise
            return False
        return True

    def size(self, uri: str) -> int:
        bucket, key = split_bucket(uri)
        if not key:
            raise FileNotFoundError(f"{uri}: a bucket, not an object")
        try:
            return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])
        except Exception as error:
            if http_status(error) == 404:
                self.require_bucket(uri)
            raise

    def require_bucket(self, uri: str) -> None:
        """Raise StorageError if the bucket is missing, which the answer to a HEAD of one of its
        objects does not tell from a missing object."""
        bucket, _ = split_bucket(uri)
        if bucket in self.known:
            return
        try:
            self.client.head_bucket(Bucket=bucket)
        except Exception as error:
            if http_status(error) == 404:
                raise no_bucket(uri) from None
            if http_status(error) != 403:  # there, but not to be asked for
                raise
        self.known.add(bucket)

    def pages(self, operation: str, uri: str, **options: str) -> Iterator[dict[str, Any]]:
        bucket, key = split_bucket(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        paginator = self.client.get_paginator(operation)
        return iter(paginator.paginate(Bucket=bucket, Prefix=prefix, **options))

    def walk(self, uri: str) -> Iterator[str]:
        bucket, _ = split_bucket(uri)
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
            bucket, key = split_bucket(file)
            self.client.delete_object(Bucket=bucket, Key=key)

    def delete_partial(self, uri: str) -> None:
        from botocore.exceptions import ClientError

        bucket, key = split_bucket(uri)
        pages = self.client.get_paginator("list_multipart_uploads")
        try:
            for page in pages.paginate(Bucket=bucket, Prefix=key):
                for upload in page.get("Uploads", []):
                    if not key or f"{upload['Key']}/".startswith(f"{key}/"):
                        where = {"Bucket": bucket, "Key": upload["Key"]}
                        self.client.abort_multipart_upload(**where, UploadId=upload["UploadId"])
        except ClientError as error:
            # not allowed, or not known to this server: the parts cost money, but harm nobody
            if error_code(error) != "AccessDenied" and http_status(error) not in (405, 501):
                raise
            logging.getLogger(__name__).warning("%s: unfinished uploads stay (%s)", uri, error)

    def check_writable(self, uri: str, folder: bool) -> None:
        bucket, key = split_bucket(uri)
        if self.holds_other(uri, folder):
            raise wrong_kind(uri, folder)
        # Only a write proves that one may write. An upload in parts is begun and given up: unlike
        # a small object that is put and deleted, it is never seen, makes no version in a bucket
        # that keeps them, needs no right to delete, and leaves the object of this name alone.
        where = {"Bucket": bucket, "Key": f"{key}/.check".lstrip("/") if folder else key}
        upload = self.client.create_multipart_upload(**where)["UploadId"]
        self.client.abort_multipart_upload(**where, UploadId=upload)

    def holds_other(self, uri: str, folder: bool) -> bool:
        """Whether there is an object in place of a folder, or a folder in place of an object."""
        _, key = split_bucket(uri)
        try:
            if folder:
                return bool(key) and self.size(uri) >= 0
            return not key or next(self.walk(uri), None) is not None
        except Exception as error:
            if http_status(error) in (403, 404) and error_code(error) != "NoSuchBucket":
                return False  # not there, or not to be read, which is no reason not to write
            raise


def _etag(data: bytes) -> str:
    """The ETag of an unencrypted object on S3 servers: its MD5, or the MD5 of its parts' MD5s."""

    def md5(part: bytes | memoryview) -> Any:
        return hashlib.md5(part, usedforsecurity=False)

    if len(data) < PART_BYTES:
        return str(md5(data).hexdigest())
    view = memoryview(data)
    parts = [md5(view[start : start + PART_BYTES]) for start in range(0, len(data), PART_BYTES)]
    return f"{md5(b''.join(part.digest() for part in parts)).hexdigest()}-{len(parts)}"
