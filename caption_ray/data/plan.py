"""The sampler: which worker reads which pictures of an epoch, and in which order.

Pure functions of shard sizes, seed, epoch and rank; they read nothing. The pictures of a split are
numbered across its shards: picture i is row i - first of the shard that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ShardSlice:
    """Rows of one shard, in the order in which they are delivered."""

    shard: int
    rows: NDArray[np.int64]
    first: int
    """Number of the shard's first picture: picture number = first + row."""


def plan_epoch(
    rows_per_shard: Sequence[int],
    *,
    rank: int,
    world_size: int,
    shuffle: tuple[int, int] | None,
    limit: int | None = None,
    consumed: NDArray[np.bool_] | None = None,
) -> list[ShardSlice]:
    """The slices that worker `rank` reads; over all ranks every picture occurs exactly once.

    shuffle: (seed, epoch) for a new order of the shards and of the rows in each; None keeps the
    stored order. limit: read only this many pictures, the first ones. consumed: bool (pictures,),
    those that were read before (sampler state of an interrupted epoch) and are left out. The ranks
    get equally many pictures, give or take one; a shard on the border between two ranks is read by
    both.
    """
    assert 0 <= rank < world_size
    sizes = np.asarray(rows_per_shard, dtype=np.int64)
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    total = int(sizes.sum())
    wanted = np.ones(total, dtype=bool) if consumed is None else ~consumed
    if limit is not None:
        wanted[limit:] = False

    order = np.arange(len(sizes))
    if shuffle is not None:
        order = np.random.default_rng([*shuffle, 0]).permutation(order)
    shard_of, row_of = [], []
    for shard in order:
        first = int(firsts[shard])
        rows = np.arange(sizes[shard])
        if shuffle is not None:
            rows = np.random.default_rng([*shuffle, 1, int(shard)]).permutation(rows)
        # dropped only after the shuffle, so that the rest of an interrupted epoch keeps its order
        rows = rows[wanted[first + rows]]
        row_of.append(rows)
        shard_of.append(np.full(len(rows), shard))
    shards, rows = np.concatenate(shard_of), np.concatenate(row_of)

    bounds = np.linspace(0, len(rows), world_size + 1).round().astype(int)
    mine = slice(bounds[rank], bounds[rank + 1])
    shards, rows = shards[mine], rows[mine]
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    return [
        ShardSlice(int(shards[start]), part, int(firsts[shards[start]]))
        for start, part in zip(starts, np.split(rows, starts[1:]), strict=True)
    ]
