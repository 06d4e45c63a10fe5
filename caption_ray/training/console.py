"""Between the driver's terminal and the workers: they post lines and steps, which it shows, and it
tells them to stop.

Printing on the workers would put Ray's prefix before every line and tear the progress bar. What
passes either way passes through one actor: each further one, though idle, is awake a hundred times
a second and costs a small machine a percent of a core. It loads no torch, which would take it
250 MiB and a second.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from tqdm import tqdm

from caption_ray import cluster

REFRESH_SECONDS = 0.3
WAIT_SECONDS = 0.2
FAILURE_SECONDS = 1.0
"""Between two looks of the driver for a reason why the run cannot go on."""
ENDING_SECONDS = 3.0
"""In which Ray Train, which one worker ends in, must end once there is such a reason."""

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far an epoch is."""

    epoch: str
    step: int
    steps: int


class _Mailbox:
    def __init__(self) -> None:
        self.items: list[str | Progress] = []
        self.stopping = False
        self.reason: str | None = None

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason

    def failure(self) -> str | None:
        return self.reason

    def post(self, item: str | Progress) -> None:
        self.items.append(item)

    def collect(self) -> list[str | Progress]:
        items, self.items = self.items, []
        return items

    def stop(self) -> None:
        self.stopping = True

    def is_told_to_stop(self) -> bool:
        return self.stopping


class Console:
    """What workers and driver hold of it; a worker never waits for anyone."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._posted = 0.0

    def say(self, line: str) -> None:
        """Show a line."""
        self._mailbox.post.remote(line)

    def progress(self, epoch: str, step: int, steps: int) -> None:
        """Move the bar; calls that come too fast are dropped, the last of an epoch never."""
        now = time.monotonic()
        if now - self._posted > REFRESH_SECONDS or step == steps:
            self._posted = now
            self._mailbox.post.remote(Progress(epoch, step, steps))

    def fail(self, reason: str) -> None:
        """Tell the driver, and workers that start, why the run cannot go on: also where no file
        can be written."""
        ray.get(self._mailbox.fail.remote(reason))

    def failure(self) -> str | None:
        """What `fail` was told first."""
        reason: str | None = ray.get(self._mailbox.failure.remote())
        return reason

    def stop(self) -> None:
        """Tell the workers to stop."""
        ray.get(self._mailbox.stop.remote())

    def is_told_to_stop(self) -> ray.ObjectRef:
        """A future of whether the workers were told to stop."""
        return self._mailbox.is_told_to_stop.remote()


@contextmanager
def shown() -> Iterator[Console]:
    """A console whose lines and bar appear on this process's terminal while the context lasts."""
    mailbox: Any = ray.remote(**cluster.on_this_node())(_Mailbox).remote()
    done = threading.Event()
    shower = threading.Thread(target=_show, args=(mailbox, done), daemon=True)
    shower.start()
    try:
        yield Console(mailbox)
    finally:
        done.set()
        shower.join(timeout=10)
        ray.kill(mailbox)


def _show(mailbox: Any, done: threading.Event) -> None:
    # no bar in a log file, where it would leave a line for each refresh
    with tqdm(unit="step", disable=None, leave=False) as bar:
        last = False
        while not last:
            last = done.wait(REFRESH_SECONDS)
            for item in ray.get(mailbox.collect.remote()):
                if isinstance(item, str):
                    tqdm.write(item)
                    sys.stdout.flush()  # also into a file that somebody follows
                elif not bar.disable:
                    if bar.desc != f"{item.epoch}: ":
                        bar.set_description(item.epoch, refresh=False)
                        bar.reset(total=item.steps)
                    bar.update(item.step - bar.n)


# Signals --------------------------------------------------------------------------------------


class LeftAloneError(Exception):
    """The function goes on, on its thread, but nobody waits for it."""


def call_until_told_to_stop(
    function: Callable[[], T],
    tell: Callable[[], None],
    lost: threading.Event | None = None,
    failure: Callable[[], str | None] = lambda: None,
) -> T:
    """What the function returns; on the first SIGINT or SIGTERM, or once it is `lost`, `tell` is
    called, once, and the function has as long as it needs to end. A second signal has its usual
    effect.

    Once there is a `failure`, it has a moment left; then LeftAloneError is raised. (Of several
    workers one has failed then; the others wait for it, so that Ray Train starts all of them again,
    which only makes them see the failure and end.)

    The function runs on another thread: on the main one Ray Train would make SIGINT its own.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    is_told = False

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    looked = time.monotonic()
    with _first_signal() as told:
        thread.start()
        while thread.is_alive():
            thread.join(WAIT_SECONDS)
            if time.monotonic() > looked + FAILURE_SECONDS:
                looked = time.monotonic()
                if failure() is not None:
                    thread.join(ENDING_SECONDS)
                    if thread.is_alive():
                        raise LeftAloneError
            if not is_told and (told.is_set() or (lost is not None and lost.is_set())):
                is_told = True
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
