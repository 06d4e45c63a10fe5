"""The checkpoint: a folder in storage that serves without pickle or training configuration.

    <storage>/<run>/
      latest.json  best.json        pointers, replaced atomically
      config.json  vocabulary.json  of the run
      checkpoint-00000120/
        model.safetensors           weights
        config.json                 model and search settings
        vocabulary.json
        state.json                  step, epoch, metrics, tracker id
        ledger.npy                  which pictures of the epoch were seen (bool)
        optimizer.pt                for resuming only
        manifest.json               size and digest of all of these; written last
        to-validate                 there while its validation is yet to come
      validation/                   what validation found (see validation.py)

A folder without a manifest is a checkpoint that never finished; no pointer ever names one, and the
next commit removes it. It also removes what lies beyond the checkpoint that the run went on from:
one whose commit was killed before latest.json named it is whole, but of a past that this run has
not had.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from caption_ray import storage
from caption_ray.config import ModelConfig, SearchConfig, from_dict, to_dict
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.ensemble import Ensemble

MODEL, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.json"
STATE, LEDGER, OPTIMIZER, MANIFEST = "state.json", "ledger.npy", "optimizer.pt", "manifest.json"
PREFIX = "checkpoint-"
TO_VALIDATE = "to-validate"
CRITERION = "val/CIDEr-D"
"""The metric that best.json goes by."""
POINTERS = ("latest", "best")


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, or belongs to another model."""


@dataclass(frozen=True)
class State:
    """Where a run stood when the checkpoint was taken."""

    step: int
    """Optimizer steps taken since the run began."""
    epoch: int
    """Epoch in progress, from 0; the next one if `epoch_step` is 0."""
    epoch_step: int
    """Steps taken inside that epoch."""
    metrics: dict[str, float]
    """The newest validation metrics."""
    tracker_id: str | None
    """Run id in Weights & Biases."""
    pictures: int = 0
    """Pictures learnt from since the run began, each as often as it was: over all epochs, as many
    as these had if none was lost and none seen twice."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as serving and evaluation need it; of an ensemble, what is said of the first
    member but for `uri`, `captioner` and `members`."""

    uri: str
    captioner: Captioner | Ensemble
    """On the CPU, in eval mode."""
    vocabulary: Vocabulary
    model: ModelConfig
    search: SearchConfig
    state: State
    members: tuple[Loaded, ...] = ()
    """Of an ensemble; none of a checkpoint."""


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder_name: str) -> int:
    """The inverse, also of the name of a second checkpoint of a step (see `commit`)."""
    return int(folder_name.removeprefix(PREFIX).partition("-")[0])


# Writing --------------------------------------------------------------------------------------


def save(
    folder: Path,
    captioner: Captioner,
    vocabulary: Vocabulary,
    model: ModelConfig,
    search: SearchConfig,
    state: State,
    optimizer: dict[str, Any],
    ledger: NDArray[np.bool_],
) -> None:
    """Write all files of a checkpoint to a local folder; `optimizer`: tensors and plain values that
    only resuming needs."""
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    seen = io.BytesIO()
    np.save(seen, ledger, allow_pickle=False)
    weights = {name: tensor.contiguous() for name, tensor in captioner.state_dict().items()}
    config = {"model": to_dict(model), "search": to_dict(search)}
    files = {
        MODEL: save_safetensors(_without_aliases(weights)),
        CONFIG: json.dumps(config, indent=1).encode(),
        VOCABULARY: vocabulary.to_json().encode(),
        STATE: json.dumps(dataclasses.asdict(state), indent=1).encode(),
        LEDGER: seen.getvalue(),
        OPTIMIZER: buffer.getvalue(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        name: {"bytes": len(data), "digest": storage.checksum(data)} for name, data in files.items()
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _without_aliases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (tensor.data_ptr() in seen or seen.add(tensor.data_ptr()))  # type: ignore[func-returns-value]
    }


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
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    _verify_upload(uri)
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
    state = _read_state(uri, storage.read_bytes(storage.join(uri, STATE)))
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


def _read_state(uri: str, data: bytes) -> State:
    return from_dict(State, json.loads(data), f"{uri}/{STATE}")


def _verify_upload(uri: str) -> None:
    """Every file is there at its size; StorageError otherwise. That its bytes are right is what
    `storage.write_bytes` has seen to."""
    for name, entry in _read_manifest(uri).items():
        size = storage.size(storage.join(uri, name))
        if size != entry["bytes"]:
            raise storage.StorageError(
                f"{storage.join(uri, name)}: {size} bytes after the upload, not {entry['bytes']}"
            )


def _checkpoints(run: str) -> dict[str, bool]:
    """Names of the run's checkpoints, oldest first, and whether each is whole."""
    return {
        name: storage.exists(storage.join(run, name, MANIFEST))
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
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


# Reading --------------------------------------------------------------------------------------


def find(uri: str, which: Literal["latest", "best"] = "latest") -> str:
    """The checkpoint that `uri` means: a checkpoint itself, the latest or best one of a run, or
    that of the run in a folder of runs which was written to last.

    Several of these, separated by commas, mean an ensemble: its checkpoints, again separated by
    commas. Raises CheckpointError if there is none.
    """
    return ",".join(_find_one(part, which) for part in members(uri))


def members(uri: str) -> list[str]:
    """The URIs that `uri` lists, separated by commas. A local path may have commas of its own, as
    long as it is the only one."""
    if "," not in uri or (storage.is_local(uri) and Path(storage.resolve(uri)).exists()):
        return [uri]
    return [part.strip() for part in uri.split(",")]


def _find_one(uri: str, which: str) -> str:
    uri = storage.resolve(uri)
    if storage.exists(storage.join(uri, MANIFEST)):
        return uri
    runs = [uri, *(storage.join(uri, name) for name in storage.list_folders(uri))]
    pointers = [
        (str(pointer["time"]), storage.join(run, str(pointer["checkpoint"])))
        for run in runs
        if storage.exists(storage.join(run, f"{which}.json"))
        for pointer in [_read_pointer(run, which)]
    ]
    if not pointers:
        raise CheckpointError(
            f"{uri}: neither a checkpoint nor a run with {which}.json nor a folder of such runs; "
            "train one (python jobs/train.py) or name another"
        )
    return max(pointers)[1]


def latest_step(run: str) -> int:
    """Steps that the run's latest checkpoint holds; 0 if there is none."""
    if not storage.exists(storage.join(run, "latest.json")):
        return 0
    return int(_read_pointer(run, "latest")["step"])


def _read_pointer(run: str, which: str) -> dict[str, Any]:
    uri = storage.join(run, f"{which}.json")
    try:
        pointer: dict[str, Any] = json.loads(storage.read_bytes(uri))
        needed = {name: pointer[name] for name in ("checkpoint", "time")}
        return {"metrics": {}, **needed, **pointer}
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{uri}: not a pointer to a checkpoint ({error!r})") from None


def _read_manifest(uri: str) -> dict[str, Any]:
    """File name -> `bytes` and `digest`."""
    location = storage.join(uri, MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(location))
        return {name: {"bytes": e["bytes"], "digest": e["digest"]} for name, e in manifest.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{uri}: not a whole checkpoint ({error})") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{location}: a damaged manifest ({error!r})") from None


def _read(uri: str, names: list[str]) -> dict[str, bytes]:
    """The named files of a checkpoint, verified against its manifest."""
    manifest = _read_manifest(uri)
    files = {}
    for name in names:
        if name not in manifest:
            raise CheckpointError(f"{uri}: a damaged manifest, which has no {name}")
        entry = manifest[name]
        try:
            location = storage.join(uri, name)
            files[name] = bytes(storage.read_verified(location, entry["bytes"], entry["digest"]))
        except FileNotFoundError as error:
            raise CheckpointError(f"{uri}: not a whole checkpoint ({error})") from None
        except storage.DamagedError as error:
            raise CheckpointError(
                f"{error}: not what the manifest names; use another checkpoint"
            ) from None
    return files


def load(uri: str) -> Loaded:
    """Rebuild the captioner of the checkpoint at exactly this URI, or the ensemble of several (see
    `find`).

    Raises CheckpointError if a file is missing, damaged, or does not fit the others, and if
    checkpoints cannot caption together.
    """
    loaded = tuple(_load_one(member) for member in members(uri))
    if len(loaded) == 1:
        return loaded[0]
    for other in loaded[1:]:
        _require_same(loaded[0], other)
    ensemble = Ensemble([one.captioner for one in loaded]).eval()  # type: ignore[misc]
    return dataclasses.replace(loaded[0], uri=uri, captioner=ensemble, members=loaded)


def _require_same(one: Loaded, other: Loaded) -> None:
    """Raise CheckpointError unless both know the same words and take the same pictures."""
    a, b = one.model.encoder, other.model.encoder
    differs = [
        name
        for name, same in {
            "the vocabulary": one.vocabulary.words == other.vocabulary.words,
            f"image_size ({a.image_size} and {b.image_size})": a.image_size == b.image_size,
            f"image_fit ({a.image_fit} and {b.image_fit})": a.image_fit == b.image_fit,
        }.items()
        if not same
    ]
    if differs:
        raise CheckpointError(
            f"{one.uri} and {other.uri} cannot caption together: they differ in "
            f"{', '.join(differs)}; name runs of the same data set and image size"
        )


def _load_one(uri: str) -> Loaded:
    files = _read(uri, [MODEL, CONFIG, VOCABULARY, STATE])
    try:
        config = json.loads(files[CONFIG])
        model = from_dict(ModelConfig, config["model"], f"{uri}/{CONFIG}")
        search = from_dict(SearchConfig, config["search"], f"{uri}/{CONFIG}")
        state = _read_state(uri, files[STATE])
        vocabulary = Vocabulary.from_json(files[VOCABULARY].decode(), f"{uri}/{VOCABULARY}")
        captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
        _load_weights(captioner, load_safetensors(files[MODEL]))
    except CheckpointError:
        raise
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{uri}: cannot be rebuilt: {error}") from error
    return Loaded(uri, captioner.eval(), vocabulary, model, search, state)


def _load_weights(captioner: Captioner, weights: dict[str, Tensor]) -> None:
    own = captioner.state_dict()
    missing = set(_without_aliases(own)) - set(weights)
    unknown = set(weights) - set(own)
    if missing or unknown:
        raise ValueError(
            f"weights of another model: {sorted(missing)[:3]} missing, "
            f"{sorted(unknown)[:3]} unknown"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"weights of another model: {name} is {tuple(tensor.shape)}, "
                f"not {tuple(own[name].shape)}"
            )
    captioner.load_state_dict(weights, strict=False)


def differences(one: ModelConfig, other: ModelConfig) -> str:
    """Settings in which two captioners differ so that one cannot have the other's weights, as
    "encoder.name resnet101 != resnet50"; empty if it can."""
    free = {
        "encoder": {"weights", "trainable_from", "batch_norm", "image_fit"},
        "decoder": {"dropout"},
    }
    found = [
        f"{part}.{name} {value!r} != {to_dict(other)[part][name]!r}"
        for part, settings in to_dict(one).items()
        for name, value in settings.items()
        if name not in free[part] and value != to_dict(other)[part][name]
    ]
    return ", ".join(found)


def load_weights(uri: str, captioner: Captioner) -> None:
    """Load the weights of the checkpoint at this URI; CheckpointError if they do not fit."""
    _fit_weights(uri, captioner, _read(uri, [MODEL]))


def _fit_weights(uri: str, captioner: Captioner, files: dict[str, bytes]) -> None:
    try:
        _load_weights(captioner, load_safetensors(files[MODEL]))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{uri}: does not fit: {error}") from error


def load_for_resume(
    uri: str, captioner: Captioner, device: torch.device
) -> tuple[State, dict[str, Any], NDArray[np.bool_]]:
    """Load weights into `captioner`; returns state, what `save` got as `optimizer`, and ledger."""
    files = _read(uri, [MODEL, STATE, OPTIMIZER, LEDGER])
    _fit_weights(uri, captioner, files)
    extra = torch.load(io.BytesIO(files[OPTIMIZER]), map_location=device, weights_only=True)
    ledger = np.load(io.BytesIO(files[LEDGER]), allow_pickle=False)
    return _read_state(uri, files[STATE]), extra, ledger
