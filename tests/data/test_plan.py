import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledgers import ledger_of, mask_of

from caption_ray.data.ledger import Ledger
from caption_ray.data.plan import plan_epoch


def _numbers(slices):
    return [shard_slice.first + int(row) for shard_slice in slices for row in shard_slice.rows]


def _one_order_of_all_pictures(sizes, shuffle, limit, seen, world_size):
    """The reference, as long as the split: numbers of what each rank reads, from a mask of what
    was seen, (pictures,)."""
    firsts = np.cumsum(sizes) - sizes
    order = np.arange(len(sizes))
    if shuffle is not None:
        order = np.random.default_rng([*shuffle, 0]).permutation(order)
    numbers = [np.empty(0, np.int64)]
    for shard in order:
        rows = np.arange(sizes[shard])
        if shuffle is not None:
            rows = np.random.default_rng([*shuffle, 1, int(shard)]).permutation(rows)
        numbers.append(firsts[shard] + rows)
    whole = np.concatenate(numbers)
    left = whole[~seen[whole] & (whole < (sum(sizes) if limit is None else limit))]
    bounds = np.linspace(0, len(left), world_size + 1).round().astype(int)
    return [left[start:end].tolist() for start, end in itertools.pairwise(bounds)]


SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=12)
SHUFFLES = st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3))
WORLDS = st.integers(1, 9)


@st.composite
def _epochs(draw):
    """Sizes, the settings of an epoch, and a mask of what it has seen: of each shard nothing, all
    of it or any rows."""
    sizes = draw(SIZES)
    limit = draw(st.none() | st.integers(0, sum(sizes) + 2))
    parts = [
        draw(
            st.just([False] * size)
            | st.just([True] * size)
            | st.lists(st.booleans(), min_size=size, max_size=size)
        )
        for size in sizes
    ]
    return sizes, draw(SHUFFLES), limit, np.array(sum(parts, []), bool)


@given(_epochs(), WORLDS)
def test_shares_are_cut_from_one_order_of_all_pictures(epoch, world_size):
    sizes, shuffle, limit, seen = epoch
    consumed = ledger_of(sizes, seen)
    shares = [
        _numbers(
            plan_epoch(
                sizes, rank=rank, world_size=world_size, shuffle=shuffle, limit=limit,
                consumed=consumed,
            )
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert shares == _one_order_of_all_pictures(sizes, shuffle, limit, seen, world_size)


@given(SIZES, SHUFFLES, st.lists(st.tuples(WORLDS, st.integers(1, 40)), max_size=4))
def test_an_epoch_interrupted_at_any_steps_sees_every_picture_once(sizes, shuffle, parts):
    """parts: workers and the steps they take, of 2 pictures, until the next interruption."""
    ledger, seen = Ledger(sizes), []
    for world_size, steps in [*parts, (1, sum(sizes))]:
        shares = [
            _numbers(
                plan_epoch(
                    sizes, rank=rank, world_size=world_size, shuffle=shuffle, consumed=ledger
                )
            )[: 2 * steps]
            for rank in range(world_size)
        ]
        seen += sum(shares, [])
        ledger.mark(np.array(sum(shares, []), np.int64))
    assert sorted(seen) == list(range(sum(sizes)))


@pytest.mark.parametrize("begun", [False, True])
def test_a_share_of_a_hundred_million_pictures_permutes_its_own_shards_only(monkeypatch, begun):
    sizes = np.full(20_000, 5_000)
    consumed = Ledger(sizes)
    if begun:
        consumed.mark(np.arange(0, 30_000_000))
        consumed.mark(np.arange(50_000_000, 60_000_000, 1_000))
    permuted, original = [], np.random.default_rng

    def default_rng(seed):
        if seed[2] == 1:
            permuted.append(seed[3])
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    tracemalloc.start()
    slices = plan_epoch(
        sizes, rank=511, world_size=1_024, shuffle=(0, 3), consumed=consumed if begun else None
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert permuted == [shard_slice.shard for shard_slice in slices]
    left = 100_000_000 - (30_000_000 + 10_000 if begun else 0)
    assert abs(sum(len(one.rows) for one in slices) - left / 1_024) < 1
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("rows", "world_size"),
    list(itertools.product([[7], [3, 1, 5], [500] * 4 + [13]], [1, 2, 3, 8])),
)
def test_every_picture_exactly_once_over_all_ranks(rows, world_size):
    shares = [
        _numbers(plan_epoch(rows, rank=rank, world_size=world_size, shuffle=(0, 3)))
        for rank in range(world_size)
    ]
    assert sorted(sum(shares, [])) == list(range(sum(rows)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_rows_of_a_piece_belong_to_its_shard():
    rows = [4, 9, 2]
    for shard_slice in plan_epoch(rows, rank=0, world_size=1, shuffle=(1, 1)):
        assert shard_slice.first == sum(rows[: shard_slice.shard])
        assert set(shard_slice.rows) <= set(range(rows[shard_slice.shard]))


def test_epochs_differ_and_the_same_epoch_repeats():
    def order(seed, epoch):
        return _numbers(plan_epoch([50, 50], rank=0, world_size=1, shuffle=(seed, epoch)))

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_without_shuffle_the_stored_order():
    assert _numbers(plan_epoch([3, 4], rank=0, world_size=1, shuffle=None)) == list(range(7))


def test_what_is_left_of_an_epoch_is_its_tail():
    whole = _numbers(plan_epoch([20, 30], rank=0, world_size=1, shuffle=(0, 0)))
    consumed = Ledger([20, 30])
    consumed.mark(np.array(whole[:17]))
    rest = plan_epoch([20, 30], rank=0, world_size=1, shuffle=(0, 0), consumed=consumed)
    assert _numbers(rest) == whole[17:]


def test_an_interrupted_epoch_goes_on_with_another_number_of_workers():
    consumed = Ledger([40, 60])
    for rank in range(2):
        share = plan_epoch([40, 60], rank=rank, world_size=2, shuffle=(0, 0))
        consumed.mark(np.array(_numbers(share)[:11]))
    rest = [
        number
        for rank in range(3)
        for number in _numbers(
            plan_epoch([40, 60], rank=rank, world_size=3, shuffle=(0, 0), consumed=consumed)
        )
    ]
    assert sorted(rest) == np.flatnonzero(~mask_of(consumed)).tolist()


def test_a_limit_keeps_the_first_pictures():
    slices = plan_epoch([10, 10], rank=0, world_size=1, shuffle=(0, 0), limit=13)
    assert sorted(_numbers(slices)) == list(range(13))


def test_a_fully_consumed_shard_is_not_read():
    consumed = ledger_of([10, 10], np.arange(20) < 10)
    slices = plan_epoch([10, 10], rank=0, world_size=1, shuffle=(0, 0), consumed=consumed)
    assert [shard_slice.shard for shard_slice in slices] == [1]


def test_more_workers_than_pictures_leaves_some_without():
    shares = [plan_epoch([2], rank=rank, world_size=4, shuffle=(0, 0)) for rank in range(4)]
    assert sorted(len(_numbers(share)) for share in shares) == [0, 0, 1, 1]
