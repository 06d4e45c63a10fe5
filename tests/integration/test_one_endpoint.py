"""One port has one endpoint, and what comes over a connection is read once: with `serve run` and
raw sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def config(port: int, tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("serve") / "config.yaml"
    file.write_text(CONFIG.format(port=port, checkpoint=tiny_run))
    return file


@pytest.fixture(scope="module")
def first(config: Path, port: int) -> Iterator[ServeRun]:
    """An endpoint that asks for a token."""
    running = ServeRun(config, config.with_name("first.log"), CAPTION_RAY_TOKENS=TOKEN)

    def is_ready() -> bool:
        assert running.process.poll() is None, running.text()
        try:
            return requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    try:
        wait_until(is_ready, 90, "the endpoint")
        yield running
    finally:
        running.stop()


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
