"""The storage seam on a real S3 server."""

import pytest

from caption_ray import storage


def test_what_is_written_is_read_back(bucket):
    uri = storage.join(bucket, "a/b.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.size(uri) == 10
    with storage.open_seekable(uri) as file:
        file.seek(-3, 2)
        assert file.read() == b"789"


def test_large_objects_go_up_in_parts(bucket):
    data = bytes(range(256)) * 80_000  # 20 MB, above boto3's threshold of 8
    storage.write_bytes(storage.join(bucket, "large"), data)
    assert storage.digest(storage.read_bytes(storage.join(bucket, "large"))) == storage.digest(data)


def test_missing_objects_and_buckets_raise_file_not_found(bucket):
    for uri in (storage.join(bucket, "nothing"), "s3://no-such-bucket-anywhere/x"):
        with pytest.raises(FileNotFoundError, match="nothing|no-such-bucket"):
            storage.read_bytes(uri)
        assert not storage.exists(uri)
    assert storage.list_files(storage.join(bucket, "nothing")) == []


def test_listing_and_deleting_folders(bucket):
    for name in ("run/a/1", "run/a/2", "run/b/3", "runner/4"):
        storage.write_bytes(storage.join(bucket, name), b"x")
    run = storage.join(bucket, "run")
    assert storage.list_files(run) == [storage.join(run, name) for name in ("a/1", "a/2", "b/3")]
    assert storage.list_folders(run) == ["a", "b"]
    storage.delete(run)
    assert storage.list_files(bucket) == [storage.join(bucket, "runner/4")]


def test_wrong_credentials_are_reported_with_the_uri(bucket, monkeypatch):
    storage.write_bytes(storage.join(bucket, "x"), b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage._backend.cache_clear()
    try:
        with pytest.raises(storage.StorageError, match=r"s3://.*/x: .*403.*|.*Signature"):
            storage.read_bytes(storage.join(bucket, "x"))
    finally:
        storage._backend.cache_clear()
