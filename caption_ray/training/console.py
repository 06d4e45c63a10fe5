"""Between the driver's terminal and the workers: they post lines and steps, which it shows, and it
tells them to stop.

Printing on the workers would put Ray's prefix before every line and tear the progress bar. What
passes either way passes through one actor: each further one, though idle, is awake a hundred times
a second and costs a small machine a percent of a core. It loads no torch, which would take it
250 MiB and a second.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from tqdm import tqdm

from caption_ray import cluster

REFRESH_SECONDS = 0.3


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

    def stop(self) -> None:
        """Tell the workers to stop."""
        ray.get(self._mailbox.stop.remote())

    def is_told_to_stop(self) -> ray.ObjectRef:
        """A future of whether the workers were told to stop."""
        return self._mailbox.is_told_to_stop.remote()


@contextlib.contextmanager
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
