"""Of several starts of a run, one owns it."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time

import pytest
from interleaving import commit, pointers

from caption_ray import storage
from caption_ray.captioning import ownership, run_folder
from caption_ray.captioning.ownership import LostError, Owner

QUICK = {
    "HEARTBEAT_SECONDS": 0.05, "SILENCE_SECONDS": 1.0, "SETTLE_SECONDS": 0.2, "LOOK_SECONDS": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in QUICK.items():
        monkeypatch.setattr(ownership, name, seconds)


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


@pytest.fixture
def lines():
    return []


def _held(run, lines=None, **options):
    say = (lambda line: None) if lines is None else lines.append
    return ownership.held(run, **{"job": None, "take_over": False, "say": say, **options})


def _leave(run, **changes):
    """What a start leaves that was killed."""
    owner = dataclasses.replace(ownership._myself("raysubmit_1"), id="dead", **changes)
    storage.write_bytes(storage.join(run, ownership.OWNER), ownership._to_json(owner))
    return owner


def test_the_claim_is_there_as_long_as_the_run_is_held(run):
    with _held(run, job="raysubmit_7") as (claim, lost):
        first = ownership.read(run)
        assert first.id == claim.id and first.job == "raysubmit_7" and not first.is_gone()
        time.sleep(0.3)
        assert ownership.read(run).beat > first.beat and not lost.is_set()
        claim.require()
    assert ownership.read(run) is None
    assert claim.is_lost()


def test_a_failure_leaves_no_claim(run):
    with pytest.raises(ZeroDivisionError), _held(run):
        raise ZeroDivisionError
    assert ownership.read(run) is None


def test_the_second_is_refused_and_told_by_whom_since_when_and_what_to_do(run, lines):
    with _held(run, job="raysubmit_7"):
        owner = ownership.read(run)
        message = (
            rf"--run.name run: .*process {owner.pid} on {owner.host} \(job raysubmit_7\), since "
            rf"{owner.since[:10]}.*; last sign of life \d{{4}}-.*--run\.take-over"
        )
        with pytest.raises(ValueError, match=message), _held(run, lines):
            pass
        assert ownership.read(run).id == owner.id, "the first goes on"
    assert len(lines) == 1 and f"belongs to process {owner.pid}" in lines[0]
    assert "last sign of life" in lines[0] and "Waiting up to" in lines[0]


def test_who_is_taken_over_finds_out_and_is_told_by_whom(run):
    with contextlib.ExitStack() as stack:
        first, lost = stack.enter_context(_held(run))
        second, kept = stack.enter_context(_held(run, take_over=True, job="raysubmit_2"))
        assert lost.wait(5) and not kept.is_set()
        with pytest.raises(LostError, match=r"taken over by process \d+ on .*raysubmit_2"):
            first.require()
        second.require()
        stack.pop_all().close()
    assert ownership.read(run) is None


def test_who_lost_the_run_leaves_the_claim_of_the_other(run):
    with _held(run) as (_, lost):
        owner = _leave(run)
        assert lost.wait(5)
    assert ownership.read(run) == owner


def test_a_removed_claim_is_a_lost_one(run):
    with _held(run) as (claim, lost):
        storage.delete(storage.join(run, ownership.OWNER))
        assert lost.wait(5)
        with pytest.raises(LostError, match="owner.json was removed"):
            claim.require()
    assert ownership.read(run) is None


def test_a_dead_process_of_this_machine_is_replaced_at_once(run, lines, monkeypatch):
    monkeypatch.setattr(ownership, "SILENCE_SECONDS", 600)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave(run, pid=dead.pid)
    with _held(run, lines) as (claim, _):
        claim.require()
    assert len(lines) == 1 and lines[0].startswith("Taking the run")


def test_another_process_of_the_same_number_is_not_the_owner(run):
    assert _leave(run, started=12345.0).is_gone()
    assert not _leave(run).is_gone()
    assert not _leave(run, started=12345.0, machine="elsewhere").is_gone(), "who knows"


@pytest.mark.parametrize("left", ["elsewhere", "hung here", "broken"])
def test_an_owner_who_stays_silent_is_replaced_after_a_while(run, lines, left):
    if left == "broken":
        storage.write_bytes(storage.join(run, ownership.OWNER), b"")
    else:
        _leave(run, **({"machine": "another", "pid": 1} if left == "elsewhere" else {}))
    begun = time.monotonic()
    with _held(run, lines) as (claim, _):
        claim.require()
        assert time.monotonic() - begun > QUICK["SILENCE_SECONDS"]
    assert "Waiting up to" in lines[0] and "Taking the run" in lines[1]


def test_who_is_stopped_while_another_waits_is_replaced(run):
    with _held(run) as (_, _), pytest.raises(ValueError), _held(run):
        pass
    other, held = ownership._myself(None), []
    storage.write_bytes(storage.join(run, ownership.OWNER), ownership._to_json(other))

    def hold():
        with _held(run) as (claim, _):
            held.append(claim.id)

    waiting = threading.Thread(target=hold)
    waiting.start()
    time.sleep(0.2)
    storage.delete(storage.join(run, ownership.OWNER))
    waiting.join(10)
    assert held


@pytest.mark.parametrize(
    ("left", "rounds"),
    [("nothing", 10), pytest.param("nothing", 50, marks=pytest.mark.slow), ("a dead owner", 5)],
)
def test_of_several_who_start_at_once_exactly_one_has_the_run(tmp_path, left, rounds):
    for number in range(rounds):
        run, ready, end = str(tmp_path / f"{number}"), threading.Barrier(4), threading.Event()
        held, refused = [], []
        if left != "nothing":
            _leave(run, started=1.0)

        def start(run=run, ready=ready, end=end, held=held, refused=refused):
            ready.wait()
            try:
                with _held(run) as (claim, _):
                    held.append(claim.id)
                    end.wait(30)
            except ValueError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(held) + len(refused) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert (len(held), len(refused)) == (1, 3), number
        assert ownership.read(run).id == held[0]
        end.set()
        for thread in threads:
            thread.join()
    print(f"\n{rounds} rounds of 4, of which 1 had the run each time")


def test_whoever_lost_the_run_commits_nothing(run, tmp_path, monkeypatch):
    with _held(run) as (claim, lost):
        first = commit(tmp_path, run, 1, claim=claim)
        before = sorted(storage.list_files(run))
        owner = _leave(run)
        assert lost.wait(5)
        with pytest.raises(LostError, match="taken over by process"):
            commit(tmp_path, run, 2, claim=claim)
        assert sorted(storage.list_files(run)) == before
        # while the files were on their way
        real = run_folder.checkpoint.verify_upload
        storage.write_bytes(
            storage.join(run, ownership.OWNER),
            ownership._to_json(dataclasses.replace(owner, id=claim.id)),
        )

        def verify(uri):
            real(uri)
            _leave(run)

        monkeypatch.setattr(run_folder.checkpoint, "verify_upload", verify)
        with pytest.raises(LostError):
            commit(tmp_path, run, 3, claim=claim)
    assert set(pointers(run).values()) == {storage.name(first)}


def test_what_an_owner_says_is_plain_json(run):
    with _held(run):
        found = json.loads(storage.read_bytes(storage.join(run, ownership.OWNER)))
    assert set(found) == {field.name for field in dataclasses.fields(Owner)}
