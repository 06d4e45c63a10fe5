import itertools

import numpy as np
import pytest

from caption_ray.data.plan import plan_epoch


def _numbers(slices):
    return [shard_slice.first + int(row) for shard_slice in slices for row in shard_slice.rows]


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
    consumed = np.zeros(50, bool)
    consumed[whole[:17]] = True
    rest = plan_epoch([20, 30], rank=0, world_size=1, shuffle=(0, 0), consumed=consumed)
    assert _numbers(rest) == whole[17:]


def test_an_interrupted_epoch_goes_on_with_another_number_of_workers():
    consumed = np.zeros(100, bool)
    for rank in range(2):
        share = plan_epoch([40, 60], rank=rank, world_size=2, shuffle=(0, 0))
        consumed[_numbers(share)[:11]] = True
    rest = [
        number
        for rank in range(3)
        for number in _numbers(
            plan_epoch([40, 60], rank=rank, world_size=3, shuffle=(0, 0), consumed=consumed)
        )
    ]
    assert sorted(rest) == sorted(np.flatnonzero(~consumed))


def test_a_limit_keeps_the_first_pictures():
    slices = plan_epoch([10, 10], rank=0, world_size=1, shuffle=(0, 0), limit=13)
    assert sorted(_numbers(slices)) == list(range(13))


def test_a_fully_consumed_shard_is_not_read():
    consumed = np.zeros(20, bool)
    consumed[:10] = True
    slices = plan_epoch([10, 10], rank=0, world_size=1, shuffle=(0, 0), consumed=consumed)
    assert [shard_slice.shard for shard_slice in slices] == [1]


def test_more_workers_than_pictures_leaves_some_without():
    shares = [plan_epoch([2], rank=rank, world_size=4, shuffle=(0, 0)) for rank in range(4)]
    assert sorted(len(_numbers(share)) for share in shares) == [0, 0, 1, 1]
