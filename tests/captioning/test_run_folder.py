"""Which checkpoints stay, and what the pointers name, whoever else is at work, and killed when."""

import collections
import itertools
import json
import math
import os
import random
import shutil
import threading
import time

import pytest
from interleaving import (
    Actor,
    Memory,
    Stepping,
    assert_right,
    commit,
    cut_off_at,
    load,
    pointers,
    whole,
)

from caption_ray import storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError
from caption_ray.storage.local import Local

CRITERION = run_folder.CRITERION


def _name(step):
    return run_folder.folder_name(step)


def _best(run):
    return json.loads(storage.read_bytes(f"{run}/best.json"))


def test_pointers_name_the_newest_and_the_best(tmp_path):
    run = tmp_path / "runs" / "a"
    for step in (1, 2, 3):
        commit(tmp_path, str(run), step, is_best=step == 2)
    assert run_folder.find(str(run), "latest").endswith("checkpoint-00000003")
    assert run_folder.find(str(run)).endswith("checkpoint-00000002")
    time.sleep(0.01)
    commit(tmp_path, f"{tmp_path}/runs/b", 1)
    assert run_folder.find(str(tmp_path / "runs")).endswith("b/checkpoint-00000001")
    uri = run_folder.find(str(run))
    assert run_folder.find(uri) == uri
    assert run_folder.find(f"{run}/latest").endswith("checkpoint-00000003")
    assert run_folder.find(f"{run}/best", "latest") == uri
    assert run_folder.find(f"{tmp_path}/runs/latest").endswith("b/checkpoint-00000001")


def test_the_newest_and_the_best_are_kept_and_the_rest_removed(tmp_path):
    run = tmp_path / "run"
    for step in range(1, 7):
        commit(tmp_path, str(run), step, keep=2, is_best=step == 2)
    assert storage.list_folders(str(run)) == [run_folder.folder_name(n) for n in (2, 5, 6)]


def test_nothing_to_find_says_how_to_get_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a checkpoint .*python jobs/train\.py"):
        run_folder.find(str(tmp_path))


def test_the_best_is_the_one_of_highest_cider_d(tmp_path):
    run = tmp_path / "run"
    uris = {step: commit(tmp_path, str(run), step, keep=9, to_validate=True) for step in (1, 2, 3)}
    assert _best(str(run))["checkpoint"] == run_folder.folder_name(1), "until one is validated"
    crowned = [
        run_folder.crown(uris[step], {run_folder.CRITERION: score})
        for step, score in ((1, 0.2), (2, 0.5), (3, 0.5))
    ]
    assert crowned == [True, True, False]
    assert _best(str(run))["checkpoint"] == run_folder.folder_name(2)
    assert _best(str(run))["metrics"] == {"val/loss": 1.0, run_folder.CRITERION: 0.5}


def test_where_cider_d_is_the_same_for_all_the_best_has_the_lowest_validation_loss(tmp_path):
    run = str(tmp_path / "run")
    for step, loss in enumerate((2.0, 1.2, 1.5, float("nan")), start=1):
        uri = commit(tmp_path, run, step, to_validate=True, loss=loss)
        run_folder.crown(uri, {CRITERION: 0.0})
        run_folder.release(uri)
    assert _best(run)["checkpoint"] == _name(2)
    assert whole(run) == [_name(2), _name(4)]
    uri = commit(tmp_path, run, 5, to_validate=True, loss=9.0)
    assert run_folder.crown(uri, {CRITERION: 0.1}), "from now on it says something"


def test_the_score_of_a_checkpoint_that_waits_no_longer_is_not_kept(tmp_path):
    """Its validation is of a job that ended."""
    run = str(tmp_path / "run")
    uris = [commit(tmp_path, run, step, to_validate=True) for step in (1, 2)]
    run_folder.release_all(run)
    assert not run_folder.crown(uris[1], {CRITERION: 0.9})
    assert _best(run)["checkpoint"] == _name(1) and run_folder.read_validations(run) == {}


def test_what_stays_broken_is_an_error_and_what_moves_is_found(tmp_path):
    run = str(tmp_path / "run")
    one, two = (commit(tmp_path, run, step, keep=2, is_best=True) for step in (1, 2))
    storage.delete(two)
    with pytest.raises(CheckpointError, match=f"{two}: not a whole checkpoint"):
        run_folder.read(lambda: run_folder.find(run), load)
    answers = iter([two, two, one])
    assert run_folder.read(lambda: next(answers), load) == one
    steps = itertools.count(9)
    with pytest.raises(CheckpointError, match=f"{_name(9 + run_folder.CHANGES - 1)}: not a whole"):
        run_folder.read(lambda: f"{run}/{_name(next(steps))}", load)
    run_folder.release_all(run)
    assert pointers(run) == {"latest": _name(1), "best": _name(1)}


def test_a_checkpoint_is_not_pruned_before_its_validation(tmp_path):
    run = tmp_path / "run"
    commit(tmp_path, str(run), 1)
    for step in (2, 3, 4, 5):
        commit(tmp_path, str(run), step, keep=1, to_validate=step == 3)
    kept = [run_folder.step_of(name) for name in storage.list_folders(str(run))]
    assert kept == [1, 3, 5], "the best, the one to validate, the newest"
    run_folder.release_all(str(run))
    commit(tmp_path, str(run), 6, keep=1)
    kept = [run_folder.step_of(name) for name in storage.list_folders(str(run))]
    assert kept == [1, 6]


def test_a_second_checkpoint_of_a_step_never_touches_the_one_that_is_named(tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = commit(tmp_path, str(run), 1)
    cut_off_at(checkpoint.STATE, monkeypatch)
    with pytest.raises(storage.StorageError):
        commit(tmp_path, str(run), 1)
    monkeypatch.undo()
    assert load(run_folder.find(str(run), "latest")) == first
    second = commit(tmp_path, str(run), 1, keep=1, is_best=True)
    assert second != first and run_folder.find(str(run), "latest") == second
    assert checkpoint.read_state(second).step == 1
    assert storage.list_folders(str(run)) == [storage.name(second)]


def test_the_pointers_stay_where_they_are_if_the_upload_is_not_whole(tmp_path, monkeypatch):
    run = tmp_path / "run"
    good = commit(tmp_path, str(run), 1)
    real = storage.write_bytes
    monkeypatch.setattr(
        storage,
        "write_bytes",
        lambda uri, data: real(uri, data[:-1] if uri.endswith(checkpoint.MODEL) else data),
    )
    with pytest.raises(storage.StorageError, match=r"model\.safetensors: \d+ bytes after"):
        commit(tmp_path, str(run), 2)
    assert run_folder.find(str(run), "latest") == good


def test_a_checkpoint_that_was_never_named_is_forgotten_once_the_run_goes_on(tmp_path, monkeypatch):
    """A commit killed between the manifest and latest.json leaves it: whole, yet nobody's past."""
    run = tmp_path / "run"
    names = [run_folder.folder_name(step) for step in range(6)]
    for step in (1, 2):
        commit(tmp_path, str(run), step, keep=2, is_best=step == 1)
    cut_off_at("latest.json", monkeypatch)
    for step in (3, 4):
        with pytest.raises(storage.StorageError):
            commit(tmp_path, str(run), step, after=2, to_validate=True)
    monkeypatch.undo()
    assert run_folder.find(str(run), "latest").endswith(names[2])
    assert storage.list_folders(str(run)) == names[1:5]
    load(str(run / names[4]))
    # with more workers, in another order; nobody writes over what is whole
    uri = commit(tmp_path, str(run), 3, keep=2, after=2)
    assert storage.list_folders(str(run)) == [*names[1:3], f"{names[3]}-2"]
    assert not storage.exists(storage.join(uri, run_folder.TO_VALIDATE)), "of the first of step 3"
    commit(tmp_path, str(run), 5, keep=2, after=3)
    assert storage.list_folders(str(run)) == [names[1], f"{names[3]}-2", names[5]]


def test_unfinished_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        commit(tmp_path, str(run), step, is_best=True)
    (run / run_folder.folder_name(7)).mkdir()
    (run / run_folder.folder_name(7) / ".model.safetensors.x.part").write_bytes(b"half")
    (run / ".latest.json.y.part").write_bytes(b"half")
    commit(tmp_path, str(run), 3)
    assert storage.list_folders(str(run)) == [run_folder.folder_name(n) for n in (2, 3)]
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == [
        "best.json",
        "latest.json",
    ]


# The race: everything at every operation of everything else --------------------------------------


# in memory every operation is tried, which takes a minute; on a disk some of them
@pytest.fixture(params=[pytest.param("memory", marks=pytest.mark.slow), "disk"])
def folders(request, tmp_path, monkeypatch):
    """What makes a fresh copy of a run with checkpoint 1 (the best so far), 2 and 3, which wait for
    their validation, and 4, which is not validated; returns its URI."""
    monkeypatch.setattr(run_folder, "LOOK_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    memory, kind = Memory(), request.param
    stepping = Stepping(memory if kind == "memory" else Local())
    monkeypatch.setattr(storage, "_backend", lambda *_: stepping)
    numbers = itertools.count()
    template = f"{tmp_path}/template"
    for step in (1, 2, 3, 4):
        uri = commit(tmp_path, template, step, to_validate=step < 4)
        if step == 1:
            run_folder.crown(uri, {CRITERION: 0.1})
            run_folder.release(uri)
    assert whole(template) == [_name(step) for step in (1, 2, 3, 4)]
    objects = dict(memory.objects)

    def fresh():
        if kind == "disk":
            return shutil.copytree(template, f"{tmp_path}/run-{next(numbers)}")
        memory.objects = dict(objects)
        return template

    return fresh


SCORES = {2: 0.9, 3: 0.5}


def _validate(run, step):
    uri = storage.join(run, _name(step))
    run_folder.crown(uri, {CRITERION: SCORES[step]})
    run_folder.release(uri)


def _resume(run):
    run_folder.release_all(run)
    return run_folder.read(lambda: run_folder.find(run, "latest"), load)


ACTORS = {
    "commit": lambda run, tmp: commit(tmp, run, 5, after=4, to_validate=True),
    "crown": lambda run, tmp: run_folder.crown(f"{run}/{_name(2)}", {CRITERION: SCORES[2]}),
    "release": lambda run, tmp: run_folder.release(f"{run}/{_name(3)}"),
    "validation": lambda run, tmp: _validate(run, 2),
    "another validation": lambda run, tmp: _validate(run, 3),
    "resume": lambda run, tmp: _resume(run),
    "next commit": lambda run, tmp: commit(tmp, run, 6, after=5),
    "reader": lambda run, tmp: run_folder.read(lambda: run_folder.find(run), load),
    "reader of latest": lambda run, tmp: run_folder.read(
        lambda: run_folder.find(run, "latest"), load
    ),
}
ZOMBIES = [{"commit", "next commit"}, {"crown", "resume"}, {"validation", "resume"},
           {"another validation", "resume"}, {"commit", "resume"}]  # fmt: skip
"""Pairs of which one is of a job, or a worker, that was given up: it may fail."""


def _count(fresh, name, tmp_path):
    return _actor(name, fresh(), tmp_path).move().operations


def _actor(name, run, tmp_path):
    return Actor(lambda: ACTORS[name](run, tmp_path))


def _spread(total, points):
    return sorted({round(i * total / max(1, points - 1)) for i in range(points)})


@pytest.mark.parametrize("first", ["commit", "validation", "reader", "reader of latest", "resume"])
def test_in_whatever_order_two_work_the_pointers_end_on_whole_checkpoints(
    folders, tmp_path, first, request
):
    total, seen = _count(folders, first, tmp_path), collections.Counter()
    disk = "disk" in request.node.name
    for second in [name for name in ACTORS if name != first]:
        is_zombie = {first, second} in ZOMBIES
        others = _count(folders, second, tmp_path)
        for at in _spread(total, 6) if disk else range(total + 1):
            inside = [] if disk else _spread(others, 12 if is_zombie else 3)[1:-1]
            for pause in [*inside, math.inf]:  # it may have more to do, after what the other did
                run = folders()
                one, two = _actor(first, run, tmp_path), _actor(second, run, tmp_path)
                one.move(at)
                two.move(pause)
                if not is_zombie:
                    pointers(run)  # at every moment
                one.move()
                two.move()
                place = f"{first} at {at} of {total}, {second} at {pause} of {others}"
                for actor in (one, two):
                    assert is_zombie or actor.error is None, (place, actor.error)
                try:
                    assert_right(run)
                except Exception as error:
                    raise AssertionError(place) from error
                seen[second] += 1
    print(f"\n{first}: {sum(seen.values())} interleavings, {dict(seen)}")
    assert sum(seen.values()) >= 40


@pytest.mark.parametrize("first", ["commit", "crown", "validation", "resume", "next commit"])
def test_whoever_is_killed_at_any_operation_the_next_start_makes_it_good(folders, tmp_path, first):
    total = _count(folders, first, tmp_path)
    for at in range(total + 1):
        run = folders()
        dead = _actor(first, run, tmp_path).move(at)
        if not dead.done:
            dead.kill()
        pointers(run)
        latest = run_folder.step_of(storage.name(_resume(run)))
        assert_right(run)
        commit(tmp_path, run, 7, after=latest)
        assert_right(run)
        left = [name for name in storage.list_folders(run) if name.startswith(run_folder.PREFIX)]
        assert left == whole(run) == sorted(set(pointers(run).values())), f"killed at {at}"
        files = sorted(storage.name(file) for file in storage.list_files(f"{run}/{_name(7)}"))
        assert files == [checkpoint.MANIFEST, checkpoint.MODEL, checkpoint.STATE]
    print(f"\n{first}: killed at each of {total} operations")


@pytest.mark.parametrize("folders", ["memory"], indirect=True)
def test_at_no_moment_of_many_at_work_does_a_pointer_name_nothing(folders, tmp_path):
    """Random orders of a commit, both validations one after the other, and readers."""
    steps = 0
    for seed in range(30):
        run, chance = folders(), random.Random(seed)
        actors = [_actor(name, run, tmp_path) for name in ("commit", "reader", "reader of latest")]
        actors.append(Actor(lambda run=run: (_validate(run, 2), _validate(run, 3))))
        while waiting := [actor for actor in actors if not actor.done]:
            chance.choice(waiting).move(chance.choice((1, 1, 2, 9)))
            pointers(run)
            steps += 1
        assert [actor.error for actor in actors] == [None] * 4
        assert_right(run)
        assert pointers(run) == {"latest": _name(5), "best": _name(2)}
    print(f"\n{steps} moments")


# Real runs, without Ray --------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_nothing_is_lost_while_validations_race_pruning(tmp_path, rounds):
    """Runs of real threads: one commits and prunes, one validates, one reads the best."""
    counts = collections.Counter()
    for number in range(rounds):
        run, chance = str(tmp_path / f"run-{number}"), random.Random(number)
        waiting, over, failed, best = [], threading.Event(), [], [0.0]

        def validate(chance=chance, waiting=waiting, over=over, best=best):
            while not over.is_set() or waiting:
                if not waiting:
                    time.sleep(0.0005)
                    continue
                uri, score = waiting.pop(0), chance.random()
                time.sleep(chance.choice((0, 0, 0.001, 0.004)))
                load(uri)
                assert run_folder.crown(uri, {CRITERION: score}) == (score > best[0])
                best[0] = max(best[0], score)
                run_folder.release(uri)
                counts["validations"] += 1

        def read(run=run, over=over):
            while not over.is_set():
                if run_folder.has_begun(run):
                    run_folder.read(lambda: run_folder.find(run), load)
                    counts["reads"] += 1

        def noting(function, over=over, failed=failed):
            try:
                function()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=noting, args=(f,)) for f in (validate, read)]
        for thread in threads:
            thread.start()
        try:
            for step in range(1, 9):
                waiting.append(commit(tmp_path, run, step, after=step - 1, to_validate=True))
                counts["commits"] += 1
        finally:
            over.set()
            for thread in threads:
                thread.join()
        if failed:
            raise failed[0]
        assert_right(run)
        counts["kept"] += len(whole(run))
    print(f"\n{dict(counts)}, 0 lost")


def test_a_validation_that_crowns_while_pruning_has_begun_loses_nothing(tmp_path, monkeypatch):
    """The replay of the race as it was found: pruning had read the pointers, a validation crowned
    and released, and pruning removed the best."""
    run = str(tmp_path / "run")
    one, two, *_ = [commit(tmp_path, run, step, to_validate=True) for step in (1, 2, 3, 4)]
    run_folder.crown(one, {CRITERION: 0.1})
    run_folder.release(one)
    real, done = run_folder._read_pointer, []

    def read(run, which):
        found = real(run, which)
        if not done:
            done.append(True)
            run_folder.crown(two, {CRITERION: 0.9})
            run_folder.release(two)
        return found

    monkeypatch.setattr(run_folder, "_read_pointer", read)
    run_folder._prune(run, _name(4), after=3, keep=2)
    assert done and pointers(run) == {"latest": _name(4), "best": _name(2)}
