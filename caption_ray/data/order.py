"""The order in which ingest and raw streaming take the pictures of a split.

Pure functions of the records and a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caption_ray.data.locations import Cell
from caption_ray.data.sources import Record

WINDOW_BLOCKS = 4
"""Fewest row groups of Parquet files whose rows are mixed with each other."""


def shuffled(records: Sequence[Record], seed: int, together: int) -> list[Record]:
    """The records in random order; `together`: how many are read by one task.

    Pictures in Parquet files can only be read by the row group. So the row groups are put in random
    order, and rows are mixed within windows of several, enough for one task at least: a task reads
    no more than those of its window, or of two.
    """
    rng = np.random.default_rng(seed)
    if not any(isinstance(record.location, Cell) for record in records):
        return [records[i] for i in rng.permutation(len(records))]
    blocks: dict[object, list[Record]] = {}
    for record in records:
        block = record.location.block if isinstance(record.location, Cell) else record.location
        blocks.setdefault(block, []).append(record)
    listed = list(blocks.values())
    result: list[Record] = []
    window: list[Record] = []
    count = 0
    for number, i in enumerate(rng.permutation(len(listed)), start=1):
        window += listed[i]
        count += 1
        is_enough = count >= WINDOW_BLOCKS and len(window) >= together
        if is_enough or number == len(listed):
            result += [window[i] for i in rng.permutation(len(window))]
            window, count = [], 0
    return result
