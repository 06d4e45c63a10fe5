"""A budget of memory that requests share: who would exceed it waits for its turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


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
