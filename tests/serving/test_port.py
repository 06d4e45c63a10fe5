"""Who else listens at a port is noticed; whoever was there first may stay."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest

from caption_ray.serving.port import PortTakenError, listeners, require_alone

LISTEN = """
import socket, subprocess, sys, time

if len(sys.argv) > 2:  # a child of its own listens, as a proxy does for a raylet
    sys.exit(subprocess.call([sys.executable, "-c", sys.argv[2], sys.argv[1]]))
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen()
print("listening", flush=True)
time.sleep(600)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", LISTEN, str(port), *arguments]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            )

            def end() -> None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()

            stack.callback(end)
            assert process.stdout is not None and process.stdout.readline() == "listening\n"
            return process

        yield begin


def test_a_port_of_our_own_is_nobody_elses(start: Start, port: int) -> None:
    require_alone(port, os.getpid())
    own = start()
    require_alone(port, os.getpid())
    (found,) = listeners(port, os.getpid())
    assert (found.pid, found.is_own) == (own.pid, True)


def test_a_stranger_who_was_there_is_named(start: Start, port: int) -> None:
    stranger = start()
    with pytest.raises(PortTakenError, match=rf"port {port} .* is taken: process {stranger.pid} "):
        require_alone(port, own=2**22 + 1)
    time.sleep(0.1)
    own = start(LISTEN)
    assert len(listeners(port, own.pid)) == 2
    with pytest.raises(PortTakenError, match=f"process {stranger.pid} .*give http_options another"):
        require_alone(port, own.pid)


def test_a_stranger_who_came_later_does_not_drive_us_out(start: Start, port: int) -> None:
    own = start(LISTEN)
    time.sleep(0.1)
    start()
    require_alone(port, own.pid)


def test_other_ports_do_not_matter(start: Start, port: int) -> None:
    start()
    require_alone(port + 1, own=2**22 + 1)
