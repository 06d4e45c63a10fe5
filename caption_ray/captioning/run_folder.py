"""The folder of a run: every name in it, which checkpoint is meant, and which are removed when.

    <storage>/<run>/
      latest.json  best.json        pointers to checkpoints, replaced atomically
      config.json  vocabulary.json  what the run was started with
      data.json                     the data set that it learns from
      history.json                  the logged points, for curves
      failure.txt                   why the run cannot go on, if it cannot
      checkpoint-00000120/          see checkpoint.py; beside its files:
        to-validate                 there until its validation is over
      validation/                   what each validation found, one file a checkpoint
      evaluation/                   what jobs/evaluate.py found

No pointer ever names a checkpoint without a manifest, and the next commit removes such remains. It
also removes whole checkpoints beyond the one that the run went on from: a commit that was killed
before latest.json named its checkpoint leaves one that is complete, but from an abandoned history.

Training writes here (commit, crown, release); everybody else reads (find).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from caption_ray import storage
from caption_ray.captioning import checkpoint
from caption_ray.captioning.checkpoint import CheckpointError, State
from caption_ray.config import Config, from_dict, to_dict
from caption_ray.data.vocabulary import Vocabulary

PREFIX = "checkpoint-"
TO_VALIDATE = "to-validate"
CRITERION = "val/CIDEr-D"
"""The metric that decides which checkpoint is the best."""
Which = Literal["latest", "best"]
POINTERS: tuple[Which, Which] = ("latest", "best")
CONFIG, VOCABULARY, DATA = "config.json", "vocabulary.json", "data.json"
HISTORY, FAILURE = "history.json", "failure.txt"
VALIDATION, EVALUATION = "validation", "evaluation"


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
) -> str:
    """Upload a saved checkpoint below the run's URI and let latest.json name it; best.json as well
    if it `is_best` or there is no best yet. `after`: step of the checkpoint that it follows, which
    the run saved before or went on from; by default it follows all that are there.

    The manifest goes last; the pointers follow once all is there that it names. Only then are
    checkpoints removed that lie beyond `after`, or are neither the best nor among the newest `keep`
    nor yet to be validated. Killed at any point, it leaves the pointers on whole checkpoints, and
    the next commit cleans up. Returns the checkpoint's URI.
    """
    _remove_unfinished(run)
    name = _free_name(run, state.step)
    uri = storage.join(run, name)
    _remove(uri)
    if to_validate:
        storage.write_bytes(storage.join(uri, TO_VALIDATE), b"")
    for file in sorted(
        folder.iterdir(), key=lambda file: (file.name == checkpoint.MANIFEST, file.name)
    ):
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    checkpoint.verify_upload(uri)
    is_best = is_best or not storage.exists(storage.join(run, "best.json"))
    # the best first: with `latest` on this checkpoint already, a run that is killed here would go
    # on from it and never call it the best
    for which in reversed(POINTERS) if is_best else POINTERS[:1]:
        _point(run, which, name, state.step, state.epoch, state.metrics)
    _prune(run, name, after, keep)
    return uri


def _point(
    run: str, which: str, name: str, step: int, epoch: int, metrics: dict[str, float]
) -> None:
    pointer = {
        "checkpoint": name,
        "step": step,
        "epoch": epoch,
        "metrics": metrics,
        "time": datetime.now(timezone.utc).isoformat(),
    }
    uri = storage.join(run, f"{which}.json")
    storage.write_bytes(uri, json.dumps(pointer, indent=1).encode())


def crown(uri: str, metrics: dict[str, float]) -> bool:
    """Let best.json name the checkpoint at `uri`, whose validation found `metrics`, unless that
    names one with a better CRITERION; whether it does."""
    run = storage.parent(uri)
    best = _read_pointer(run, "best")["metrics"].get(CRITERION, -math.inf)
    if metrics[CRITERION] <= best:
        return False
    state = checkpoint.read_state(uri)
    name = storage.name(uri)
    _point(run, "best", name, state.step, state.epoch, {**state.metrics, **metrics})
    return True


def release(uri: str) -> None:
    """The validation of the checkpoint at `uri` is over: it may be pruned as others are."""
    storage.delete(storage.join(uri, TO_VALIDATE))


def release_all(run: str) -> None:
    """No validation of the run goes on: what an earlier job left waiting may be pruned."""
    for name in storage.list_folders(run):
        if name.startswith(PREFIX):
            release(storage.join(run, name))


def _checkpoints(run: str) -> dict[str, bool]:
    """Names of the run's checkpoints, oldest first, and whether each is whole."""
    return {
        name: storage.exists(storage.join(run, name, checkpoint.MANIFEST))
        for name in storage.list_folders(run)
        if name.startswith(PREFIX)
    }


def _named(run: str) -> set[str]:
    """The checkpoints that pointers name."""
    return {
        str(_read_pointer(run, which)["checkpoint"])
        for which in POINTERS
        if storage.exists(storage.join(run, f"{which}.json"))
    }


def _free_name(run: str, step: int) -> str:
    """A folder that no pointer names: the second checkpoint of a step (inside an epoch, and at its
    end) must not be written over the first while that is the only good one."""
    named, name, number = _named(run), folder_name(step), 1
    while name in named:
        number += 1
        name = f"{folder_name(step)}-{number}"
    return name


def _remove_unfinished(run: str) -> None:
    """Remove what commits left that were killed. Nobody else writes checkpoints of this run: Ray
    Train uploads one after the other."""
    for name, is_whole in _checkpoints(run).items():
        storage.delete_partial(storage.join(run, name))
        if not is_whole:
            storage.delete(storage.join(run, name))
    for which in POINTERS:
        storage.delete_partial(storage.join(run, f"{which}.json"))


def _prune(run: str, newest: str, after: float, keep: int) -> None:
    """Remove whole checkpoints that no pointer names: those beyond `after`, which the `newest`
    follows, and of its past all but the newest `keep` and those that wait for validation."""
    whole = [name for name, is_whole in _checkpoints(run).items() if is_whole]
    past = [name for name in whole if name == newest or step_of(name) <= after]
    kept = _named(run) | set(past[-keep:])
    for name in whole:
        if name in kept:
            continue
        uri = storage.join(run, name)
        if name not in past or not storage.exists(storage.join(uri, TO_VALIDATE)):
            _remove(uri)


def _remove(uri: str) -> None:
    """The manifest first: what is left of a half-deleted checkpoint is then none."""
    storage.delete(storage.join(uri, checkpoint.MANIFEST))
    storage.delete(uri)


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
    for pointer in POINTERS:
        if storage.name(uri) == pointer:
            which, uri = pointer, storage.parent(uri)
    folders = [uri, *(storage.join(uri, name) for name in storage.list_folders(uri))]
    runs = [folder for folder in folders if has_begun(folder)]
    if not runs:
        raise CheckpointError(
            f"{uri}: neither a checkpoint nor a run with {which}.json nor a folder of such runs; "
            "train one (python jobs/train.py) or name another"
        )
    newest = max(runs, key=lambda run: str(_read_pointer(run, "latest")["time"]))
    return storage.join(newest, str(_read_pointer(newest, which)["checkpoint"]))


def has_begun(run: str) -> bool:
    """Whether the run has a checkpoint to go on from."""
    return storage.exists(storage.join(run, "latest.json"))


def latest_step(run: str) -> int:
    """Steps that the run's latest checkpoint holds; 0 if there is none."""
    return int(_read_pointer(run, "latest")["step"]) if has_begun(run) else 0


def _read_pointer(run: str, which: str) -> dict[str, Any]:
    uri = storage.join(run, f"{which}.json")
    try:
        pointer: dict[str, Any] = json.loads(storage.read_bytes(uri))
        needed = {name: pointer[name] for name in ("checkpoint", "time")}
        return {"metrics": {}, **needed, **pointer}
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{uri}: not a pointer to a checkpoint ({error!r})") from None


# What else is written down --------------------------------------------------------------------


def begin(run: str, config: Config, vocabulary: Vocabulary, data: dict[str, Any]) -> None:
    """Write down what the run is started, or goes on, with."""
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


def write_validation(uri: str, found: dict[str, Any]) -> None:
    """Keep what the validation of the checkpoint at `uri` found, or the `error` that ended it."""
    name = f"{storage.name(uri)}.json"
    _write_json(storage.join(storage.parent(uri), VALIDATION, name), found)


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
