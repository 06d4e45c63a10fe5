"""Pictures from the web: a real server that fails in every way, and links counted by the reason."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from captioned import reasons_of

from caption_ray import fetch
from caption_ray.config import SourceConfig
from caption_ray.data import downloads
from caption_ray.data.formats import find_splits
from caption_ray.data.ingest import ingest
from caption_ray.data.locations import PictureError, WebAddress
from caption_ray.data.shards import LeftOut, counted


class Server:
    """Answers by path; counts requests, and how many of good ones were there at a time."""

    def __init__(self, picture: bytes) -> None:
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0
        lock, self_ = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                is_good = int(self.path.startswith("/good"))
                with lock:
                    self_.asked[self.path] += 1
                    number = self_.asked[self.path]
                    self_.now += is_good
                    self_.most = max(self_.most, self_.now)
                try:
                    self.answer(self.path.strip("/").rstrip("0123456789"), number)
                except OSError:
                    pass  # the client has had enough
                finally:
                    with lock:
                        self_.now -= is_good

            def answer(self, kind: str, number: int) -> None:
                if kind == "good":
                    time.sleep(0.02)
                    self.send(200, picture)
                elif kind == "recovers":
                    self.send(503 if number == 1 else 200, picture)
                elif kind in ("gone", "forbidden", "busy"):
                    self.send({"gone": 404, "forbidden": 403, "busy": 503}[kind], b"no")
                elif kind == "page":
                    self.send(200, b"<html>was a picture once</html>")
                elif kind == "damaged":
                    self.send(200, picture[: len(picture) // 2])
                elif kind == "broken":
                    self.send(200, picture[:100], length=len(picture))
                elif kind == "large":
                    self.send(200, bytes(3_000_000))
                elif kind == "silent":
                    time.sleep(5)
                elif kind == "loop":
                    self.send(302, b"", location="/loop")
                elif kind == "inward":
                    self.send(302, b"", location="http://169.254.169.254/latest/meta-data")

            def send(self, status: int, body: bytes, length: int = -1, location: str = "") -> None:
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", str(len(body) if length < 0 else length))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}/{path}"


@pytest.fixture
def server(scenes: Path) -> Iterator[Server]:
    picture = next((scenes / "train").iterdir()).read_bytes()
    server = Server(picture)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()
    server.server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT_S", 3.0)
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    monkeypatch.setattr(downloads, "PAUSE_S", 0.01)
    monkeypatch.setattr(downloads, "MAX_BYTES", 2_000_000)


FAILURES = {
    "gone": "answers 404",
    "forbidden": "answers 403",
    "busy": "answers 503",
    "page": "gives no picture",
    "damaged": "gives a damaged one",
    "broken": "cannot be reached or broke off",
    "large": "sends more than 2000000 bytes",
    "silent": "does not answer in time",
    "loop": "redirects more than 3 times",
    "inward": "is an address that is not public",
}
"""Each kind of failure and what is said of it."""

AGAIN = {"busy", "broken", "silent"}
"""Those that may pass, and are asked for again."""


def test_dead_links_are_left_out_and_counted_by_reason(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten kinds of failure, three of each but for the slow one; and nothing private is asked."""
    from caption_ray.data.rows import to_rows

    connected: list[str] = []
    connect = socket.create_connection

    def recorded(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        connected.append(address[0])
        return connect(address, *rest, **options)

    monkeypatch.setattr(fetch.socket, "create_connection", recorded)
    paths = [f"{kind}{i}" for kind in FAILURES for i in range(1 if kind == "silent" else 3)]
    good = [f"good{i}" for i in range(20)] + ["recovers"]
    lines = [f"A dog.\t{server.url(path)}\n" for path in (*paths, *good)]
    lines += [
        "A cat.\thttp://127.0.0.1:1/a\n",
        "A cat.\thttp://[::1]/a\n",
        "A cat.\thttp://10.0.0.9/\n",
    ]
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(lines))
    options = SourceConfig(hosts=(server.host,))
    train = find_splits(str(tmp_path), splits=("train",), options=options)["train"]
    assert len(train.records) == 28 + 21 + 3 and reasons_of(train) == {}
    rows = to_rows(train.records, None)
    assert sum(row["error"] is None for row in rows) == 21
    left_out = [LeftOut("train", row["file_name"], row["error"]) for row in rows if row["error"]]
    expected = {f"dead link: {reason}": 3 for reason in FAILURES.values()}
    expected["dead link: does not answer in time"] = 1
    expected["dead link: is an address that is not public"] += 3
    assert {one.reason: one.entries for one in counted(left_out, downloads.DEAD_LINK)} == expected
    assert set(connected) == {"127.0.0.1"}, "the address that was allowed, and no other"
    asked = {path.strip("/").rstrip("0123456789"): n for path, n in server.asked.items()}
    for kind in FAILURES:
        tries = {"loop": 1 + fetch.REDIRECTS}.get(kind, downloads.ATTEMPTS if kind in AGAIN else 1)
        if kind != "loop":
            assert asked[kind] == tries, kind
    assert server.asked["/recovers"] == 2
    assert server.most <= downloads.AT_A_TIME_FROM_A_HOST


def test_without_permission_nothing_on_this_machine_is_asked(server: Server) -> None:
    for url in (server.url("good1"), f"http://localhost:{server.server.server_port}/good1"):
        with pytest.raises(PictureError, match="dead link: .* not public"):
            WebAddress(url).read()
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://host.invalid/a.jpg", "dead link: has no address that is known"),
        ("ftp://example.org/a.jpg", "dead link: only URLs of http and https are fetched"),
        ("http://user:secret@example.org/a", "dead link: a URL with user or password is not fetch"),
        ("http://[broken/a.jpg", "dead link: not a valid URL of http or https"),
        ("http://127.0.0.1:9/a.jpg", "dead link: is an address that is not public"),
    ],
)
def test_addresses_that_cannot_be_fetched_say_why(url: str, reason: str) -> None:
    with pytest.raises(PictureError) as caught:
        WebAddress(url).read()
    assert str(caught.value).startswith(reason)


def test_a_bad_host_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("A dog.\thttp://example.org/a.jpg\n")
    with pytest.raises(ValueError, match=r"--hosts http://x: .* give images.example.org"):
        find_splits(str(tmp_path), options=SourceConfig(hosts=("http://x",)))


@pytest.mark.usefixtures("local_ray")
def test_an_ingest_of_addresses_names_dead_links_once_for_each_reason(
    server: Server, tmp_path: Path
) -> None:
    lines = [
        f"A dog.\t{server.url(f'{kind}{i}')}\n" for kind in ("good", "gone") for i in range(12)
    ]
    (tmp_path / "train.tsv").write_text("".join(lines))
    index = ingest(
        str(tmp_path), str(tmp_path / "out"), image_size=None, images_per_shard=5, seed=0,
        splits=("train",), options=SourceConfig(hosts=(server.host,)), progress=False,
    )  # fmt: skip
    assert sum(index.rows("train")) == 12
    (dead,) = index.left_out
    assert (dead.split, dead.reason, dead.entries) == ("train", "dead link: answers 404", 12)
