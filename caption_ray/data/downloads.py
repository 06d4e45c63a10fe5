"""Pictures from web servers that are not ours, as data sets like Conceptual Captions name them.

Politely: few at a time from one host, each once unless a failure may pass, with a limit of time and
of size, and never from an address that is not public (see `caption_ray.fetch`). `locations.py`
calls this for a `WebAddress`.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from urllib.parse import urlsplit

from caption_ray.fetch import FetchError, fetch_public

AT_A_TIME = 32
"""Pictures that one task fetches at a time, ..."""
AT_A_TIME_FROM_A_HOST = 2
"""... and from one host: a task is not alone, the cluster has as many as CPUs."""

ATTEMPTS = 3
"""How often a picture is asked for if its server is busy or does not answer."""

TIMEOUT_S = 15.0
"""Of one attempt, from the name's look-up to the last byte."""

MAX_BYTES = 32 << 20
"""Larger pictures are not fetched to their end."""

PAUSE_S = 1.0
"""Longest pause before the second attempt; it doubles."""

DEAD_LINK = "dead link: "
"""What the reasons begin with why a picture of the web is left out."""

_gates: dict[str, threading.BoundedSemaphore] = defaultdict(
    lambda: threading.BoundedSemaphore(AT_A_TIME_FROM_A_HOST)
)
_gates_lock = threading.Lock()


class DeadLink(Exception):
    """A picture that its address does not give; the message says why, without naming the host, so
    that dead links can be counted by it."""


def fetch_politely(url: str, hosts: Sequence[str] = ()) -> bytes:
    """The bytes at `url`, on a public host or one of `hosts`. Raises DeadLink if there are none."""
    try:
        host = urlsplit(url).netloc
    except ValueError:
        host = ""
    with _gates_lock:
        gate = _gates[host]
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with gate:
                return fetch_public(url, hosts, MAX_BYTES, TIMEOUT_S)
        except FetchError as error:
            if not error.passes or attempt == ATTEMPTS:
                raise DeadLink(error.reason) from None
        time.sleep(random.uniform(0.5, 1) * PAUSE_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")
