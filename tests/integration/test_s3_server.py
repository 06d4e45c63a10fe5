"""The server behind the ``s3`` fixture answers unmodified boto3 and pyarrow as S3 does."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

boto3 = pytest.importorskip("boto3")
from botocore.exceptions import ClientError  # noqa: E402
from pyarrow import fs  # noqa: E402

MEBIBYTE = 2**20


@pytest.fixture
def name(bucket: str) -> str:
    return bucket.removeprefix("s3://")


@pytest.fixture
def client(bucket: str) -> Any:
    return boto3.client("s3")


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def refusal(call: Any, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def test_an_object_comes_back_as_it_was_put(client: Any, name: str) -> None:
    data = random_bytes(100_000)
    client.put_object(Bucket=name, Key="a/b c/é.bin", Body=data, Metadata={"part": "one"})
    answer = client.get_object(Bucket=name, Key="a/b c/é.bin")
    assert answer["Body"].read() == data
    assert answer["Metadata"] == {"part": "one"}
    assert client.head_object(Bucket=name, Key="a/b c/é.bin")["ContentLength"] == len(data)


@pytest.mark.parametrize(
    ("byte_range", "expected"),
    [
        ("bytes=10-19", slice(10, 20)),
        ("bytes=-7", slice(93, 100)),
        ("bytes=90-999", slice(90, 100)),
    ],
)
def test_a_range_is_answered_with_206_and_its_bytes(
    client: Any, name: str, byte_range: str, expected: slice
) -> None:
    data = random_bytes(100)
    client.put_object(Bucket=name, Key="key", Body=data)
    answer = client.get_object(Bucket=name, Key="key", Range=byte_range)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["Body"].read() == data[expected]


def test_a_listing_is_current_sorted_paged_and_folded_at_the_delimiter(
    client: Any, name: str
) -> None:
    keys = [f"run/{index}" for index in range(5)] + ["run/deep/x", "other"]
    for key in keys:
        client.put_object(Bucket=name, Key=key, Body=b"x")
    client.delete_object(Bucket=name, Key="run/3")
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=name, Prefix="run/", Delimiter="/", PaginationConfig={"PageSize": 2}
    )
    pages = list(pages)
    assert len(pages) == 3
    listed = [item["Key"] for page in pages for item in page.get("Contents", [])]
    assert listed == ["run/0", "run/1", "run/2", "run/4"]
    folded = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
    assert folded == ["run/deep/"]


def test_a_file_uploaded_in_parts_is_one_object(client: Any, name: str, tmp_path: Path) -> None:
    data = random_bytes(20 * MEBIBYTE)
    (tmp_path / "sent").write_bytes(data)
    client.upload_file(str(tmp_path / "sent"), name, "big")
    assert client.head_object(Bucket=name, Key="big")["ETag"].endswith('-3"')
    client.download_file(name, "big", str(tmp_path / "received"))
    assert (tmp_path / "received").read_bytes() == data
    start, end = 8 * MEBIBYTE - 5, 8 * MEBIBYTE + 5
    across = client.get_object(Bucket=name, Key="big", Range=f"bytes={start}-{end - 1}")
    assert across["Body"].read() == data[start:end]
    assert [item["Key"] for item in client.list_objects_v2(Bucket=name)["Contents"]] == ["big"]


def test_an_upload_in_parts_is_invisible_until_completed(client: Any, name: str) -> None:
    where = {"Bucket": name, "Key": "key"}
    upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}
    tag = client.upload_part(**upload, PartNumber=1, Body=b"data")["ETag"]
    assert refusal(client.get_object, **where) == (404, "NoSuchKey")
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0
    parts = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
    client.complete_multipart_upload(**upload, MultipartUpload=parts)
    assert client.get_object(**where)["Body"].read() == b"data"


def test_a_copy_outlives_its_source(client: Any, name: str) -> None:
    client.put_object(Bucket=name, Key="source", Body=b"data")
    client.copy_object(Bucket=name, Key="copy", CopySource={"Bucket": name, "Key": "source"})
    client.delete_object(Bucket=name, Key="source")
    assert refusal(client.get_object, Bucket=name, Key="source") == (404, "NoSuchKey")
    assert client.get_object(Bucket=name, Key="copy")["Body"].read() == b"data"


def test_deleting_what_is_not_there_is_no_error(client: Any, name: str) -> None:
    answer = client.delete_object(Bucket=name, Key="absent")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 204


def test_a_reader_sees_an_old_or_a_new_object_and_no_mixture(client: Any, name: str) -> None:
    size = 300_000
    where = {"Bucket": name, "Key": "key"}
    client.put_object(**where, Body=bytes(size))

    def overwrite(value: int) -> None:
        client.put_object(**where, Body=bytes([value]) * size)

    seen = set()
    with ThreadPoolExecutor(1) as writer:
        writes = [writer.submit(overwrite, value) for value in range(1, 41)]
        while not all(write.done() for write in writes):
            data = client.get_object(**where)["Body"].read()
            assert data == data[:1] * size
            seen.add(data[0])
    for write in writes:
        write.result()
    assert len(seen) > 2
    assert client.get_object(**where)["Body"].read() == bytes([40]) * size


def test_a_conditional_put_refuses_to_overwrite(client: Any, name: str) -> None:
    where = {"Bucket": name, "Key": "key"}
    client.put_object(**where, Body=b"first", IfNoneMatch="*")
    refused = refusal(client.put_object, **where, Body=b"second", IfNoneMatch="*")
    assert refused == (412, "PreconditionFailed")
    assert client.get_object(**where)["Body"].read() == b"first"


def test_a_body_that_fails_its_checksum_is_refused(client: Any, name: str) -> None:
    wrong = {"Body": b"data", "ChecksumCRC32": "AAAAAA=="}
    assert refusal(client.put_object, Bucket=name, Key="key", **wrong) == (400, "BadDigest")
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0


def test_a_wrong_secret_is_refused(client: Any, name: str, s3: Any) -> None:
    stranger = boto3.client(
        "s3", aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key + "?"
    )
    refused = refusal(stranger.put_object, Bucket=name, Key="key", Body=b"data")
    assert refused == (403, "SignatureDoesNotMatch")
    assert refusal(stranger.list_objects_v2, Bucket=name) == (403, "SignatureDoesNotMatch")
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0


def test_a_presigned_url_needs_no_credentials(client: Any, name: str) -> None:
    client.put_object(Bucket=name, Key="key", Body=b"data")
    url = client.generate_presigned_url("get_object", {"Bucket": name, "Key": "key"})
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"data"


def test_a_missing_bucket_is_named_as_such(client: Any, name: str) -> None:
    refused = refusal(client.put_object, Bucket=f"{name}-absent", Key="key", Body=b"data")
    assert refused == (404, "NoSuchBucket")


@pytest.mark.parametrize("size", [0, 1000, 12 * MEBIBYTE])
def test_pyarrow_reads_what_it_wrote(bucket: str, size: int) -> None:
    filesystem, root = fs.FileSystem.from_uri(bucket)
    data = random_bytes(size)
    with filesystem.open_output_stream(f"{root}/deep/file") as stream:
        stream.write(data)
    with filesystem.open_input_file(f"{root}/deep/file") as file:
        assert file.size() == size
        assert file.read() == data
        file.seek(size // 2)
        assert file.read(10) == data[size // 2 :][:10]


def test_pyarrow_lists_copies_moves_and_deletes(client: Any, bucket: str) -> None:
    filesystem, root = fs.FileSystem.from_uri(bucket)
    client.put_object(Bucket=root, Key="a/x", Body=b"data")
    filesystem.copy_file(f"{root}/a/x", f"{root}/a/y")
    filesystem.move(f"{root}/a/x", f"{root}/a/z")
    filesystem.copy_file(f"{root}/a/z", f"{root}/a/w")
    filesystem.delete_file(f"{root}/a/w")
    listed = filesystem.get_file_info(fs.FileSelector(f"{root}/a", recursive=True))
    assert sorted((info.path, info.size) for info in listed) == [
        (f"{root}/a/y", 4),
        (f"{root}/a/z", 4),
    ]
    assert client.get_object(Bucket=root, Key="a/z")["Body"].read() == b"data"
