"""The batcher: which items share a batch or wait, and the effect of failures and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from caption_ray.serving.batching import Batcher, QueueFullError


class Device:
    """Doubles numbers, records its batches, and can be blocked."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.poison: set[int] = set()

    def run(self, key: str, items: Sequence[int]) -> list[int]:
        self.batches.append((key, list(items)))
        self.started.set()
        assert self.gate.wait(10)
        if self.poison & set(items):
            raise ValueError(f"cannot double {self.poison & set(items)}")
        return [2 * item for item in items]


Test = Callable[[Device], Coroutine[Any, Any, None]]


def batcher(device: Device, **changed: Any) -> Batcher[str, int, int]:
    options = {"max_batch_size": 4, "wait_s": 0.0, "max_queue_s": 60.0, "max_queue": 100, **changed}
    return Batcher(device.run, **options)


async def hold(device: Device, batches: Batcher[str, int, int]) -> asyncio.Task[Any]:
    """Start a batch of one item that runs until the gate is set."""
    device.gate.clear()
    device.started.clear()
    task = asyncio.create_task(batches.submit("a", -1))
    while not device.started.is_set():
        await asyncio.sleep(0.001)
    return task


def submit_all(
    batches: Batcher[str, int, int], items: Sequence[int], key: str = "a"
) -> list[asyncio.Task[tuple[int, int]]]:
    return [asyncio.create_task(batches.submit(key, item)) for item in items]


def test_an_idle_device_starts_at_once_with_what_there_is() -> None:
    async def main() -> None:
        device = Device()
        assert await batcher(device).submit("a", 1) == (2, 1)
        assert device.batches == [("a", [1])]

    asyncio.run(main())


def test_what_comes_while_the_device_is_busy_makes_the_next_batches() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device)
        first = await hold(device, batches)
        others = submit_all(batches, range(6))
        await asyncio.sleep(0.01)
        assert batches.num_waiting == 6
        device.gate.set()
        assert await asyncio.gather(first, *others) == [
            (-2, 1), (0, 4), (2, 4), (4, 4), (6, 4), (8, 2), (10, 2),
        ]  # fmt: skip
        assert [items for _, items in device.batches] == [[-1], [0, 1, 2, 3], [4, 5]]

    asyncio.run(main())


def test_only_equal_keys_share_a_batch_and_the_longest_waiting_goes_first() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device)
        first = await hold(device, batches)
        tasks = [
            asyncio.create_task(batches.submit(key, item))
            for item, key in enumerate(["b", "a", "b", "c", "a"])
        ]
        await asyncio.sleep(0.01)
        device.gate.set()
        await asyncio.gather(first, *tasks)
        assert device.batches[1:] == [("b", [0, 2]), ("a", [1, 4]), ("c", [3])]

    asyncio.run(main())


def test_with_a_wait_an_idle_device_gathers_first() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device, wait_s=5.0)
        results = await asyncio.wait_for(asyncio.gather(*submit_all(batches, range(4))), 2)
        assert [size for _, size in results] == [4] * 4, "a full batch does not wait"
        batches = batcher(device, wait_s=0.05)
        assert await batches.submit("a", 1) == (2, 1), "nor does anybody wait longer than that"

    asyncio.run(main())


def test_a_failure_is_only_that_of_the_item_that_causes_it() -> None:
    async def main() -> None:
        device = Device()
        device.poison = {2}
        batches = batcher(device)
        first = await hold(device, batches)
        tasks = submit_all(batches, range(4))
        await asyncio.sleep(0.01)
        device.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert isinstance(results[3], ValueError) and "cannot double {2}" in str(results[3])
        assert [result for result in results if isinstance(result, tuple)] == [
            (-2, 1), (0, 1), (2, 1), (6, 1),
        ]  # fmt: skip
        assert await batches.submit("a", 7) == (14, 1), "and the device goes on"

    asyncio.run(main())


def test_who_has_gone_is_left_out_and_hurts_nobody() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device)
        first = await hold(device, batches)
        tasks = submit_all(batches, range(4))
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        device.gate.set()
        assert await asyncio.gather(first, tasks[0], tasks[3]) == [(-2, 1), (0, 2), (6, 2)]
        assert device.batches[1] == ("a", [0, 3])

    asyncio.run(main())


def test_who_goes_while_the_batch_runs_hurts_nobody() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device)
        first = await hold(device, batches)
        first.cancel()
        await asyncio.sleep(0.01)
        device.gate.set()
        assert await batches.submit("a", 5) == (10, 1)

    asyncio.run(main())


def test_a_full_queue_refuses_and_admits_again() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device, max_queue=3)
        first = await hold(device, batches)
        tasks = submit_all(batches, range(3))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError) as refused:
            await batches.submit("a", 9)
        assert refused.value.retry_after >= 1
        device.gate.set()
        await asyncio.gather(first, *tasks)
        assert await batches.submit("a", 9) == (18, 1)

    asyncio.run(main())


def test_the_expected_wait_is_what_the_last_batches_took() -> None:
    """One item per batch, 0.1 s each: with 2 s allowed, about 20 may wait, but not 40."""

    async def main() -> None:
        device = Device()
        slow = threading.Event()

        def run(key: str, items: Sequence[int]) -> list[int]:
            slow.wait(0.1)
            return list(items)

        device.run = run  # type: ignore[method-assign, assignment]
        batches = batcher(device, max_batch_size=1, max_queue_s=2.0)
        for item in range(3):
            await batches.submit("a", item)
        tasks = submit_all(batches, range(40))
        await asyncio.sleep(0.02)
        refused = [task.exception() for task in tasks if task.done()]
        assert 10 <= len(tasks) - len(refused) <= 25
        for error in refused:
            assert isinstance(error, QueueFullError)
            assert error.retry_after in (1, 2), "about half of the wait of two seconds"
        for task in tasks:
            task.cancel()

    asyncio.run(main())


def test_a_hanging_device_is_seen() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device)
        assert batches.busy_s == 0
        first = await hold(device, batches)
        await asyncio.sleep(0.05)
        assert batches.busy_s >= 0.05
        device.gate.set()
        await first
        await asyncio.sleep(0.01)
        assert batches.busy_s == 0

    asyncio.run(main())


def test_gathering_ends_when_the_device_falls_idle() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device, num_lanes=2)
        first = await hold(device, batches)
        batches._last_s = 100.0  # so that gathering would take 15 s
        second = asyncio.create_task(batches.submit("a", 1))
        await asyncio.sleep(0.05)
        assert batches.num_waiting == 1, "it gathers, as the other lane runs"
        device.gate.set()
        assert await asyncio.wait_for(second, 2) == (2, 1)
        await first

    asyncio.run(main())


def test_lanes_run_batches_side_by_side() -> None:
    async def main() -> None:
        device = Device()
        batches = batcher(device, max_batch_size=2, num_lanes=2)
        device.gate.clear()
        tasks = submit_all(batches, range(5))
        while len(device.batches) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert (batches.num_running, batches.num_waiting) == (2, 1)
        assert sorted(sum((items for _, items in device.batches), [])) == [0, 1, 2, 3]
        device.gate.set()
        assert [result for result, _ in await asyncio.gather(*tasks)] == [0, 2, 4, 6, 8]
        await asyncio.sleep(0.01)
        assert batches.num_running == 0

    asyncio.run(main())


def test_a_wrong_number_of_results_fails_instead_of_hanging() -> None:
    async def main() -> None:
        device = Device()
        device.run = lambda key, items: []  # type: ignore[method-assign, assignment]
        with pytest.raises(RuntimeError, match="0 results for a batch of 1"):
            await asyncio.wait_for(batcher(device).submit("a", 1), 5)

    asyncio.run(main())
