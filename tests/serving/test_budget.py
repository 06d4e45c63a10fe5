"""Memory is given out in order, never more than there is, and comes back whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

from caption_ray.serving.budget import Budget


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_never_more_than_there_is_and_all_come_to_their_turn() -> None:
    async def scenario() -> None:
        budget, chance, used, most, done = Budget(100), random.Random(0), 0, 0, 0

        async def work(amount: int) -> None:
            nonlocal used, most, done
            async with budget.take(amount):
                used += min(amount, 100)
                most = max(most, used)
                try:
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    used -= min(amount, 100)
            done += 1

        tasks = [asyncio.create_task(work(chance.randrange(1, 130))) for _ in range(500)]
        for task in chance.sample(tasks, 100):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert 50 < most <= 100
        assert done >= 400 and budget.free == 100
        async with budget.take(100):
            assert budget.free == 0

    run(scenario())


def test_the_first_to_ask_is_the_first_to_get() -> None:
    async def scenario() -> None:
        budget, order = Budget(10), []

        async def work(number: int, amount: int) -> None:
            async with budget.take(amount):
                order.append(number)

        async with budget.take(8):
            tasks = [asyncio.create_task(work(n, a)) for n, a in enumerate((9, 1, 10, 2, 50))]
            await asyncio.sleep(0.01)
            assert order == [], "a small one does not overtake a large one for ever"
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4] and budget.free == 10

    run(scenario())


def test_who_gives_up_waiting_lets_the_next_go_on() -> None:
    async def scenario() -> None:
        budget, got = Budget(10), asyncio.Event()

        async def work(amount: int) -> None:
            async with budget.take(amount):
                got.set()

        async with budget.take(5):
            large = asyncio.create_task(work(10))
            small = asyncio.create_task(work(5))
            await asyncio.sleep(0.01)
            assert not got.is_set()
            large.cancel()
            await asyncio.wait([small])
        assert got.is_set() and budget.free == 10

    run(scenario())


def test_a_turn_that_came_with_the_end_is_passed_on() -> None:
    async def scenario() -> None:
        budget = Budget(10)

        async def work() -> None:
            async with budget.take(10):
                await asyncio.sleep(60)

        holder = budget.take(10)
        await holder.__aenter__()
        waiting = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        await holder.__aexit__(None, None, None)  # its turn has come, but it has not run yet
        waiting.cancel()
        await asyncio.wait([waiting])
        assert budget.free == 10

    run(scenario())
