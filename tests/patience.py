"""How long tests wait for something to happen on machines of any speed, busy or not.

A limit is given in seconds of a quiet two-core machine. It is stretched by how much slower than
that a fixed piece of work runs here and now, so that a loaded or slow machine is given more time,
and a hang is still noticed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

_WORK = bytes(2**20)
_REFERENCE_SECONDS = 0.004
"""Time that the work below takes on the machine that limits were chosen for: a slow one of the
kind that runs in clouds, when nothing else runs on it."""


def slowness() -> float:
    """How many times slower than the reference this machine is just now; at least 1."""
    start = time.perf_counter()
    for _ in range(4):
        hashlib.sha256(_WORK)
    python = sum(number & 7 for number in range(20_000))
    assert python
    return max(1.0, (time.perf_counter() - start) / _REFERENCE_SECONDS)


def scaled(seconds: float) -> float:
    """A limit for what has a time-out of its own, a subprocess say."""
    return seconds * max(slowness() for _ in range(5))


def wait_until(
    condition: Callable[[], object], seconds: float = 60.0, what: str = "it", pause: float = 0.1
) -> None:
    """Return once the condition holds; AssertionError if it does not in time."""
    spent, last = 0.0, time.monotonic()
    while not condition():
        time.sleep(pause)
        now = time.monotonic()
        spent, last = spent + (now - last) / slowness(), now
        assert spent < seconds, f"{what}: not within {seconds} s of a quiet machine"
