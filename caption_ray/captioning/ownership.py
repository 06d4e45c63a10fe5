"""Ownership of a run: only one start of it at a time may write to its folder.

    <storage>/<run>/owner.json    which start owns the run and where it runs; its `beat` grows by
                                  one every HEARTBEAT_SECONDS while the owner lives

A start creates the file if there is none; if several try at once, storage lets one succeed. If the
file exists, its owner counts as dead if it ran on this machine and its process is gone, or if its
beat does not change for SILENCE_SECONDS on the clock of the start that waits (the clocks of
different machines are never compared). The file of a dead owner is replaced, and read back after
SETTLE_SECONDS: if several replaced it, the last one owns the run.

Before each beat and before each commit an owner checks that the file still names it. If the file
names another start (--run.take-over) or is gone, the owner has lost the run: it stops and writes
nothing more. After a pause between check and write, two starts may both believe that they own the
run. That ends within one beat: the one that finds the other's id stops and never writes its own
again.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import psutil

from caption_ray import storage
from caption_ray.config import from_dict

OWNER = "owner.json"
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""Long enough for an owner whose storage answers only at the sixth attempt."""
SETTLE_SECONDS = 1.0
"""Longer than a write that was already under way when another start read its own back."""
LOOK_SECONDS = 0.5
"""Seconds between looks while waiting for a sign of life."""
SAME_START_SECONDS = 60.0
"""Two start times of a process that differ by less than this mean the same process: the system's
clock may have been set in between."""


class LostError(RuntimeError):
    """The run now belongs to another start of it."""


@dataclass(frozen=True)
class Owner:
    """What owner.json says."""

    id: str = ""
    host: str = "unknown host"
    machine: str = ""
    """The machine, boot and container in which `pid` is valid."""
    pid: int = 0
    started: float = 0.0
    """When the process started, in seconds since 1970."""
    job: str | None = None
    """Its name for `ray job stop`, if it was submitted as a job."""
    since: str = "unknown time"
    beat: int = 0
    seen: str = "unknown time"
    """Time of the last beat on the owner's clock, for people to read."""

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_gone(self) -> bool:
        """Whether it is certainly dead. Only a process on the same machine can tell."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return bool(abs(process.create_time() - self.started) > SAME_START_SECONDS)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # we may not inspect it
            return False


@dataclass(frozen=True)
class Claim:
    """The claim of one start, by its id, on the run at a URI. Driver and workers hold a copy."""

    run: str
    id: str

    def require(self) -> None:
        """Raise LostError if the run belongs to another start by now."""
        found = read(self.run)
        if found is None or found.id != self.id:
            why = "its owner.json was removed" if found is None else f"taken over by {found}"
            raise LostError(f"The run {self.run} no longer belongs to this start of it: {why}")

    def is_lost(self) -> bool:
        try:
            self.require()
        except LostError:
            return True
        return False


def read(run: str) -> Owner | None:
    """Who owns the run; None if nobody does."""
    uri = storage.join(run, OWNER)
    try:
        return from_dict(Owner, json.loads(storage.read_bytes(uri)), uri)
    except FileNotFoundError:
        return None
    except ValueError:
        return Owner()  # just being created, or damaged: an owner that gives no sign of life


@contextmanager
def held(
    run: str, *, job: str | None, take_over: bool, say: Callable[[str], None]
) -> Iterator[tuple[Claim, threading.Event]]:
    """Own the run while the context lasts. Yields the claim, and an event that is set if it is
    lost.

    If there is an owner that may be dead, it says so and waits for a sign of life. Raises
    ValueError if that owner lives, unless asked to `take_over`.
    """
    own = _myself(job)
    _acquire(run, own, take_over, say)
    claim, lost, over = Claim(run, own.id), threading.Event(), threading.Event()
    heart = threading.Thread(target=_beat, args=(claim, own, lost, over), daemon=True)
    heart.start()
    try:
        yield claim, lost
    finally:
        over.set()
        heart.join()
        with suppress(OSError):  # otherwise the claim expires by its silence
            if not claim.is_lost():
                storage.delete(storage.join(run, OWNER))


def _acquire(run: str, own: Owner, take_over: bool, say: Callable[[str], None]) -> None:
    uri, watched, since, condemned = storage.join(run, OWNER), None, 0.0, None
    while True:
        found = read(run)
        silent = found == watched and time.monotonic() - since > SILENCE_SECONDS
        if found is None:
            if storage.create(uri, _to_json(own)) and storage.is_local(run):
                return
            time.sleep(SETTLE_SECONDS)
        elif found.id == own.id:
            return
        elif silent or found.is_gone() or (take_over and condemned in (None, found.id)):
            say(f"Taking the run {run} over from {found}")
            condemned = found.id
            storage.write_bytes(uri, _to_json(own))
            time.sleep(SETTLE_SECONDS)
        elif watched is None:
            watched, since = found, time.monotonic()
            say(
                f"The run {run} belongs to {found}; last sign of life {found.seen}. Waiting up to "
                f"{SILENCE_SECONDS:.0f} s for another"
            )
        elif found != watched:
            raise ValueError(
                f"--run.name {storage.name(run)}: the run in {run} goes on elsewhere: it belongs "
                f"to {found}; last sign of life {found.seen}. Stop that start of it (Ctrl-C, ray "
                "job stop), or go on from its latest checkpoint with --run.take-over, which stops "
                "it; or give another --run.name"
            )
        else:
            time.sleep(LOOK_SECONDS)


def _beat(claim: Claim, own: Owner, lost: threading.Event, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_SECONDS):
        own = replace(own, beat=own.beat + 1, seen=_now())
        with suppress(OSError):  # the next beat may succeed
            if claim.is_lost():
                lost.set()
                return
            storage.write_bytes(storage.join(claim.run, OWNER), _to_json(own))


def _myself(job: str | None) -> Owner:
    return Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        job=job,
        since=_now(),
        seen=_now(),
    )


def _machine() -> str:
    """Names what has process ids of its own: the machine, its boot, and the container."""
    parts = [socket.gethostname(), sys.platform]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _to_json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), indent=1).encode()
