"""Processes that are killed (SIGKILL) just before their n-th write to a storage."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

FILE_CHANGES = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
"""Python's audit events before a change to a file system."""

REQUESTS = {"http.client.send"}
"""The audit event before a request, or a part of one, is sent to a server."""

_context = multiprocessing.get_context("forkserver")
# imported once, so that each process then starts in milliseconds
_context.set_forkserver_preload(["killing", "caption_ray.data.ingest", "boto3.s3.transfer",
                                 "caption_ray.captioning.checkpoint"])  # fmt: skip


def count(events: set[str], function: Callable[..., object], *arguments: Any) -> int:
    """How many such events the function causes if nothing kills it."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _start(events, None, sender, function, arguments)
    sender.close()
    counted: int = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return counted


def kill(events: set[str], at: int, function: Callable[..., object], *arguments: Any) -> bool:
    """Whether the function was killed at event number `at`; False if it finished before."""
    process = _start(events, at, None, function, arguments)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def spread(total: int, points: int) -> Iterator[int]:
    """`points` numbers spread from 1 to `total`, ends included, or all if there are fewer."""
    points = min(points, total)
    return (1 + round(i * (total - 1) / (points - 1)) for i in range(points))


def _start(
    events: set[str], at: int | None, sender: Any, function: Any, arguments: Any
) -> multiprocessing.process.BaseProcess:
    process = _context.Process(
        target=_watched, args=(dict(os.environ), events, at, sender, function, arguments)
    )
    process.start()
    return process


def _watched(
    environment: Mapping[str, str],
    events: set[str],
    at: int | None,
    sender: Any,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # the test's environment, not the fork server's
    seen = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in events or (event == "open" and not _is_write(details)):
            return
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    function(*arguments)
    if sender is not None:
        sender.send(seen)


def _is_write(details: tuple[Any, ...]) -> bool:
    flags = details[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def ingest_without_ray(source: str, out: str, images_per_shard: int) -> None:
    """`ingest` with its tasks one after the other in this process."""
    import types

    import ray

    from caption_ray.data import ingest

    for name in ("_write_shard", "_survey"):
        task = getattr(ingest, name)._function
        setattr(
            ingest, name, types.SimpleNamespace(remote=functools.partial(functools.partial, task))
        )
    ingest.ray = types.SimpleNamespace(
        wait=lambda tasks, num_returns: (tasks[:1], tasks[1:]),
        get=lambda task: task(),
        exceptions=ray.exceptions,
    )
    ingest.ingest(
        source,
        out,
        image_size=64,
        images_per_shard=images_per_shard,
        seed=0,
        splits=("train", "val"),
        progress=False,
    )
