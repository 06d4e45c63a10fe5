import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledgers import ledger_of, mask_of

from caption_ray.data.ledger import FINISHED, OPEN, UNTOUCHED, Ledger

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@st.composite
def _marked(draw, workers=1):
    """Sizes, and for each worker the numbers that it marks, call by call."""
    sizes = draw(SIZES)
    numbers = st.integers(0, max(0, sum(sizes) - 1))
    calls = st.lists(st.lists(numbers, max_size=12 if sum(sizes) else 0), max_size=6)
    return sizes, [draw(calls) for _ in range(workers)]


def _ledger_and_mask(sizes, calls):
    ledger, mask = Ledger(sizes), np.zeros(sum(sizes), bool)
    for numbers in calls:
        ledger.mark(np.array(numbers, np.int64))
        mask[numbers] = True
    return ledger, mask


def _by_shard(sizes, values):
    return np.split(np.asarray(values), np.cumsum(sizes)[:-1])


@given(_marked(), st.none() | st.integers(0, 80))
def test_a_ledger_knows_what_a_mask_of_all_pictures_knows(marked, limit):
    sizes, (calls,) = marked
    ledger, mask = _ledger_and_mask(sizes, calls)
    assert mask_of(ledger).tolist() == mask.tolist()
    wanted = ~mask & (np.arange(len(mask)) < (len(mask) if limit is None else limit))
    assert ledger.left(limit).tolist() == [int(part.sum()) for part in _by_shard(sizes, wanted)]
    for shard, part in enumerate(_by_shard(sizes, mask)):
        rows = np.arange(sizes[shard])[::-1]
        assert ledger.unseen(shard, rows).tolist() == np.flatnonzero(~part)[::-1].tolist()


@given(_marked())
def test_only_open_shards_have_flags(marked):
    sizes, (calls,) = marked
    ledger, mask = _ledger_and_mask(sizes, calls)
    for shard, part in enumerate(_by_shard(sizes, mask)):
        expected = UNTOUCHED if not part.any() else FINISHED if part.all() else OPEN
        assert ledger.progress[shard] == expected
        assert (shard in ledger._open) == (expected == OPEN)


@given(_marked())
def test_a_ledger_comes_back_from_its_file(marked):
    sizes, (calls,) = marked
    ledger, mask = _ledger_and_mask(sizes, calls)
    again = Ledger.from_bytes(ledger.to_bytes())
    assert again.sizes.tolist() == sizes
    assert again.progress.tolist() == ledger.progress.tolist()
    assert mask_of(again).tolist() == mask.tolist()


@given(_marked())
def test_a_cleared_ledger_is_a_new_one(marked):
    sizes, (calls,) = marked
    ledger, _ = _ledger_and_mask(sizes, calls)
    ledger.clear()
    assert ledger.to_bytes() == Ledger(sizes).to_bytes()


def _united(ledgers):
    """What each worker has after all have united theirs, in threads; and what each sent, in
    bytes."""
    barrier = threading.Barrier(len(ledgers))
    sent, results = [[] for _ in ledgers], [None] * len(ledgers)

    def work(rank):
        def largest(values):
            sent[rank].append(values)
            barrier.wait(10)
            found = np.maximum.reduce([arrays[-1] for arrays in sent])
            barrier.wait(10)
            return found

        results[rank] = ledgers[rank].united(largest)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ledgers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results, [sum(array.nbytes for array in arrays) for arrays in sent]


@given(_marked(workers=3))
def test_every_worker_gets_the_union_and_keeps_its_own(marked):
    sizes, calls = marked
    made = [_ledger_and_mask(sizes, own) for own in calls]
    results, _ = _united([ledger for ledger, _ in made])
    union = np.logical_or.reduce([mask for _, mask in made])
    for result in results:
        assert result.to_bytes() == ledger_of(sizes, union).to_bytes()
    for ledger, mask in made:
        assert mask_of(ledger).tolist() == mask.tolist()


def test_a_shard_that_two_workers_finish_together_is_finished():
    one, other = Ledger([4, 4]), Ledger([4, 4])
    one.mark(np.array([1, 3, 4]))
    other.mark(np.array([0, 2]))
    for united in _united([one, other])[0]:
        assert united.progress.tolist() == [FINISHED, OPEN]


def test_what_is_kept_and_sent_grows_with_shards_and_open_rows_and_not_with_pictures():
    for rows in (50, 5_000):
        ledger = Ledger([rows] * 1_000)
        ledger.mark(np.arange(500 * rows))
        assert len(ledger.to_bytes()) < 1_000 and _united([ledger])[1] == [1_000]
    ledger.mark(np.arange(3_000_000, 3_000_500))
    assert len(ledger.to_bytes()) < 2_000 and _united([ledger])[1] == [1_000 + 5_000]


def test_pictures_that_do_not_exist_are_refused():
    for number in (-1, 5):
        with pytest.raises(IndexError, match=f"{number}.* of 5"):
            Ledger([2, 3]).mark(np.array([number]))


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    np.save(tmp_path / "mask.npy", np.ones(3, bool))
    np.savez(tmp_path / "other.npz", mask=np.ones(3, bool))
    for data in (b"", b"text", (tmp_path / "mask.npy").read_bytes(),
                 (tmp_path / "other.npz").read_bytes()):  # fmt: skip
        with pytest.raises(ValueError, match="not a ledger"):
            Ledger.from_bytes(data)
    with pytest.raises(ValueError, match="a ledger of 2 shards with the progress of 3 and 0 flags"):
        Ledger.of([2, 3], np.zeros(3, np.uint8), np.zeros(0, np.uint8))
    with pytest.raises(ValueError, match="and 1 flags for 3 rows"):
        Ledger.of([2, 3], np.array([2, 1], np.uint8), np.zeros(1, np.uint8))
