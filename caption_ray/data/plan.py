"""The sampler: which worker reads which pictures of an epoch, and in which order.

Pure functions of shard sizes, seed, epoch, rank and ledger; they read nothing. The pictures of a
split are numbered across its shards: picture i is row i - first of the shard that holds it. Of the
shards that others read only the sizes count, so a plan costs what its own shards cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from caption_ray.data.ledger import Ledger


@dataclass(frozen=True)
class ShardSlice:
    """Rows of one shard, in the order in which they are delivered."""

    shard: int
    rows: NDArray[np.int64]
    first: int
    """Number of the shard's first picture: picture number = first + row."""


def plan_epoch(
    rows_per_shard: Sequence[int] | NDArray[np.int64],
    *,
    rank: int,
    world_size: int,
    shuffle: tuple[int, int] | None,
    limit: int | None = None,
    consumed: Ledger | None = None,
) -> list[ShardSlice]:
    """The slices that worker `rank` reads; over all ranks every picture occurs exactly once.

    shuffle: (seed, epoch) for a new order of the shards and of the rows in each; None keeps the
    stored order. limit: read only this many pictures, the first ones. consumed: those that were
    read before (sampler state of an interrupted epoch), which are left out. The ranks get equally
    many pictures, give or take one; a shard on the border between two ranks is read by both.
    """
    assert 0 <= rank < world_size
    ledger = Ledger(rows_per_shard) if consumed is None else consumed
    assert np.array_equal(ledger.sizes, rows_per_shard), "the ledger of another split"
    left = ledger.left(limit)
    order = np.arange(len(left))
    if shuffle is not None:
        order = np.random.default_rng([*shuffle, 0]).permutation(order)

    # all that is left, shard after shard, is cut into shares
    ends = np.cumsum(left[order])
    bounds = np.linspace(0, left.sum(), world_size + 1).round().astype(int)
    begin, end = bounds[rank], bounds[rank + 1]
    if begin == end:
        return []
    first_place, last_place = np.searchsorted(ends, [begin, end - 1], side="right")
    slices = []
    for place in range(first_place, last_place + 1):
        shard = int(order[place])
        if not left[shard]:
            continue
        first, rows = int(ledger.firsts[shard]), np.arange(ledger.sizes[shard])
        if shuffle is not None:
            rows = np.random.default_rng([*shuffle, 1, shard]).permutation(rows)
        # dropped only after the shuffle, so that the rest of an interrupted epoch keeps its order
        if limit is not None:
            rows = rows[rows < limit - first]
        rows = ledger.unseen(shard, rows)
        start = ends[place] - left[shard]
        slices.append(ShardSlice(shard, rows[max(0, begin - start) : end - start], first))
    return slices
