"""Stopping and saving between two steps, without a run."""

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from caption_ray.training.console import LeftAloneError, call_until_told_to_stop
from caption_ray.training.interruption import Votes, Wish


def _telling():
    """An event, and what sets it, which must be called but once."""
    told = threading.Event()

    def tell():
        assert not told.is_set()
        told.set()

    return told, tell


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_on_the_first_signal_the_workers_are_told_and_the_function_ends_by_itself(kind):
    before, (told, tell) = signal.getsignal(kind), _telling()

    def function():
        os.kill(os.getpid(), kind)
        assert told.wait(10)
        return "saved"

    assert call_until_told_to_stop(function, tell) == "saved"
    assert signal.getsignal(kind) is before


def test_a_second_ctrl_c_ends_at_once():
    # in a shell's background, processes start with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    (told, tell), ended = _telling(), threading.Event()

    def function():
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(30)

    with pytest.raises(KeyboardInterrupt):
        call_until_told_to_stop(function, tell)
    signal.signal(signal.SIGINT, before)
    ended.set()


def test_after_a_failure_nobody_waits_for_a_function_that_goes_on():
    failed, ended = threading.Event(), threading.Event()

    def function():
        failed.set()
        ended.wait(60)

    with pytest.raises(LeftAloneError):
        call_until_told_to_stop(
            function, lambda: None, failure=lambda: "no disk" if failed.is_set() else None
        )
    assert not ended.is_set()
    ended.set()


def test_a_function_that_ends_soon_after_a_failure_returns():
    failed = threading.Event()

    def function():
        failed.set()
        time.sleep(1.2)  # longer than between two looks
        return "ended"

    def failure():
        return "no disk" if failed.is_set() else None

    assert call_until_told_to_stop(function, lambda: None, failure=failure) == "ended"


def test_an_error_of_the_function_is_raised():
    def function():
        raise RuntimeError("no more workers")

    with pytest.raises(RuntimeError, match="no more workers"):
        call_until_told_to_stop(function, _telling()[1])


WISHES = [
    [Wish.GO_ON, Wish.SAVE, Wish.GO_ON, Wish.LOOK, Wish.GO_ON, Wish.GO_ON],
    [Wish.GO_ON, Wish.GO_ON, Wish.GO_ON, Wish.GO_ON, Wish.STOP, Wish.GO_ON],
    [Wish.LOOK, Wish.GO_ON, Wish.GO_ON, Wish.SAVE, Wish.GO_ON, Wish.GO_ON],
]


def _vote(wishes):
    votes, granted = Votes(), []
    for wish in wishes:
        granted.append(votes.count())
        votes.cast(wish)
    votes.count()
    return granted


def _rank(rank, file, results):
    dist.init_process_group("gloo", f"file://{file}", world_size=len(WISHES), rank=rank)
    results.put((rank, _vote(WISHES[rank])))
    dist.destroy_process_group()


def test_all_ranks_are_granted_the_highest_wish_of_the_step_before(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (str(tmp_path / "store"), results), nprocs=len(WISHES))
    granted = dict(results.get() for _ in WISHES)
    expected = [Wish.GO_ON, *(max(wishes) for wishes in zip(*WISHES, strict=True))][:-1]
    assert granted == {rank: expected for rank in range(len(WISHES))}


def test_one_worker_grants_its_own_wishes():
    assert _vote(WISHES[0]) == [Wish.GO_ON, *WISHES[0][:-1]]
