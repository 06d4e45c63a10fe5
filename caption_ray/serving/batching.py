"""Batches: requests that queue for one device run together, but never wait for each other.

replica.py uses it. Plain asyncio; only the lanes' threads, one per lane, may use the device.
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

GATHERING = 0.15
"""While another lane is running, a lane collects items for this share of a batch's duration."""

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
    """Runs items of equal key together, those that have waited longest first.

    A batch is whatever has arrived while the device was busy: on an idle device an item waits for
    others only if `wait_s` says so. An item whose caller has gone is dropped. If a batch fails, its
    items are run one by one, so that only the one that caused it fails.
    """

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item]], Sequence[Result]],
        *,
        max_batch_size: int,
        wait_s: float,
        max_queue_s: float,
        max_queue: int,
        num_lanes: int = 1,
    ) -> None:
        """`run` is called on a lane's thread and returns a result for each item. `num_lanes` is how
        many batches run at a time.

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
        # long-lived threads, as torch keeps a thread pool for each thread that calls it
        self._threads = [ThreadPoolExecutor(1) for _ in range(num_lanes)]
        self._dispatcher: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self._running: dict[int, float] = {}  # lane -> when its batch began
        self._lane_free = asyncio.Event()
        self._rate: float | None = None  # items per second and lane
        self._last_s = 0.0  # duration of the last batch

    @property
    def busy_s(self) -> float:
        """Seconds for which the oldest running batch has been running; 0 if none is."""
        return time.monotonic() - min(self._running.values()) if self._running else 0.0

    @property
    def num_running(self) -> int:
        """Number of batches running now."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def submit(self, key: Key, item: Item) -> tuple[Result, int]:
        """The item's result, and how many items its batch had.

        Raises QueueFullError, or what `run` raised for this item.
        """
        self._check_room()
        if self._dispatcher is None:
            self._dispatcher = asyncio.get_running_loop().create_task(self._dispatch())
        entry: _Entry[Key, Item, Result] = _Entry(
            key, item, asyncio.get_running_loop().create_future(), time.monotonic()
        )
        self._waiting.append(entry)
        self._arrival.set()
        return await entry.future

    def _check_room(self) -> None:
        wait = len(self._waiting) / (self._rate * len(self._threads)) if self._rate else 0.0
        if len(self._waiting) >= self._max_queue or wait > self._max_queue_s:
            # by then about half of those waiting are done
            raise QueueFullError(max(1, min(60, math.ceil(wait / 2))))

    async def _dispatch(self) -> None:
        while True:
            while len(self._running) == len(self._threads):
                self._lane_free.clear()
                await self._lane_free.wait()
            batch = await self._next_batch()
            # the first free lane: at low load always the same one, whose threads are warm
            lane = next(n for n in range(len(self._threads)) if n not in self._running)
            self._running[lane] = time.monotonic()
            task = asyncio.get_running_loop().create_task(self._run_on(lane, batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    async def _run_on(self, lane: int, batch: list[_Entry[Key, Item, Result]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads[lane], self._run_batch, batch, loop)
        finally:
            self._last_s = time.monotonic() - self._running.pop(lane)
            self._lane_free.set()
            self._arrival.set()  # wakes `_next_batch`: the device may be idle now
        rate = len(batch) / self._last_s
        before = rate if self._rate is None else self._rate
        self._rate = RATE_SMOOTHING * rate + (1 - RATE_SMOOTHING) * before

    async def _next_batch(self) -> list[_Entry[Key, Item, Result]]:
        while True:
            self._drop_abandoned()
            if self._waiting:
                first = self._waiting[0]
                fellows = [entry for entry in self._waiting if entry.key == first.key]
                # While another lane keeps the device busy, a fuller batch is worth a short wait.
                wait_s = max(self._wait_s, GATHERING * self._last_s if self._running else 0.0)
                left = first.arrived + wait_s - time.monotonic()
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
        """Runs on the lane's thread."""
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
