"""Where nothing can be written, this is said in one line, and before the work if asked for."""

import os
import subprocess
from functools import partial

import pytest
from pyarrow.fs import LocalFileSystem

from caption_ray import storage
from caption_ray.storage import arrow

WAYS = {
    "file": partial(storage.check_writable, folder=False),
    "folder": partial(storage.check_writable, folder=True),
    "write": partial(storage.write_bytes, data=b"x" * 200_000),
}


def _tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def disk(tmp_path):
    """`disk("ro")`: an empty file system, mounted so."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"only root may mount a disk ({error})")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deep", ["", "a/b/"])
def test_a_read_only_disk_is_named_with_the_reason(disk, way, deep):
    uri = f"{disk('ro')}/{deep}x"
    with pytest.raises(storage.StorageError, match=rf"^{uri}: Read-only.*; choose a place"):
        WAYS[way](uri)


@pytest.mark.parametrize("way", ["file", "write"])
def test_a_full_disk_is_named_with_the_reason_and_keeps_no_remains(disk, way):
    place = disk("size=64k")
    (place / "old").write_bytes(b"x" * 65_536)
    with pytest.raises(storage.StorageError, match=rf"^{place}/x: No space.*; free some space"):
        WAYS[way](f"{place}/x")
    assert os.listdir(place) == ["old"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deep", ["", "a/b/"])
def test_a_place_below_a_file_is_refused(tmp_path, way, deep):
    (tmp_path / "file").write_bytes(b"kept")
    uri = f"{tmp_path}/file/{deep}x"
    with pytest.raises(storage.StorageError, match=rf"^{uri}: .*a part of this path is a file"):
        WAYS[way](uri)
    assert _tree(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["/proc", "/sys/kernel"])
def test_where_the_system_lets_nothing_be_made_is_refused(way, place):
    if not os.path.isdir(place):
        pytest.skip(f"no {place}")
    with pytest.raises(storage.StorageError, match=rf"^{place}/x: .*another place"):
        WAYS[way](f"{place}/x")


def test_what_may_not_be_read_is_no_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", partial(_raise, PermissionError(13, "Permission denied")))
    for operation in (storage.read_bytes, storage.open_seekable):
        with pytest.raises(storage.StorageError, match=r"/x: Permission denied; change its"):
            operation(str(tmp_path / "x"))


def _raise(error, *_, **__):
    raise error


def test_a_folder_or_what_is_below_a_file_is_no_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for uri in (str(tmp_path), f"{tmp_path}/file/x"):
        for operation in (storage.read_bytes, storage.size, storage.open_seekable):
            with pytest.raises(FileNotFoundError, match=f"{uri}: no such file"):
                operation(uri)


@pytest.mark.parametrize("way", ["file", "write"])
def test_folders_and_devices_are_no_files_to_write(tmp_path, way):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for uri in (str(tmp_path), f"{tmp_path}/pipe", f"{tmp_path}/link", "/dev/null"):
        with pytest.raises(ValueError, match="name a file"):
            WAYS[way](uri)
    assert not os.path.isfile("/dev/null") and (tmp_path / "pipe").is_fifo()


def test_a_name_that_ends_with_a_slash_is_no_file(tmp_path):
    for uri in (f"{tmp_path}/new/", "s3://bucket/new/"):
        with pytest.raises(ValueError, match=f"{uri}: a folder"):
            storage.check_writable(uri, folder=False)


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="/file: is there, and no folder"):
        storage.check_writable(f"{tmp_path}/file", folder=True)


@pytest.mark.parametrize("folder", [False, True])
def test_what_can_be_written_is_left_as_it_was(tmp_path, folder):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "run").mkdir()
    before = _tree(tmp_path)
    for uri in ("new", "a/b/new", "run" if folder else "old"):
        storage.check_writable(f"{tmp_path}/{uri}", folder=folder)
        storage.check_writable(f"file://{tmp_path}/{uri}", folder=folder)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("folder", [False, True])
def test_web_servers_and_mistyped_schemes_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("http://127.0.0.1:1/x", "s3:/b/x", "s3://$UNSET/x", "gs:"):
        with pytest.raises(ValueError) as caught:
            storage.check_writable(uri, folder=folder)
        assert uri in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """gs://bucket, which is a local folder."""

    def filesystem(_, uri):
        path = uri.partition("?")[0].removeprefix("gs:/").rstrip("/")
        return LocalFileSystem(), str(tmp_path) + path

    monkeypatch.setattr(arrow, "_arrow_filesystem", filesystem)
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_what_pyarrow_can_write_is_left_as_it_was(cloud):
    (cloud / "old").write_bytes(b"old")
    (cloud / "run").mkdir()
    before = _tree(cloud)
    storage.check_writable("gs://bucket/old", folder=False)
    storage.check_writable("gs://bucket/a/b", folder=False)
    storage.check_writable("gs://bucket/a/b", folder=True)
    storage.check_writable("gs://bucket/run", folder=True)
    with pytest.raises(ValueError, match="name a file"):
        storage.check_writable("gs://bucket/run", folder=False)
    with pytest.raises(ValueError, match="no folder"):
        storage.check_writable("gs://bucket/old", folder=True)
    assert _tree(cloud) == before
