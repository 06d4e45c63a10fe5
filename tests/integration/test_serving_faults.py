"""The endpoint under load while faults happen: every request gets an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from patience import scaled

CLIENTS = 6
REQUEST_TIMEOUT_S = scaled(4.0)
BODY_TIMEOUT_S = scaled(2.0)


@pytest.fixture(scope="module")
def runs(save_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "first")
    return folder


def settings(runs: Path, **args: Any) -> dict[str, Any]:
    return {
        "args": {
            "storage": str(runs),
            "request_timeout_s": REQUEST_TIMEOUT_S,
            "body_timeout_s": BODY_TIMEOUT_S,
            **args,
        },
        "captioner": {
            "num_replicas": 2,
            "ray_actor_options": {"num_cpus": 0.5},
            "health_check_period_s": 1,
            "health_check_timeout_s": 2,
        },
        "ingress": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}},
    }


@pytest.fixture
def load(endpoint: Any, runs: Path, picture: Callable[..., bytes], load_on: Any) -> Iterator[Any]:
    """Two captioners and two ingresses, under load from clients."""
    endpoint.deploy(**settings(runs))
    endpoint.wait_until(lambda: whole(endpoint))
    for _ in range(20):
        requests.post(f"{endpoint.url}/caption", data=picture(0), timeout=30)
    yield load_on(endpoint.url, picture(0), CLIENTS)


def whole(endpoint: Any) -> bool:
    return (
        endpoint.is_running() and endpoint.running("Captioner") == endpoint.running("Ingress") == 2
    )


def test_no_request_fails_while_the_checkpoint_is_changed(
    load: Any, endpoint: Any, runs: Path, save_run: Callable[..., str]
) -> None:
    uri = save_run(runs.parent / "elsewhere", step=2, seed=3)
    other = settings(runs)
    other["captioner"]["user_config"] = {
        "checkpoint": uri, "storage": str(runs), "follow_interval_s": None,
    }  # fmt: skip
    with load:
        endpoint.deploy(**other)
        endpoint.wait_until(lambda: checkpoints(load.answers[-40:]) == {"checkpoint-00000002"})
    load.report("checkpoint changed")
    assert set(load.statuses) == {200}
    assert checkpoints(load.answers) == {"checkpoint-00000001", "checkpoint-00000002"}


def checkpoints(answers: list[Any]) -> set[str]:
    return {answer.checkpoint for answer in answers}


def test_no_request_fails_during_a_rolling_update(load: Any, endpoint: Any, runs: Path) -> None:
    before = endpoint.pids("Captioner") + endpoint.pids("Ingress")
    with load:
        endpoint.deploy(**settings(runs, batch_wait_timeout_s=0.001))
        endpoint.wait_until(
            lambda: not set(before) & set(endpoint.pids("Captioner") + endpoint.pids("Ingress"))
        )
        endpoint.wait_until(lambda: whole(endpoint))
    load.report("rolling update")
    assert set(load.statuses) == {200}


def test_no_request_fails_while_captioners_are_taken_away(
    load: Any, endpoint: Any, runs: Path
) -> None:
    fewer = settings(runs)
    fewer["captioner"]["num_replicas"] = 1
    with load:
        endpoint.deploy(**fewer)
        endpoint.wait_until(lambda: len(endpoint.pids("Captioner")) == 1)
    load.report("scaled down")
    assert set(load.statuses) == {200}


def test_a_killed_captioners_pictures_are_captioned_by_another(load: Any, endpoint: Any) -> None:
    victim = endpoint.pids("Captioner")[0]
    with load:
        os.kill(victim, signal.SIGKILL)
        endpoint.wait_until(lambda: whole(endpoint) and victim not in endpoint.pids("Captioner"))
    load.report("captioner killed")
    assert set(load.statuses) == {200}


def test_a_killed_ingress_loses_only_what_it_was_doing(load: Any, endpoint: Any) -> None:
    victim = endpoint.pids("Ingress")[0]
    with load:
        os.kill(victim, signal.SIGKILL)
        endpoint.wait_until(lambda: whole(endpoint) and victim not in endpoint.pids("Ingress"))
    load.report("ingress killed")
    assert sum(load.statuses.values()) - load.statuses[200] <= CLIENTS
    assert {status for status in load.statuses if status != 200} <= {500, 502, 503}


def test_a_hanging_captioner_is_replaced_and_its_pictures_get_504(load: Any, endpoint: Any) -> None:
    victim = endpoint.pids("Captioner")[0]
    with load:
        os.kill(victim, signal.SIGSTOP)
        endpoint.wait_until(lambda: whole(endpoint) and victim not in endpoint.pids("Captioner"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    load.report("captioner hung")
    assert set(load.statuses) <= {200, 504}
    assert max(answer.seconds for answer in load.answers) < REQUEST_TIMEOUT_S + 2


def test_trickling_bodies_hold_nobody_up_and_are_ended(load: Any, endpoint: Any) -> None:
    host, port = endpoint.url.removeprefix("http://").split(":")
    stop = threading.Event()
    ended: list[bytes] = []

    def trickle() -> None:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n")
            while not stop.is_set():
                try:
                    connection.sendall(b"x")
                    connection.settimeout(0.2)
                    ended.append(connection.recv(1000))
                    return
                except TimeoutError:
                    continue
                except OSError:
                    return

    threads = [threading.Thread(target=trickle) for _ in range(150)]
    with load:
        for thread in threads:
            thread.start()
        time.sleep(2 * BODY_TIMEOUT_S)
    stop.set()
    for thread in threads:
        thread.join()
    load.report("150 trickling bodies")
    assert set(load.statuses) == {200}
    assert len(ended) == len(threads)
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in ended)


def test_huge_bodies_are_refused_without_filling_the_memory(load: Any, endpoint: Any) -> None:
    """Four clients send 100 MB each, over and over, announced or not."""
    refused: Counter[int] = Counter()
    stop = threading.Event()

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1_000_000)

    def send(number: int) -> None:
        while not stop.is_set():
            body = bytes(100_000_000) if number % 2 else chunks()
            try:
                answer = requests.post(f"{endpoint.url}/caption", data=body, timeout=60)
                refused[answer.status_code] += 1
            except requests.RequestException:
                refused[0] += 1  # it may be cut off while still sending

    watched = [psutil.Process(pid) for pid in endpoint.pids("Ingress") + proxies()]
    before = {process.pid: process.memory_info().rss for process in watched}
    highest = dict(before)
    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    with load:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for process in watched:
                highest[process.pid] = max(highest[process.pid], process.memory_info().rss)
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
    load.report("100 MB bodies")
    grown = {pid: (highest[pid] - before[pid]) / 1e6 for pid in before}
    print(f"answers {dict(refused)}; memory grew by {grown} MB")
    assert set(load.statuses) == {200}
    assert set(refused) <= {413, 0} and refused[413]
    assert max(grown.values()) < 400


def proxies() -> list[int]:
    title = "ray::ProxyActor"
    found = psutil.Process().children(recursive=True)
    return [p.pid for p in found if " ".join(p.cmdline()).startswith(title)]
