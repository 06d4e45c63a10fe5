"""How whoever stops a job (`ray job stop`, Ctrl-C) is heard: on the driver's first signal it tells
the workers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

WAIT_SECONDS = 0.2

T = TypeVar("T")


def call_until_told_to_stop(function: Callable[[], T], tell: Callable[[], None]) -> T:
    """What the function returns; on the first SIGINT or SIGTERM `tell` is called, once, and the
    function has as long as it needs to end. A second signal has its usual effect.

    The function runs on another thread: on the main one Ray Train would make SIGINT its own.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _first_signal() as told:
        thread.start()
        while thread.is_alive():
            thread.join(WAIT_SECONDS)
            if told.is_set():
                told.clear()
                tell()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _first_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets instead of ending the process."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told  # only the main thread receives signals
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def on_signal(*_: object) -> None:
        restore()
        told.set()

    for kind in before:
        signal.signal(kind, on_signal)
    try:
        yield told
    finally:
        restore()
