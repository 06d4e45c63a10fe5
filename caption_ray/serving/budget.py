"""Memory that requests share: a budget, whose excess waits for its turn, and an allowance, whose
excess is refused."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class AllowanceExceededError(Exception):
    """All that is allowed is in use."""


class Allowance:
    """Bytes that may be in use at a time, of a kind whose amount is known only as they come. For
    any thread."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.lock = threading.Lock()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request uses of it, until the context is left."""
        share = Share(self)
        try:
            yield share
        finally:
            share.end()


class Share:
    """What one request uses of an allowance."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._used = 0
        self._has_ended = False

    def add(self, amount: int) -> None:
        """Use more. Raises AllowanceExceededError if there is too little, or the request has ended
        (a thread that still works for it has no reason to go on)."""
        with self._allowance.lock:
            if self._has_ended or self._allowance.used + amount > self._allowance.total:
                raise AllowanceExceededError
            self._allowance.used += amount
            self._used += amount

    def end(self) -> None:
        with self._allowance.lock:
            self._allowance.used -= self._used
            self._used, self._has_ended = 0, True


class Budget:
    """Bytes that may be in use at a time, given out in the order in which they were asked for. For
    one event loop."""

    def __init__(self, total: int) -> None:
        self.free = self.total = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Hold so many bytes, or all there are if that is less, until the context is left."""
        amount = min(amount, self.total)
        if self._waiting or amount > self.free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it had just got them
                    self.free += amount
                self._serve()
                raise
        else:
            self.free -= amount
        try:
            yield
        finally:
            self.free += amount
            self._serve()

    def _serve(self) -> None:
        """Give those who wait longest what they want, as far as there is enough."""
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.done():
                if amount > self.free:
                    return
                self.free -= amount
                turn.set_result(None)
            self._waiting.popleft()
