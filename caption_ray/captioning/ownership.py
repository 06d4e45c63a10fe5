"""Who may write to a run: one start of it at a time, which says so in the run's folder.

    <storage>/<run>/owner.json    which start that is and where it runs; its `beat` grows by one
                                  every HEARTBEAT_SECONDS as long as it lives

A start creates the file if there is none; of several, storage lets one succeed. Where there is one,
its owner is dead if it ran on this machine and its process is gone, or if its beat does not change
for SILENCE_SECONDS by the watch of who waits: clocks of different machines are not compared. What a
dead owner left is replaced, and read back after SETTLE_SECONDS: of several, the last has it.

An owner looks before each beat, and before each commit, whether the file still names it. If it
names another (--run.take-over), or is gone, the owner has lost the run: it stops and writes nothing
more. Two who believe that they own a run, as they may after a pause between a look and a write, are
so one again within a beat: who finds the other's id stops, and never again writes its own.
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
"""Long enough for an owner whose storage answers only at the sixth try."""
SETTLE_SECONDS = 1.0
"""More than a write takes that began before somebody else's was read back."""
LOOK_SECONDS = 0.5
"""Between looks of who waits for a sign of life."""
SAME_START_SECONDS = 60.0
"""Within which two answers of the system mean the same start of a process: its clock may have been
set in between."""


class LostError(RuntimeError):
    """The run belongs to another start of it now."""


@dataclass(frozen=True)
class Owner:
    """What owner.json says."""

    id: str = ""
    host: str = "unknown host"
    machine: str = ""
    """Of which `pid` is meant: also tells containers apart."""
    pid: int = 0
    started: float = 0.0
    """When the process did, in seconds since 1970."""
    job: str | None = None
    """What `ray job stop` calls it, if it was submitted."""
    since: str = "unknown time"
    beat: int = 0
    seen: str = "unknown time"
    """Of the last beat, by the owner's clock: for people."""

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_gone(self) -> bool:
        """Whether it certainly no longer lives, as can be seen on its own machine only."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return bool(abs(process.create_time() - self.started) > SAME_START_SECONDS)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # it may not be looked at
            return False


@dataclass(frozen=True)
class Claim:
    """On the run at a URI, by the start of this id: what driver and workers hold of it."""

    run: str
    id: str

    def require(self) -> None:
        """Raise LostError if the run is another's by now."""
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
        return Owner()  # just being created, or broken: one that is silent


@contextmanager
def held(
    run: str, *, job: str | None, take_over: bool, say: Callable[[str], None]
) -> Iterator[tuple[Claim, threading.Event]]:
    """The run is this process's as long as the context lasts: the claim on it, and an event that is
    set when it is lost.

    Waits, which it says, for a sign of life of an owner that may be dead. Raises ValueError if it
    lives, unless asked to `take_over`.
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
        with suppress(OSError):  # or it falls silent
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
        with suppress(OSError):  # the next one may succeed
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
    """Tells apart what has process ids of its own: machines, their boots, and containers."""
    parts = [socket.gethostname(), sys.platform]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _to_json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), indent=1).encode()
