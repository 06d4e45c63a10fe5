import os
import threading
from functools import partial

import pytest

from caption_ray import storage
from caption_ray.storage import arrow


def test_what_is_written_is_read_back(tmp_path):
    uri = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.size(uri) == 10
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


@pytest.mark.parametrize("known", [storage.checksum, storage.digest], ids=["now", "once"])
@pytest.mark.parametrize("length", [0, 10, 3_000_001])
def test_what_is_known_is_read_whole_or_not_at_all(tmp_path, known, length):
    uri, data = str(tmp_path / "a.bin"), os.urandom(length)
    storage.write_bytes(uri, data)
    assert bytes(storage.read_verified(uri, length, known(data))) == data
    others = [data + b"1", data[:-1] + bytes([data[-1] ^ 1]) if data else b"2"]
    for other in others:
        storage.write_bytes(uri, other)
        with pytest.raises(storage.DamagedError, match="not those which were written"):
            storage.read_verified(uri, length, known(data))


def test_a_range_past_the_end_is_an_error(tmp_path):
    uri = str(tmp_path / "short")
    storage.write_bytes(uri, b"abc")
    with pytest.raises(storage.StorageError, match="short: 1 bytes at 2 where 5"):
        storage.read_range(uri, 2, 5)


def test_missing_objects_raise_file_not_found(tmp_path):
    for operation in (storage.read_bytes, storage.size, partial(storage.read_range, start=0,
                                                                length=1)):  # fmt: skip
        with pytest.raises(FileNotFoundError, match="nothing"):
            operation(str(tmp_path / "nothing"))
    assert not storage.exists(str(tmp_path / "nothing"))
    assert not storage.exists(str(tmp_path))
    assert storage.list_files(str(tmp_path / "nothing")) == []
    storage.delete(str(tmp_path / "nothing"))


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path, monkeypatch):
    uri = str(tmp_path / "index.json")
    storage.write_bytes(uri, b"old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["index.json"]


def test_readers_see_whole_files_while_a_writer_replaces_them(tmp_path):
    uri = str(tmp_path / "pointer")
    versions = [bytes([letter]) * 200_000 for letter in b"ab"]
    storage.write_bytes(uri, versions[0])
    done = threading.Event()

    def write():
        for number in range(60):
            storage.write_bytes(uri, versions[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert storage.read_bytes(uri) in versions
        reads += 1
    writer.join()
    assert reads > 0


def test_listing_and_deleting_folders(tmp_path):
    root = str(tmp_path / "run")
    for name in ("a/1", "a/2", "b/c/3"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert storage.list_files(root) == [storage.join(root, n) for n in ("a/1", "a/2", "b/c/3")]
    assert storage.list_folders(root) == ["a", "b"]
    storage.delete(storage.join(root, "a"))
    assert storage.list_folders(root) == ["b"]


def test_upload_and_download_move_whole_folders(tmp_path):
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "file").write_bytes(b"1")
    (tmp_path / "from" / "other").write_bytes(b"2")
    storage.upload(tmp_path / "from", str(tmp_path / "there"))
    back = storage.download(str(tmp_path / "there"), tmp_path / "back")
    assert (back / "deep" / "file").read_bytes() == b"1"
    assert (back / "other").read_bytes() == b"2"


def test_resolved_paths_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("./runs") == str(tmp_path.resolve() / "runs")
    assert storage.resolve(f"file://{tmp_path}") == str(tmp_path.resolve())
    assert storage.resolve("s3://bucket/a/") == "s3://bucket/a"


def test_an_unknown_scheme_names_the_ones_that_work():
    with pytest.raises(ValueError, match=r"ftp2://x/y.*s3://"):
        storage.read_bytes("ftp2://x/y")


def test_web_servers_are_read_by_range(web, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 10_000)
    uri = f"{web.address}/file"
    assert storage.size(uri) == 2_560_000
    assert storage.read_range(uri, 256_001, 3) == bytes([1, 2, 3])
    with storage.open_seekable(uri) as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == bytes([254, 255])
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri + "2")
    with pytest.raises(ValueError, match="cannot write"):
        storage.write_bytes(uri, b"")


def test_passing_server_errors_are_retried_and_lasting_ones_reported(web, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    (tmp_path / "file").write_bytes(b"data")
    uri = f"{web.address}/file"
    web.handler.failures = 3
    assert storage.read_bytes(uri) == b"data"
    web.handler.failures = 1000
    with pytest.raises(storage.StorageError, match=r"/file: .*503.*tried 6 times"):
        storage.read_bytes(uri)


def test_redirects_of_web_servers_are_followed(web, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_bytes(b"moved here")
    # the server answers 301 to a folder without a slash
    assert storage.read_bytes(f"{web.address}/folder") == b"moved here"


def test_what_killed_writers_left_is_removed_where_asked_and_nowhere_else(tmp_path):
    whole = [tmp_path / "a" / "b" / "x.json", tmp_path / "a" / "y.part"]
    mine = [tmp_path / "a" / "b" / ".x.json.1.part", tmp_path / ".a.2.part"]
    others = [tmp_path / ".ab.3.part", tmp_path / "c" / ".x.json.4.part"]
    for path in (*whole, *mine, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    storage.delete_partial(str(tmp_path / "a"))
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {*whole, *others}


def test_the_time_out_is_read_when_it_is_needed(monkeypatch):
    monkeypatch.setenv(storage.READ_TIMEOUT_VARIABLE, "7.5")
    storage._backend.cache_clear()
    backend = storage._backend("http", os.getpid())
    assert backend.pool.connection_pool_kw["timeout"].read_timeout == 7.5
    storage._backend.cache_clear()


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_time_out_that_is_none_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv(storage.READ_TIMEOUT_VARIABLE, value)
    storage._backend.cache_clear()
    with pytest.raises(ValueError, match=f"CAPTION_RAY_READ_TIMEOUT is '{value}'"):
        storage.read_bytes("http://127.0.0.1:1/x")


# What Google's and Azure's clients in pyarrow said without credentials.
NO_TOKENS = {
    "gs://bucket": (
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Could "
        "not create a OAuth2 access token to authenticate the request. The request was not sent",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "abfs://container@account": (
        "Unknown error: Check for Hierarchical Namespace support failed: AuthenticationException: "
        "Failed to get token from DefaultAzureCredential. See Azure::Core::Diagnostics::Logger",
        "AZURE_CLIENT_SECRET",
    ),
}


@pytest.mark.parametrize("uri", NO_TOKENS)
def test_a_cloud_without_credentials_is_asked_once_and_says_what_to_set(uri, monkeypatch):
    said, remedy = NO_TOKENS[uri]
    asked = []

    class FileSystem:
        def open_input_file(self, path):
            asked.append(path)
            raise OSError(said)

    monkeypatch.setattr(arrow, "_arrow_filesystem", lambda *_: (FileSystem(), "path"))
    with pytest.raises(storage.StorageError) as caught:
        storage.read_bytes(f"{uri}/a.json")
    assert asked == ["path"]
    assert str(caught.value).startswith(f"{uri}/a.json: no credentials were found; ")
    assert remedy in str(caught.value) and "google::cloud" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "known"),
    [
        ("gs://b/x", "gs://b/x?retry_limit_seconds=5"),
        ("gcs://b/x", "gcs://b/x?retry_limit_seconds=5"),
        ("gs://b/x?scheme=http", "gs://b/x?scheme=http&retry_limit_seconds=5"),
        ("gs://b/x?retry_limit_seconds=60", "gs://b/x?retry_limit_seconds=60"),
        ("abfs://c@a/x", "abfs://c@a/x"),
    ],
)
def test_googles_client_does_not_try_for_minutes_by_itself(uri, known, monkeypatch):
    opened = []
    monkeypatch.setattr(arrow, "_arrow_filesystem", lambda _, uri: opened.append(uri) or (None, ""))
    arrow.Arrow().open(uri)
    assert opened == [known]
