"""A URI means what URIs mean, or is refused by name before anything is there."""

import os
from functools import partial
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem

from caption_ray import storage

REFUSED = {
    # what is neither a path nor a URI -> what the refusal says, beside the value
    "": "is a variable not set",
    "  ": "names nothing",
    " s3://b/x": "begins with a space",
    " ./runs": "begins with a space",
    "s3://b/x ": "ends with a space",
    "s3://b/x\n": "ends with a space",
    "a\0b": "zero byte",
    "s3:": "write ./s3: for a local file",
    "s3:x": "write ./s3:x for a local file",
    "s3:/b/x": "write s3://",
    "gs:": "write ./gs: for a local file",
    "gs:foo": "write ./gs:foo for a local file",
    "hdfs:": "write ./hdfs: for a local file",
    "http:/x": "write http://",
    "https:host/x": "write https://",
    "file:x": "write file://",
    "12:30.jpg": "write ./12:30.jpg for a local file",
    "C:\\x": "of Windows",
    "c:/x": "of Windows",
    "s3 ://b": "no storage of this kind",
    "ftp2://x/y": "no storage of this kind",
    "://b/x": "no storage of this kind",
    "s3a://b/x": "write s3://",
    "s3://": "write s3://bucket/key",
    "s3:///key": "write s3://bucket/key",
    "s3://$UNSET/x": "is a variable not set",
    "s3://{bucket}/x": "is a variable not set",
    "s3://*/x": "no name of a bucket",
    "s3://../x": "no name of a bucket",
    "s3://b/a/../x": "no . or .. in keys",
    "gs://$UNSET/x": "is a variable not set",
    "gs://": "is a variable not set",
    "http://": "is a variable not set",
    "http:///x": "is a variable not set",
    "http://$HOST/x": "is a variable not set",
    "file://host/x": "another machine",
    "file://": "names no path",
    "file:///a?b": "written %3F",
    "file:///100%": "%25",
    "file:///a%00b": "zero byte",
    "~no-such-user-anywhere/x": "write ./~no-such-user-anywhere/x",
}

OPERATIONS = {
    "resolve": storage.resolve,
    "scheme and resolve": lambda uri: (storage.scheme(uri), storage.resolve(uri)),
    "arrow_uri": storage.arrow_uri,
    "read_bytes": storage.read_bytes,
    "read_range": partial(storage.read_range, start=0, length=1),
    "read_verified": partial(storage.read_verified, length=0, expected=storage.checksum(b"")),
    "read_text": storage.read_text,
    "write_bytes": partial(storage.write_bytes, data=b"x"),
    "size": storage.size,
    "exists": storage.exists,
    "list_files": storage.list_files,
    "list_folders": storage.list_folders,
    "delete": storage.delete,
    "delete_partial": storage.delete_partial,
    "open_seekable": storage.open_seekable,
    "upload": lambda uri: storage.upload(Path(__file__).parent, uri),
    "download": lambda uri: storage.download(uri, "copy"),
}


@pytest.mark.parametrize("uri", REFUSED, ids=repr)
def test_what_means_nothing_is_refused_by_name_before_anything_is_there(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, operation in OPERATIONS.items():
        with pytest.raises(ValueError) as caught:
            operation(uri)
        message = str(caught.value)
        assert repr(uri) in message and REFUSED[uri] in message, (name, message)
        assert "\n" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA123:hush@bucket/x",
        "s3://AKIA123:ab/hush@bucket/x",
        "s3://hush@bucket/x",
        "s3:AKIA123:hush@bucket",
        "S3:/AKIA123:hush@bucket",
        "s3://AKIA123:hush@bucket/x ",
        "https://user:hush@host/x",
        "gs://user:hush@bucket/x",
        "ftp2://user:hush@host/x",
    ],
)
def test_credentials_are_refused_and_never_shown(uri):
    for operation in OPERATIONS.values():
        with pytest.raises(ValueError, match=r"\*\*\*@(bucket|host)") as caught:
            operation(uri)
        assert "hush" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("uri", "meaning"),
    [
        ("S3://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("s3://b/x///", "s3://b/x"),
        ("s3://b//x", "s3://b//x"),  # a key that begins with a slash is one
        ("s3://B_u.c-ket/a b%20?#@:.jpg", "s3://B_u.c-ket/a b%20?#@:.jpg"),
        ("HTTPS://Host:8080/a b?token=x/", "https://Host:8080/a%20b?token=x/"),
        ("http://host/a%20b/100%", "http://host/a%20b/100%25"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("GS://b/ä b/", "gs://b/%C3%A4%20b"),
        ("gs://anonymous@b/x", "gs://anonymous@b/x"),
        ("abfs://container@account.dfs.core.windows.net/x",
         "abfs://container@account.dfs.core.windows.net/x"),
        ("hdfs:///x", "hdfs:///x"),
        ("hf://datasets/name/set", "hf://datasets/name/set"),
        ("file:///a%20b", "/a b"),
        ("FILE:/a/b/", "/a/b"),
        ("file://localhost/a%3Fb%25", "/a?b%"),
        ("file:////a", "/a"),
        ("/a%20b?c#d", "/a%20b?c#d"),
        ("/a/s3://b", "/a/s3:/b"),
    ],
)  # fmt: skip
def test_what_means_something_means_what_uris_mean(uri, meaning):
    assert storage.resolve(uri) == meaning
    assert storage.resolve(meaning) == meaning


@pytest.mark.parametrize("form", [":", "/"])
def test_access_points_of_s3_are_buckets(form):
    arn = f"arn:aws:s3:eu-west-1:123456789012:accesspoint{form}mine"
    assert storage.resolve(f"s3://{arn}/a/b") == f"s3://{arn}/a/b"
    with pytest.raises(ValueError, match="access point"):
        storage.arrow_uri(f"s3://{arn}/a/b")


def test_local_names_with_colons_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./12:30.jpg", "photos/a:b", f"{tmp_path}/s3:/b", "./s3:x", "./~me", "photos/~"):
        storage.write_bytes(name, name.encode())
        assert storage.read_bytes(storage.resolve(name)) == name.encode()
    found = storage.list_files(".")
    assert len(found) == 6 and all(storage.exists(uri) for uri in found)


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.resolve("~/runs") == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("folder", "joined"),
    [
        ("https://host/d", "https://host/d/a%20b%3F%25.jpg"),
        ("https://host/d/?token=1", "https://host/d/a%20b%3F%25.jpg?token=1"),
        ("gs://b/d", "gs://b/d/a%20b%3F%25.jpg"),
        ("s3://b/d", "s3://b/d/a b?%.jpg"),
        ("/d", "/d/a b?%.jpg"),
        ("/", "/a b?%.jpg"),
        ("file:///d%20e", "/d e/a b?%.jpg"),
    ],
)
def test_names_are_names_wherever_they_are_joined(folder, joined):
    assert storage.join(folder, "a b?%.jpg") == joined
    assert storage.name(joined) == "a b?%.jpg"
    resolved = storage.resolve(folder)
    assert storage.relative(joined, resolved) == "a b?%.jpg"
    above = storage.parent(joined)
    assert above.replace("d?", "d/?") == resolved


def test_nothing_is_above_a_bucket():
    with pytest.raises(ValueError, match="'s3://bucket'"):
        storage.parent("s3://bucket")


def test_a_checkpoint_list_may_begin_with_a_plain_name():
    from caption_ray.captioning import checkpoint

    assert checkpoint.members("a,s3://b/c") == ["a", "s3://b/c"]


def test_files_are_fetched_from_web_servers_by_their_names(web, tmp_path):
    (tmp_path / "a b").mkdir()
    for name in ("a b?.jpg", "100%.jpg", "é#1.jpg", "%20.jpg", "a+b&c=d;e.jpg"):
        (tmp_path / "a b" / name).write_bytes(name.encode())
        assert storage.read_bytes(storage.join(web.address, "a b", name)) == name.encode()
        assert storage.read_bytes(storage.join(f"{web.address}/a b", name)) == name.encode()


def test_addresses_are_asked_for_as_they_are_given(web, tmp_path, monkeypatch):
    (tmp_path / "a b.zip").write_bytes(b"zip")
    asked = []
    monkeypatch.setattr(
        web.handler, "log_request", lambda self, *_: asked.append(self.path), raising=False
    )
    for given, sent in {
        "/a b.zip?token=a%2Fb/": "/a%20b.zip?token=a%2Fb/",
        "/a%20b.zip": "/a%20b.zip",
        "/a%20b.zip#part": "/a%20b.zip",
    }.items():
        assert storage.read_bytes(web.address + given) == b"zip"
        assert asked.pop() == sent


def test_pyarrow_and_ray_are_given_the_same_place():
    assert storage.arrow_uri("S3://b") == "s3://b"
    assert storage.arrow_uri("s3://b/my runs?é%/") == "s3://b/my%20runs%3F%C3%A9%25"
    assert storage.arrow_uri("/my runs") == "/my runs"
    assert FileSystem.from_uri(storage.arrow_uri("gs://b/my runs"))[1] == "b/my runs"
    with pytest.raises(ValueError, match="'s3://b//runs'"):
        storage.arrow_uri("s3://b//runs")  # s3://b/$UNSET/runs
    with pytest.raises(ValueError, match="allow_bucket_creation") as caught:
        storage.arrow_uri("s3://b?allow_bucket_creation=true")
    assert "no name of a bucket" in str(caught.value)
    escaped = storage.arrow_uri("s3://b/x?allow_bucket_creation=true")
    assert escaped == "s3://b/x%3Fallow_bucket_creation%3Dtrue"
