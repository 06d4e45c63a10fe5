"""What planning an epoch and keeping its ledger cost one worker of many, by the number of pictures.

Beside it stands the simple way: every worker permutes all pictures, and the ledger is a bool for
each of them. The data sets are made up: only the sizes of shards count, and nothing is read.
"""

from __future__ import annotations

import io
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_ray.benchmark import measuring
from caption_ray.config import Count, Parallel
from caption_ray.data.ledger import Ledger
from caption_ray.data.plan import plan_epoch

PICTURES = (1_000_000, 10_000_000, 100_000_000)

SIMPLE_UP_TO = 10_000_000
"""Pictures up to which the simple way is measured: it takes 40 bytes of memory for each."""

SHUFFLE = (0, 3)
"""Seed and epoch."""


@dataclass
class Epochs:
    """Time and memory of one worker's plan, and the size of the ledger, at 1, 10 and 100 million
    pictures, when an epoch begins and when each worker has read half of its share."""

    shards: Count = 20_000
    """Shards of the training split, as large as the pictures need."""
    workers: Parallel = 1024
    """Training workers, of which the one in the middle is measured."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds, and at most 10 million pictures."""


def run(options: Epochs) -> None:
    rounds, counts = (2, PICTURES[:-1]) if options.quick else (options.rounds, PICTURES)
    print(f"\nepochs: {options.shards:,} shards, {options.workers:,} workers")
    print(f"{'':34}{'plan, ms':>16}{'of simple':>14}{'peak, MiB':>12}"
          f"{'checkpoint, kB':>16}{'exchange, kB':>14}")  # fmt: skip
    found = {}
    for pictures in counts:
        sizes = np.diff(np.linspace(0, pictures, options.shards + 1).round().astype(int))
        for place in ("start", "middle"):
            ledger = Ledger(sizes)
            if place == "middle":
                _read_half(ledger, options.workers)
            title = f"{pictures:,}, {place}"
            found[title] = _measure(title, ledger, options.workers, rounds)
    measuring.record(
        {"section": "epochs", "shards": options.shards, "workers": options.workers, "at": found}
    )


def _read_half(ledger: Ledger, workers: int) -> None:
    """Mark the first half of every worker's share."""
    fresh = Ledger(ledger.sizes)
    for rank in range(workers):
        numbers = _numbers(fresh, rank, workers)
        ledger.mark(numbers[: len(numbers) // 2])


def _numbers(ledger: Ledger, rank: int, workers: int) -> NDArray[np.int64]:
    """Numbers of the pictures that a worker reads, in order."""
    slices = plan_epoch(
        ledger.sizes, rank=rank, world_size=workers, shuffle=SHUFFLE, consumed=ledger
    )
    return np.concatenate([np.empty(0, np.int64), *(one.first + one.rows for one in slices)])


def _simple_numbers(
    ledger: Ledger, seen: NDArray[np.bool_], rank: int, workers: int
) -> NDArray[np.int64]:
    """The same, from the order of all pictures and a bool for each: (pictures,)."""
    order = np.random.default_rng([*SHUFFLE, 0]).permutation(len(ledger.sizes))
    parts = []
    for shard in order.tolist():
        rows = np.random.default_rng([*SHUFFLE, 1, shard]).permutation(int(ledger.sizes[shard]))
        numbers = ledger.firsts[shard] + rows
        parts.append(numbers[~seen[numbers]])
    left = np.concatenate(parts)
    bounds = np.linspace(0, len(left), workers + 1).round().astype(int)
    return left[bounds[rank] : bounds[rank + 1]].copy()


def _measure(title: str, ledger: Ledger, workers: int, rounds: int) -> dict[str, Any]:
    """Measure, print and return what each way takes."""
    rank = workers // 2
    sent = 0

    def alone(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal sent
        sent += values.nbytes
        return values

    ledger.united(alone)
    plans: dict[str, Callable[[], NDArray[np.int64]]] = {
        "caption_ray": lambda: _numbers(ledger, rank, workers)
    }
    ledgers = {"caption_ray": (len(ledger.to_bytes()), sent)}
    if ledger.sizes.sum() <= SIMPLE_UP_TO:
        seen = ledger.flags(np.arange(len(ledger.sizes))).astype(bool)
        plans["simple"] = lambda: _simple_numbers(ledger, seen, rank, workers)
        file = io.BytesIO()
        np.save(file, seen)
        ledgers["simple"] = len(file.getvalue()), seen.nbytes
        assert np.array_equal(plans["simple"](), plans["caption_ray"]())
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in range(1 + rounds):  # in turn; the first round warms up
        for name, plan in plans.items():
            start = time.perf_counter()
            plan()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {}
    for name, (checkpoint, exchange) in ledgers.items():
        own = [1000 * taken for taken in seconds[name]]
        peak = _peak(plans[name]) / 2**20
        found[name] = {
            "plan_ms": round(statistics.median(own), 2),
            "peak_mib": round(peak, 1),
            "checkpoint_bytes": checkpoint,
            "exchange_bytes": exchange,
        }
        compared = ""
        if "simple" in plans:
            faster = measuring.ratios(seconds["simple"], seconds[name])
            compared = measuring.spread(faster, ".0f")
            found[name]["ratio"] = round(statistics.median(faster), 1)
        print(f"{f'{title}, {name}':34}{measuring.spread(own, '.1f'):>16}{compared:>14}"
              f"{peak:12.1f}{checkpoint / 1000:16.1f}{exchange / 1000:14.1f}")  # fmt: skip
    return found


def _peak(work: Callable[[], object]) -> int:
    """Bytes that numpy and Python have allocated at most while it worked."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
