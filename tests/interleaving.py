"""Actors that share a run's folder, moved on storage operation by storage operation.

Each actor is a thread that stops before every operation of the storage until it is moved on, so
that any order of the operations of several can be tried, and each be killed at any of them.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from caption_ray import storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import State


class Killed(BaseException):
    """As by SIGKILL: every further operation fails, too."""


class Actor(threading.Thread):
    """A function whose storage operations are counted and waited with."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.killed = False
        self.operations = 0
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.start()
        self._stopped.acquire()

    def run(self) -> None:
        try:
            self.wait()
            self.result = self.function()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def wait(self) -> None:
        """On the actor's own thread, before each operation."""
        if not self.killed:
            self._stopped.release()
            self._go.acquire()
        if self.killed:
            raise Killed
        self.operations += 1

    def move(self, operations: float = math.inf) -> Actor:
        """Let it do so many operations, or all that are left."""
        while operations > 0 and not self.done:
            self._go.release()
            self._stopped.acquire()
            operations -= 1
        return self

    def kill(self) -> None:
        self.killed = True
        self.move(1)
        assert self.done


class Stepping:
    """A backend whose operations wait for the actor that asks for them. A folder is deleted file by
    file, as on S3."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.inner, name)

        def waiting(*arguments: Any) -> Any:
            self._wait()
            found = operation(*arguments)
            return list(found) if isinstance(found, Iterator) else found

        return waiting

    @staticmethod
    def _wait() -> None:
        actor = threading.current_thread()
        if isinstance(actor, Actor):
            actor.wait()

    def delete(self, uri: str) -> None:
        for file in self.walk(uri):
            self._wait()
            self.inner.delete(file)
        self._wait()
        self.inner.delete(uri)


class Memory:
    """A bucket: objects appear and disappear one by one, at once, and there are no folders."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        if uri not in self.objects:
            raise FileNotFoundError(uri)
        return self.objects[uri]

    def read_large(self, uri: str) -> bytes:
        return self.read(uri, None)

    def write(self, uri: str, data: bytes) -> None:
        self.objects[uri] = data

    def create(self, uri: str, data: bytes) -> bool:
        return self.objects.setdefault(uri, data) is data

    def size(self, uri: str) -> int:
        return len(self.read(uri, None))

    def walk(self, uri: str) -> list[str]:
        return [file for file in list(self.objects) if file.startswith(f"{uri}/")]

    def folders(self, uri: str) -> list[str]:
        below = [file[len(uri) + 1 :] for file in self.walk(uri)]
        return list({rest.partition("/")[0] for rest in below if "/" in rest})

    def delete(self, uri: str) -> None:
        self.objects.pop(uri, None)

    def delete_partial(self, uri: str) -> None:
        pass


# Checkpoints without a captioner ----------------------------------------------------------------


def save(folder: Path, step: int, loss: float = 1.0) -> State:
    """A checkpoint's local folder, of a few small files."""
    state = State(step, step, 0, {run_folder.LOSS: loss}, None)
    fields = {"step": step, "epoch": step, "epoch_step": 0, "metrics": state.metrics}
    files = {
        checkpoint.MODEL: b"weights of %d" % step,
        checkpoint.STATE: json.dumps({**fields, "tracker_id": None}).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        name: {"bytes": len(data), "digest": storage.checksum(data)} for name, data in files.items()
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return state


def commit(scratch: Path, run: str, step: int, *, keep: int = 1, **options: Any) -> str:
    folder = scratch / f"local-{step}"
    state = save(folder, step, options.pop("loss", 1.0))
    return run_folder.commit(folder, run, state, keep=keep, **options)


def load(uri: str) -> str:
    """All files, verified; the URI."""
    checkpoint._read(uri, [checkpoint.MODEL, checkpoint.STATE])
    return uri


def whole(run: str) -> list[str]:
    return [name for name, is_whole in run_folder._checkpoints(run).items() if is_whole]


def pointers(run: str) -> dict[str, str]:
    """What they name, which is loaded."""
    found = {}
    for which in run_folder.POINTERS:
        pointer = json.loads(storage.read_bytes(storage.join(run, f"{which}.json")))
        found[which] = storage.name(load(storage.join(run, pointer["checkpoint"])))
    return found


def assert_right(run: str) -> None:
    """Both pointers name whole checkpoints, and best.json the best that was ever validated."""
    found = pointers(run)
    scores = {
        name: (metrics[run_folder.CRITERION], -metrics[run_folder.LOSS])
        for name, metrics in run_folder.read_validations(run).items()
    }
    if scores:
        assert scores[found["best"]] == max(scores.values()), (found, scores)


def cut_off_at(name, monkeypatch):
    """The storage takes no file of this name."""
    real = storage.write_bytes

    def write(uri, data):
        if uri.endswith(name):
            raise storage.StorageError("cut off")
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write)
