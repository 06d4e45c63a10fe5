"""The ledger of an epoch: which pictures of a split it has seen, kept by shard.

An untouched shard costs nothing, a finished one a mark, and only an open one, which was read in
part, has a flag for each of its rows. So what a ledger takes, in memory, in a checkpoint and
between workers, grows with the number of shards and with the rows of the open ones, not with the
number of pictures. The plan leaves out what it holds; a worker's feed marks in it and unites it
with those of the other workers; checkpoints keep it. Only numpy here: nothing is read or sent.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

UNTOUCHED, OPEN, FINISHED = 0, 1, 2
"""The progress of a shard: none, some or all of its pictures have been seen. The order counts:
what several workers did to a shard is at least the largest of their marks."""


class Ledger:
    """The pictures that have been seen, of a split whose shards have these sizes.

    Pictures are numbered across the shards: picture i is row i - first of the shard that holds it.
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64]) -> None:
        """sizes: pictures in each shard. Nothing has been seen yet."""
        self.sizes: NDArray[np.int64] = np.array(sizes, np.int64)
        """(shards,)"""
        self.firsts: NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        """(shards,), the number of each shard's first picture"""
        self.progress: NDArray[np.uint8] = np.zeros(len(self.sizes), np.uint8)
        """(shards,), UNTOUCHED, OPEN or FINISHED"""
        self._open: dict[int, NDArray[np.bool_]] = {}
        """Of each open shard: which of its rows have been seen, (rows,)."""

    @classmethod
    def of(
        cls,
        sizes: Sequence[int] | NDArray[np.int64],
        progress: NDArray[np.uint8],
        flags: NDArray[np.uint8],
    ) -> Ledger:
        """The ledger with this progress (shards,) and these flags of its open shards, as `flags`
        gives them; an open shard whose flags are all set is finished.

        Raises ValueError if they do not fit one another.
        """
        ledger = cls(sizes)
        shards = np.flatnonzero(progress == OPEN)
        if progress.shape != ledger.sizes.shape or flags.shape != (ledger.sizes[shards].sum(),):
            raise ValueError(
                f"a ledger of {len(ledger.sizes)} shards with the progress of {len(progress)} and "
                f"{len(flags)} flags for {ledger.sizes[shards].sum()} rows"
            )
        ledger.progress[progress == FINISHED] = FINISHED
        ends = np.cumsum(ledger.sizes[shards])
        for shard, seen in zip(shards.tolist(), np.split(flags, ends[:-1]), strict=False):
            ledger._note(shard, seen.astype(bool))
        return ledger

    def mark(self, numbers: NDArray[np.int64]) -> None:
        """Note that these pictures have been seen; once more changes nothing.

        numbers: (pictures,), in any order. Raises IndexError for one that does not exist.
        """
        if not len(numbers):
            return
        numbers = np.sort(numbers)
        if numbers[0] < 0 or numbers[-1] >= self.sizes.sum():
            raise IndexError(f"pictures {numbers[0]} to {numbers[-1]} of {self.sizes.sum()}")
        shards = np.searchsorted(self.firsts, numbers, side="right") - 1
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for shard, part in zip(shards[starts].tolist(), np.split(numbers, starts[1:]), strict=True):
            if self.progress[shard] != FINISHED:
                seen = self._open.get(shard)
                seen = np.zeros(self.sizes[shard], bool) if seen is None else seen
                seen[part - self.firsts[shard]] = True
                self._note(shard, seen)

    def _note(self, shard: int, seen: NDArray[np.bool_]) -> None:
        """Keep the flags of a shard for as long as it is open."""
        self._open[shard] = seen
        self.progress[shard] = OPEN
        if seen.all():
            del self._open[shard]
            self.progress[shard] = FINISHED

    def clear(self) -> None:
        """Forget everything: a new epoch has seen nothing yet."""
        self.progress[:] = UNTOUCHED
        self._open.clear()

    def left(self, limit: int | None = None) -> NDArray[np.int64]:
        """How many pictures of each shard have not been seen yet, (shards,).

        limit: count only the first `limit` pictures of the split.
        """
        within = self.sizes if limit is None else np.clip(limit - self.firsts, 0, self.sizes)
        left = np.where(self.progress == FINISHED, 0, within)
        for shard, seen in self._open.items():
            left[shard] -= np.count_nonzero(seen[: within[shard]])
        return left

    def unseen(self, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the rows of a shard that have not been seen yet, in the same order."""
        if self.progress[shard] == OPEN:
            return rows[~self._open[shard][rows]]
        return rows[:0] if self.progress[shard] == FINISHED else rows

    def flags(self, shards: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Of each row of these shards, one after the other, whether it has been seen: (rows,) of 0
        and 1."""
        parts = [
            self._open[shard]
            if self.progress[shard] == OPEN
            else np.full(self.sizes[shard], self.progress[shard] == FINISHED)
            for shard in shards.tolist()
        ]
        return np.concatenate([np.empty(0, np.uint8), *parts], dtype=np.uint8)

    def united(self, largest: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Ledger:
        """What any of several workers has seen. All of them call this, with the same sizes.

        largest: the element-wise maximum of an array over all workers, which is called twice: for
        the progress of all shards, then for the flags of those that no worker has finished alone.
        """
        progress = largest(self.progress)
        undecided = np.flatnonzero(progress == OPEN)
        return Ledger.of(self.sizes, progress, largest(self.flags(undecided)))

    def to_bytes(self) -> bytes:
        """The ledger as a file: an npz archive of `sizes`, `progress` and `flags` (as bits)."""
        file = io.BytesIO()
        flags = np.packbits(self.flags(np.flatnonzero(self.progress == OPEN)))
        np.savez_compressed(file, sizes=self.sizes, progress=self.progress, flags=flags)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Ledger:
        """The ledger that `to_bytes` wrote; ValueError if it is none."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                sizes, progress, flags = found["sizes"], found["progress"], found["flags"]
        except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
            raise ValueError(f"not a ledger ({error!r})") from None
        except (AttributeError, TypeError):  # another kind of file of numpy's has no parts
            raise ValueError("not a ledger, but a single array") from None
        rows = int(sizes[progress == OPEN].sum())
        return cls.of(sizes, progress, np.unpackbits(flags)[:rows])
