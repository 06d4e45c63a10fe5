"""Batches: requests that wait for one device are run together, without waiting for each other.

Plain asyncio around one thread, which is the only one that uses the device.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

RATE_SMOOTHING = 0.3
"""Weight of the newest batch in the estimate of items per second."""


class QueueFullError(Exception):
    """An item would wait longer than is allowed; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[int]]:
        return QueueFullError, (self.retry_after,)


@dataclass
class _Entry(Generic[Key, Item, Result]):
    key: Key
    item: Item
    future: asyncio.Future[tuple[Result, int]]
    arrived: float


class Batcher(Generic[Key, Item, Result]):
    """Runs items of equal key together, the longest waiting first.

    A batch is whatever has come in while the device was busy, so nothing waits for company on an
    idle device unless `wait_s` says so. An item whose caller has gone is left out. If a batch
    fails, its items are run one by one, so that only what caused the failure fails.
    """

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item]], Sequence[Result]],
        *,
        max_batch_size: int,
        wait_s: float,
        max_queue_s: float,
        max_queue: int,
    ) -> None:
        """`run` is called on the one thread and returns a result for each item.

        `wait_s` is how long the first item of a batch may wait for others on an idle device. An
        item is refused if, at the rate of the last batches, it would wait more than `max_queue_s`
        seconds, or if `max_queue` items wait already.
        """
        self._run = run
        self._max_batch_size = max_batch_size
        self._wait_s = wait_s
        self._max_queue_s = max_queue_s
        self._max_queue = max_queue
        self._waiting: deque[_Entry[Key, Item, Result]] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)  # torch keeps a pool of its own for each caller
        self._task: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self._rate: float | None = None  # items per second

    @property
    def busy_s(self) -> float:
        """Seconds for which the batch that runs now has been running; 0 if none does."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def submit(self, key: Key, item: Item) -> tuple[Result, int]:
        """The item's result, and how many items its batch had.

        Raises QueueFullError, or what `run` raised for this item.
        """
        self._check_room()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
        entry: _Entry[Key, Item, Result] = _Entry(
            key, item, asyncio.get_running_loop().create_future(), time.monotonic()
        )
        self._waiting.append(entry)
        self._arrival.set()
        return await entry.future

    def _check_room(self) -> None:
        wait = len(self._waiting) / self._rate if self._rate else 0.0
        if len(self._waiting) >= self._max_queue or wait > self._max_queue_s:
            # when about half of those before it are done
            raise QueueFullError(max(1, min(60, math.ceil(wait / 2))))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            self._busy_since = time.monotonic()
            try:
                await loop.run_in_executor(self._thread, self._run_batch, batch, loop)
                rate = len(batch) / self.busy_s
                self._rate = (
                    rate
                    if self._rate is None
                    else RATE_SMOOTHING * rate + (1 - RATE_SMOOTHING) * self._rate
                )
            finally:
                self._busy_since = None

    async def _next_batch(self) -> list[_Entry[Key, Item, Result]]:
        while True:
            self._drop_abandoned()
            if self._waiting:
                first = self._waiting[0]
                fellows = [entry for entry in self._waiting if entry.key == first.key]
                left = first.arrived + self._wait_s - time.monotonic()
                if len(fellows) >= self._max_batch_size or left <= 0:
                    batch = fellows[: self._max_batch_size]
                    chosen = {id(entry) for entry in batch}
                    self._waiting = deque(e for e in self._waiting if id(e) not in chosen)
                    return batch
            else:
                left = None
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except asyncio.TimeoutError:
                pass

    def _drop_abandoned(self) -> None:
        if any(entry.future.done() for entry in self._waiting):
            self._waiting = deque(e for e in self._waiting if not e.future.done())

    def _run_batch(
        self, batch: list[_Entry[Key, Item, Result]], loop: asyncio.AbstractEventLoop
    ) -> None:
        """On the thread."""
        try:
            results = self._run(batch[0].key, [entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    self._run_batch([entry], loop)
            else:
                loop.call_soon_threadsafe(_fail, batch[0].future, error)
            return
        for entry, result in zip(batch, results, strict=True):
            loop.call_soon_threadsafe(_answer, entry.future, (result, len(batch)))


def _answer(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():  # its caller may have gone
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
