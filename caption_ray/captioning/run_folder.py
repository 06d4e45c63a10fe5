"""The folder of a run: every name in it, which checkpoint is meant, and which are removed when.

    <storage>/<run>/
      latest.json  best.json        pointers to checkpoints, replaced atomically
      owner.json                    who writes here: see ownership.py
      config.json  vocabulary.json  what the run was started with
      data.json                     the data set that it learns from
      history.json                  the logged points, for curves
      failure.txt                   why the run cannot go on, if it cannot
      checkpoint-00000120/          see checkpoint.py; beside its files:
        to-validate                 there until its validation is over
      validation/                   what each validation found, one file a checkpoint
      evaluation/                   what jobs/evaluate.py found

Training writes here (commit, crown, release); everybody else reads (find, load).

A commit, a validation and readers work at the same time, without a lock, and each may be killed
between two operations. They rely on what local disks (rename) and S3 (put, delete, list) give:
objects appear, are replaced and disappear atomically, and every later look sees it. The protocol:

1. The facts are written once, by one writer. A checkpoint is whole while it has its manifest; it
   waits for validation while it has `to-validate`; its score is its file in validation/. A whole
   checkpoint is never written to again. The pointers only repeat what follows from these facts
   (`_settle`): whoever writes one looks again until it agrees with the facts, so nothing is lost.
2. A commit writes `to-validate`, the files, the manifest, then the pointers, best.json first.
3. A validation writes the score, then best.json, and only then removes `to-validate`. If its
   checkpoint no longer waits (its job has ended, see `release_all`), it writes nothing.
4. Pruning, the last part of a commit, decides on each checkpoint separately: it looks for
   `to-validate`; only after seeing none it settles the pointers again; then it removes the
   checkpoint if no pointer names it, the manifest first. A checkpoint that no longer waits was
   crowned before, if at all, so this later look sees it. Finally pruning settles once more: if a
   writer that was cut off has pointed to a removed checkpoint, the pointer moves to a whole one.
   That writer does the same after its own write.
5. Readers find and load, and start again as long as the answer changes (`read`).

A kill therefore leaves the pointers on whole checkpoints. `release_all` and the next commit
complete what was interrupted, and remove unfinished checkpoints and whole ones beyond the one that
the run resumed from: their commit was killed before latest.json named them.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar

from caption_ray import storage
from caption_ray.captioning import checkpoint
from caption_ray.captioning.checkpoint import CheckpointError, Loaded, State
from caption_ray.captioning.ownership import Claim
from caption_ray.config import Config, from_dict, to_dict
from caption_ray.data.vocabulary import Vocabulary

PREFIX = "checkpoint-"
TO_VALIDATE = "to-validate"
CRITERION, LOSS = "val/CIDEr-D", "val/loss"
"""The metrics that decide which checkpoint is the best: see `rank`."""
Which = Literal["latest", "best"]
POINTERS: tuple[Which, Which] = ("latest", "best")
CONFIG, VOCABULARY, DATA = "config.json", "vocabulary.json", "data.json"
HISTORY, FAILURE = "history.json", "failure.txt"
VALIDATION, EVALUATION = "validation", "evaluation"

CHANGES = 10
"""How often a reader starts again because the checkpoint that it found was removed."""
LOOKS, LOOK_SECONDS = 5, 0.1
"""How often, and after how many seconds, a reader looks whether another checkpoint is meant now."""

T = TypeVar("T")


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder_name: str) -> int:
    """The inverse, also of the name of a second checkpoint of a step (see `commit`)."""
    return int(folder_name.removeprefix(PREFIX).partition("-")[0])


# Writing and removing checkpoints -------------------------------------------------------------


def commit(
    folder: Path,
    run: str,
    state: State,
    *,
    keep: int,
    after: float = math.inf,
    is_best: bool = False,
    to_validate: bool = False,
    claim: Claim | None = None,
) -> str:
    """Upload a saved checkpoint below the run's URI and let latest.json name it; best.json as well
    if there is no best yet, or if it `is_best` and no validation says otherwise. `after`: step of
    the checkpoint that it follows, which the run saved before or went on from; by default it
    follows all that are there.

    The manifest goes last; the pointers follow once all is there that it names. Only then are
    checkpoints removed that lie beyond `after`, or are neither the best nor among the newest `keep`
    nor yet to be validated. Returns the checkpoint's URI. Raises LostError if the `claim` on the
    run is lost.
    """
    if claim is not None:
        claim.require()
    name = _free_name(_remove_unfinished(run), state.step)
    uri = storage.join(run, name)
    storage.delete(_validation_file(uri))  # of an earlier checkpoint of this name
    if to_validate:
        storage.write_bytes(storage.join(uri, TO_VALIDATE), b"")
    for file in sorted(
        folder.iterdir(), key=lambda file: (file.name == checkpoint.MANIFEST, file.name)
    ):
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    checkpoint.verify_upload(uri)
    if claim is not None:  # the upload took its time
        claim.require()
    is_best = is_best or _read_pointer(run, "best") is None
    # the best first: with `latest` on this checkpoint already, a run that is killed here would go
    # on from it and never call it the best
    for which in reversed(POINTERS) if is_best else POINTERS[:1]:
        _point(run, which, name, state, state.metrics)
    _prune(run, name, after, keep)
    return uri


def crown(uri: str, found: dict[str, float]) -> bool:
    """Record what the validation of the checkpoint at `uri` found, and let best.json name the best
    checkpoint. Returns whether that is this one."""
    if not write_validation(uri, {**checkpoint.read_state(uri).metrics, **found}):
        return False
    # only best.json: latest.json belongs to whoever commits
    return _settle(storage.parent(uri), ["best"]).get("best") == storage.name(uri)


def release(uri: str) -> None:
    """The validation of the checkpoint at `uri` is over: it may be pruned as others are."""
    storage.delete(storage.join(uri, TO_VALIDATE))


def release_all(run: str) -> None:
    """At the start of a job, when nobody else writes: release the checkpoints that an earlier job
    left waiting for validation, remove half-written files, and correct the pointers."""
    storage.delete_partial(run)
    for name in _checkpoints(run):
        release(storage.join(run, name))
    _settle(run)


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Greater is better: checkpoints are ranked by CRITERION, and by the validation loss where that
    is equal.

    CRITERION cannot tell where it is equal for all: CIDEr-D weighs words by how few pictures they
    belong to, so a single validation picture always scores 0, as do captions without a right word.
    """
    loss = metrics.get(LOSS, math.inf)
    return metrics.get(CRITERION, -math.inf), -math.inf if math.isnan(loss) else -loss


def _settle(run: str, pointers: Sequence[Which] = POINTERS) -> dict[Which, str]:
    """Let the pointers name the right checkpoints, and return these; none before the first commit.

    The best is the whole, validated checkpoint of the highest rank, the earliest of equals. Apart
    from that pointers stay as they are, except that the newest whole checkpoint replaces one that
    is no longer whole.
    """
    while True:
        # the pointers before the scores: a score is written before best.json names its checkpoint
        named = {which: _read_pointer(run, which) or {} for which in pointers}
        whole = [name for name, is_whole in _checkpoints(run).items() if is_whole]
        right = {which: str(p["checkpoint"]) for which, p in named.items() if p and whole}
        right = {which: name if name in whole else whole[-1] for which, name in right.items()}
        scores = {name: _read_validation(storage.join(run, name)) for name in whole}
        validated = [name for name in whole if CRITERION in scores[name]]
        if validated and "best" in pointers:
            right["best"] = max(validated, key=lambda name: rank(scores[name]))
        wrong = [which for which, name in right.items() if named[which].get("checkpoint") != name]
        if validated and named.get("best") and CRITERION not in named["best"]["metrics"]:
            wrong.append("best")  # it was named as the only checkpoint, before its validation
        if not wrong:
            return right
        for which in wrong:
            name = right[which]
            try:
                state = checkpoint.read_state(storage.join(run, name))
            except CheckpointError:
                if storage.exists(storage.join(run, name, checkpoint.MANIFEST)):
                    raise
            else:  # if it was removed since, look again
                _point(run, which, name, state, {**state.metrics, **scores[name]})


def _point(run: str, which: Which, name: str, state: State, metrics: dict[str, float]) -> None:
    pointer = {
        "checkpoint": name,
        "step": state.step,
        "epoch": state.epoch,
        "metrics": metrics,
        "time": datetime.now(timezone.utc).isoformat(),
    }
    uri = storage.join(run, f"{which}.json")
    storage.write_bytes(uri, json.dumps(pointer, indent=1).encode())


def _checkpoints(run: str) -> dict[str, bool]:
    """Names of the run's checkpoints, oldest first, and whether each is whole."""
    return {
        name: storage.exists(storage.join(run, name, checkpoint.MANIFEST))
        for name in storage.list_folders(run)
        if name.startswith(PREFIX)
    }


def _remove_unfinished(run: str) -> list[str]:
    """Remove what killed commits left behind; returns the checkpoints that stay. Nobody else writes
    checkpoints of this run, because Ray Train uploads one after the other."""
    checkpoints = _checkpoints(run)
    for name, is_whole in checkpoints.items():
        storage.delete_partial(storage.join(run, name))
        if not is_whole:
            storage.delete(storage.join(run, name))
    # not of best.json: a validation may be writing it
    storage.delete_partial(storage.join(run, "latest.json"))
    return [name for name, is_whole in checkpoints.items() if is_whole]


def _free_name(taken: list[str], step: int) -> str:
    """The second checkpoint of a step (inside an epoch, and at its end) must not be written over
    the first, which may be the only good one."""
    first = folder_name(step)
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _prune(run: str, newest: str, after: float, keep: int) -> None:
    """Remove whole checkpoints that no pointer names: those beyond `after`, which the `newest`
    follows, and of its past all but the newest `keep` and those that wait for validation."""
    whole = [name for name, is_whole in _checkpoints(run).items() if is_whole]
    past = [name for name in whole if name == newest or step_of(name) <= after]
    for name in (name for name in whole if name not in past[-keep:]):
        uri = storage.join(run, name)
        if name in past and storage.exists(storage.join(uri, TO_VALIDATE)):
            continue
        # only now: a validation that found it the best has crowned it before releasing it
        if name in _settle(run).values():
            continue
        # the manifest first, so that a half-deleted checkpoint no longer counts as one
        storage.delete(storage.join(uri, checkpoint.MANIFEST))
        storage.delete(uri)
    _settle(run)


# Which checkpoint is meant --------------------------------------------------------------------


def find(uri: str, which: Which = "best") -> str:
    """The checkpoint that `uri` means, which is the same for jobs and for serving.

    A checkpoint means itself. A run means its best checkpoint (or its latest, by `which`), and a
    folder of runs means the run that was written to last. `<run>/latest` and `<run>/best` name one
    of the two whatever `which` says; the same works below a folder of runs.

    Several URIs, separated by commas, mean an ensemble: its checkpoints, again separated by
    commas. Raises CheckpointError if there is none.
    """
    return ",".join(_find_one(part, which) for part in checkpoint.members(uri))


def _find_one(uri: str, which: Which) -> str:
    uri = storage.resolve(uri)
    if storage.exists(storage.join(uri, checkpoint.MANIFEST)):
        return uri
    for name in POINTERS:
        if storage.name(uri) == name:
            which, uri = name, storage.parent(uri)
    folders = [uri, *(storage.join(uri, name) for name in storage.list_folders(uri))]
    latest = {run: pointer for run in folders if (pointer := _read_pointer(run, "latest"))}
    if not latest:
        raise CheckpointError(
            f"{uri}: neither a checkpoint nor a run with {which}.json nor a folder of such runs; "
            "train one (python jobs/train.py) or name another"
        )
    newest = max(latest, key=lambda run: str(latest[run]["time"]))
    pointer = latest[newest] if which == "latest" else _read_pointer(newest, which)
    if pointer is None:
        raise CheckpointError(f"{newest}: a run without {which}.json; name {newest}/latest")
    return storage.join(newest, str(pointer["checkpoint"]))


def load(uri: str, which: Which = "best") -> Loaded:
    """The checkpoint or ensemble that `uri` means (see `find`), ready to caption."""
    return read(lambda: find(uri, which), checkpoint.load)


def read(find: Callable[[], str], load: Callable[[str], T]) -> T:
    """The result of `load` for the checkpoint that `find` returns.

    A run that goes on may prune that checkpoint in between. As long as `find` then returns another
    one, that is loaded instead. Raises the CheckpointError of `load` if the answer stays the same
    or has changed too often.
    """
    uri = find()
    for remaining in reversed(range(CHANGES)):
        try:
            return load(uri)
        except CheckpointError:
            before, uri = uri, _another(find, uri)
            if uri == before or not remaining:
                raise
    raise AssertionError("unreachable")


def _another(find: Callable[[], str], uri: str) -> str:
    """What `find` returns now, if that changes within moments; else `uri`."""
    for _ in range(LOOKS):
        if (found := find()) != uri:
            return found
        time.sleep(LOOK_SECONDS)
    return uri


def has_begun(run: str) -> bool:
    """Whether the run has a checkpoint to go on from."""
    return storage.exists(storage.join(run, "latest.json"))


def latest_step(run: str) -> int:
    """Steps that the run's latest checkpoint holds; 0 if there is none."""
    latest = _read_pointer(run, "latest")
    return 0 if latest is None else int(latest["step"])


def _read_pointer(run: str, which: Which) -> dict[str, Any] | None:
    """None if there is none."""
    uri = storage.join(run, f"{which}.json")
    try:
        pointer: dict[str, Any] = json.loads(storage.read_bytes(uri))
        needed = {name: pointer[name] for name in ("checkpoint", "time")}
        return {"metrics": {}, **needed, **pointer}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{uri}: not a pointer to a checkpoint ({error!r})") from None


# What else is written down --------------------------------------------------------------------


def begin(run: str, config: Config, vocabulary: Vocabulary, data: dict[str, Any]) -> None:
    """Record what the run is started, or resumed, with."""
    _write_json(storage.join(run, CONFIG), to_dict(config))
    storage.write_bytes(storage.join(run, VOCABULARY), vocabulary.to_json().encode())
    _write_json(storage.join(run, DATA), data)


def read_config(run: str) -> Config:
    """The settings of the run. Raises FileNotFoundError if nobody wrote them down."""
    uri = storage.join(run, CONFIG)
    return from_dict(Config, json.loads(storage.read_bytes(uri)), uri)


def read_vocabulary(run: str) -> Vocabulary:
    """The words that the run knows."""
    return Vocabulary.from_json(storage.read_text(storage.join(run, VOCABULARY)), run)


def read_data(run: str) -> dict[str, Any]:
    """`uri` and `digest` of the data set that the run learns from."""
    found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(run, DATA)))
    return found


def read_history(run: str) -> list[dict[str, float]]:
    """The logged points of a run: step, epoch and metrics; empty for a new run."""
    try:
        history: list[dict[str, float]] = json.loads(storage.read_bytes(storage.join(run, HISTORY)))
    except FileNotFoundError:
        return []
    return history


def write_history(run: str, history: list[dict[str, float]]) -> None:
    storage.write_bytes(storage.join(run, HISTORY), json.dumps(history).encode())


def failure(run: str) -> str | None:
    """Why the run cannot go on, as the first worker that noticed wrote it down; None if it can."""
    try:
        return storage.read_text(storage.join(run, FAILURE))
    except FileNotFoundError:
        return None


def write_failure(run: str, reason: str) -> None:
    storage.write_bytes(storage.join(run, FAILURE), reason.encode())


def forget_failure(run: str) -> None:
    storage.delete(storage.join(run, FAILURE))


def write_validation(uri: str, found: dict[str, Any]) -> bool:
    """Record what the validation of the checkpoint at `uri` found, or the `error` that ended it.
    Returns False, and records nothing, if the checkpoint no longer waits for validation."""
    waits = storage.exists(storage.join(uri, TO_VALIDATE))
    if waits:
        _write_json(_validation_file(uri), found)
    return waits


def _validation_file(uri: str) -> str:
    return storage.join(storage.parent(uri), VALIDATION, f"{storage.name(uri)}.json")


def _read_validation(uri: str) -> dict[str, Any]:
    """Empty if the checkpoint at `uri` was not validated."""
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(_validation_file(uri)))
    except FileNotFoundError:
        return {}
    return found


def read_validations(run: str, known: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """What validations found, by checkpoint, without those `known`."""
    found = {}
    for uri in storage.list_files(storage.join(run, VALIDATION)):
        name = storage.name(uri).removesuffix(".json")
        if name not in known:
            found[name] = json.loads(storage.read_bytes(uri))
    return found


def evaluation_folder(uri: str, split: str) -> str:
    """Where the evaluation of a checkpoint goes: below its run; that of an ensemble below the run
    of its first member, named by all."""
    first, *others = checkpoint.members(uri)
    names = "".join(f"+{storage.name(storage.parent(other))}" for other in others)
    return storage.join(storage.parent(first), EVALUATION, f"{split}{names}")


def _write_json(uri: str, value: Any) -> None:
    storage.write_bytes(uri, json.dumps(value, indent=1).encode())
