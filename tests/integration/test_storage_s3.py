"""caption_ray.storage on a real S3 server."""

from functools import partial

import boto3
import pytest
from pyarrow.fs import FileSystem

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
    data = bytes(range(256)) * 80_000  # 20 MB, above boto3's threshold of 8 MB
    storage.write_bytes(storage.join(bucket, "large"), data)
    assert storage.digest(storage.read_bytes(storage.join(bucket, "large"))) == storage.digest(data)


def test_missing_objects_raise_file_not_found(bucket):
    uri = storage.join(bucket, "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.read_bytes(uri)
    assert not storage.exists(uri)
    assert storage.list_files(uri) == []


OPERATIONS = {
    "read": storage.read_bytes,
    "read_range": partial(storage.read_range, start=0, length=1),
    "write": partial(storage.write_bytes, data=b"x"),
    "write in parts": partial(storage.write_bytes, data=bytes(9 << 20)),
    "size": storage.size,
    "exists": storage.exists,
    "list_files": storage.list_files,
    "list_folders": storage.list_folders,
    "delete": storage.delete,
    "delete_partial": storage.delete_partial,
    "check a file": partial(storage.check_writable, folder=False),
    "check a folder": partial(storage.check_writable, folder=True),
}


@pytest.fixture
def settings(monkeypatch):
    """Environment variables that boto3 reads; it has forgotten what it knew, and then again.

    Whatever would have to pause fails."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a pause"))
    storage._backend.cache_clear()
    yield monkeypatch
    storage._backend.cache_clear()


def _buckets():
    return [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_named_at_once_and_never_made(s3, settings, operation):
    before = _buckets()
    uri = "s3://not-there/a/b"
    with pytest.raises(storage.StorageError) as caught:
        OPERATIONS[operation](uri)
    message = f"{uri}: there is no bucket 'not-there'; create it, or correct its name"
    assert str(caught.value) == message
    assert _buckets() == before


def test_ray_never_makes_a_bucket(s3):
    before = _buckets()
    for uri in ("s3://not-there/runs", "s3://not-there/runs?allow_bucket_creation=true"):
        # what RunConfig(storage_path=...) does with it
        filesystem, path = FileSystem.from_uri(storage.arrow_uri(uri))
        with pytest.raises(OSError, match="'not-there' not found"):
            filesystem.create_dir(path)
    assert _buckets() == before


@pytest.mark.parametrize("name", ["my run", "50%", "a?b=c", "a#b", "é", "a%20b", "a+b"])
def test_pyarrow_writes_where_storage_reads(bucket, name):
    uri = storage.join(bucket, name)
    filesystem, path = FileSystem.from_uri(storage.arrow_uri(uri))
    with filesystem.open_output_stream(f"{path}/file") as file:
        file.write(b"1")
    assert storage.read_bytes(storage.join(uri, "file")) == b"1"
    assert storage.list_files(bucket) == [storage.join(uri, "file")]


def test_schemes_are_of_either_case(bucket):
    storage.write_bytes(bucket.replace("s3:", "S3:") + "/x", b"1")
    assert storage.list_files(bucket) == [f"{bucket}/x"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "check AWS_ACCESS_KEY_ID|may not do this|Forbidden"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "check AWS_ACCESS_KEY_ID|may not do this|Forbidden"),
        ({"AWS_PROFILE": "nobody"}, "nobody.*AWS_PROFILE to a profile"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "Unable to locate credentials; set AWS_ACCESS_KEY_ID",
        ),
    ],
)
def test_refused_and_missing_credentials_end_at_once(bucket, settings, tmp_path, variables, reason):
    settings.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        settings.setenv(name, str(tmp_path / "none"))
    for name, value in variables.items():
        settings.delenv(name) if value is None else settings.setenv(name, value)
    uri = f"{bucket}/a/x"
    for operation in OPERATIONS.values():
        with pytest.raises(storage.StorageError, match=rf"^{uri}: .*({reason})") as caught:
            operation(uri)
        assert "tried" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [False, True])
def test_what_can_be_written_is_left_as_it_was(bucket, folder):
    storage.write_bytes(f"{bucket}/old", b"old")
    storage.write_bytes(f"{bucket}/run/x", b"x")
    client, before = boto3.client("s3"), _buckets()
    modified = client.head_object(Bucket=bucket[5:], Key="old")["LastModified"]
    for name in ("new", "a/b/new", "run" if folder else "old", *([""] if folder else [])):
        storage.check_writable(f"{bucket}/{name}", folder=folder)
    assert storage.list_files(bucket) == [f"{bucket}/old", f"{bucket}/run/x"]
    assert storage.read_bytes(f"{bucket}/old") == b"old"
    assert client.head_object(Bucket=bucket[5:], Key="old")["LastModified"] == modified
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket[5:])
    assert _buckets() == before


def test_folders_and_files_are_not_taken_for_each_other(bucket):
    storage.write_bytes(f"{bucket}/run/x", b"x")
    for uri in (bucket, f"{bucket}/run"):
        with pytest.raises(ValueError, match=f"{uri}: .*name a file"):
            storage.check_writable(uri, folder=False)
    with pytest.raises(ValueError, match="/run/x: is there, and no folder"):
        storage.check_writable(f"{bucket}/run/x", folder=True)


def test_listing_and_deleting_folders(bucket):
    for name in ("run/a/1", "run/a/2", "run/b/3", "runner/4"):
        storage.write_bytes(storage.join(bucket, name), b"x")
    run = storage.join(bucket, "run")
    assert storage.list_files(run) == [storage.join(run, name) for name in ("a/1", "a/2", "b/3")]
    assert storage.list_folders(run) == ["a", "b"]
    storage.delete(run)
    assert storage.list_files(bucket) == [storage.join(bucket, "runner/4")]
