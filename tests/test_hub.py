"""Data sets of the Hugging Face Hub, from a server that answers like it and from the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import captions_of, pictures_of

from caption_ray import storage
from caption_ray.data.formats import find_splits

pytest.importorskip("huggingface_hub", reason="the Hub's own client")
from huggingface_hub import constants

NAME = "hf://datasets/someone/things"


class FakeHub(BaseHTTPRequestHandler):
    """The parts of the Hub's interface that reading a data set takes."""

    files: dict[str, bytes] = {}
    asked: list[str] = []
    status = 200

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.asked.append(path)
        if self.status != 200:
            return self.send(self.status, b"{}")
        if path.startswith("/api/datasets/someone/things/tree/"):
            folder = path.split("/", 7)[7] if path.count("/") > 6 else ""
            return self.tree(folder, query.get("recursive", ["False"])[0].lower() == "true")
        if path.startswith("/api/datasets/someone/things"):
            return self.send(200, json.dumps({"id": "someone/things", "sha": "0" * 40}).encode())
        if path.startswith("/datasets/someone/things/resolve/main/"):
            data = self.files.get(path.split("/", 6)[6])
            if data is None:
                return self.send(404, b"")
            window = self.headers.get("Range")
            if window is None:
                return self.send(200, data)
            first, last = map(int, window.removeprefix("bytes=").split("-"))
            return self.send(206, data[first : last + 1])
        return self.send(404, b"{}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def tree(self, folder: str, is_recursive: bool) -> None:
        entries: dict[str, dict[str, Any]] = {}
        prefix = f"{folder}/" if folder else ""
        for path, data in self.files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                if is_recursive or depth == 1:
                    inner = prefix + "/".join(parts[:depth])
                    entries[inner] = {"type": "directory", "oid": "0", "size": 0, "path": inner}
            if is_recursive or len(parts) == 1:
                entries[path] = {"type": "file", "oid": "0", "size": len(data), "path": path}
        if not entries:
            return self.send(404, b"{}")
        self.send(200, json.dumps(list(entries.values())).encode())


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    handler = type("Handler", (FakeHub,), {"files": {}, "asked": [], "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)
    storage._backend.cache_clear()
    yield handler
    storage._backend.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()


def parquet(captions: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pictures = [caption.encode() for caption in captions]
    pq.write_table(pa.table({"image": pictures, "caption": captions}), sink)
    return bytes(sink.getvalue())


FILES = {
    "README.md": b"# things",
    "data/train-00000-of-00002.parquet": parquet(["a dog", "two dogs"]),
    "data/train-00001-of-00002.parquet": parquet(["a cat"]),
    "data/validation-00000-of-00001.parquet": parquet(["a cow"]),
}


def test_a_data_set_of_the_hub_is_listed_and_read_by_ranges(the_hub: type[FakeHub]) -> None:
    the_hub.files |= FILES
    found = find_splits(NAME)
    assert {split: len(it.records) for split, it in found.items()} == {"train": 3, "val": 1}
    assert pictures_of(found["train"]) == [b"a dog", b"two dogs", b"a cat"]
    assert captions_of(found)["val"] == {"data/validation-00000-of-00001-0": ["a cow"]}
    assert pictures_of(find_splits(f"{NAME}/data", splits=("val",))["val"]) == [b"a cow"]


def test_the_operations_of_storage(the_hub: type[FakeHub]) -> None:
    the_hub.files |= FILES | {"odd names/a b#1?.txt": b"0123456789"}
    odd = storage.join(NAME, "odd names", "a b#1?.txt")
    assert storage.list_files(NAME) == sorted(
        storage.join(NAME, *p.split("/")) for p in the_hub.files
    )
    assert storage.list_folders(NAME) == ["data", "odd names"]
    assert storage.list_files(f"{NAME}/nothing") == storage.list_folders(f"{NAME}/nothing") == []
    assert storage.read_bytes(odd) == b"0123456789" and storage.read_range(odd, 2, 3) == b"234"
    assert storage.size(odd) == 10 and storage.exists(odd)
    assert not storage.exists(f"{NAME}/data") and not storage.exists(f"{NAME}/nothing.txt")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{NAME}/nothing.txt")
    with pytest.raises(ValueError, match="the Hub is only read; give a local path or a bucket"):
        storage.write_bytes(f"{NAME}/new", b"")


@pytest.mark.parametrize("uri", ["hf://datasets/one", "hf://models/a/b", "hf://datasets//b"])
def test_what_is_no_data_set_is_refused(the_hub: type[FakeHub], uri: str) -> None:
    with pytest.raises(ValueError, match="write hf://datasets/OWNER/NAME"):
        storage.list_files(uri)
    assert not the_hub.asked


def test_a_refusal_says_how_to_log_in(the_hub: type[FakeHub]) -> None:
    the_hub.status = 401
    with pytest.raises(
        storage.StorageError, match="not for everybody; log in with `hf auth login`"
    ):
        storage.list_files(NAME)


def test_a_busy_hub_is_asked_again(the_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    the_hub.files |= FILES
    storage.size(f"{NAME}/README.md")
    the_hub.status, before = 503, len(the_hub.asked)
    with pytest.raises(storage.StorageError, match=r"HTTP 503 .*tried 6 times"):
        storage.read_bytes(f"{NAME}/README.md")
    assert len(the_hub.asked) - before == storage.ATTEMPTS


def test_offline_the_cache_is_read(
    the_hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    place = tmp_path / "datasets--someone--things"
    for path, data in FILES.items():
        file = place / "snapshots" / commit / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = find_splits(NAME)
    assert pictures_of(found["train"]) == [b"a dog", b"two dogs", b"a cat"]
    assert storage.list_folders(NAME) == ["data"]
    with pytest.raises(storage.StorageError, match="hf download someone/else --repo-type dataset"):
        storage.list_files("hf://datasets/someone/else")
    assert not the_hub.asked


def test_without_the_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    storage._backend.cache_clear()
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        storage.list_files(NAME)
    storage._backend.cache_clear()
