"""The format of a checkpoint: a folder that serves without pickle or training configuration.

    checkpoint-00000120/
      model.safetensors     weights
      config.json           model and search settings
      vocabulary.json
      state.json            step, epoch, metrics, tracker id
      ledger.npz            which pictures of the epoch were seen, by shard
      optimizer.pt          only needed to resume
      manifest.json         size and checksum of each of these files; written last

A folder without a manifest is a checkpoint that was never finished. Training saves and resumes
here; serving, evaluation and the jobs load. Where checkpoints lie, which of them is meant and when
they are removed is the business of run_folder.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from caption_ray import storage
from caption_ray.config import ModelConfig, SearchConfig, from_dict, to_dict
from caption_ray.data.ledger import Ledger
from caption_ray.data.transforms import mode_of
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.ensemble import Ensemble

MODEL, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.json"
STATE, LEDGER, OPTIMIZER, MANIFEST = "state.json", "ledger.npz", "optimizer.pt", "manifest.json"
EARLIER_LEDGER = "ledger.npy"
"""What earlier versions wrote: a bool for each picture. They refuse checkpoints without it."""


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
    """Pictures trained on since the run began, repetitions included. If none is lost and none is
    seen twice, this is the sum over epochs of their pictures."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint's JSON files say; of an ensemble, what those of its first member say."""

    uri: str
    vocabulary: Vocabulary
    model: ModelConfig
    search: SearchConfig
    state: State


@dataclass(frozen=True, kw_only=True)
class Loaded(About):
    """A checkpoint, or an ensemble of several, that is ready to caption."""

    captioner: Captioner | Ensemble
    """On the CPU, in eval mode."""
    members: tuple[Loaded, ...] = ()
    """The checkpoints of an ensemble; empty for a single checkpoint."""


# Writing --------------------------------------------------------------------------------------


def save(
    folder: Path,
    captioner: Captioner,
    vocabulary: Vocabulary,
    model: ModelConfig,
    search: SearchConfig,
    state: State,
    optimizer: dict[str, Any],
    ledger: Ledger,
) -> None:
    """Write all files of a checkpoint to a local folder; `optimizer`: tensors and plain values that
    only resuming needs."""
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    weights = {name: tensor.contiguous() for name, tensor in captioner.state_dict().items()}
    config = {"model": to_dict(model), "search": to_dict(search)}
    files = {
        MODEL: save_safetensors(_without_aliases(weights)),
        CONFIG: json.dumps(config, indent=1).encode(),
        VOCABULARY: vocabulary.to_json().encode(),
        STATE: json.dumps(dataclasses.asdict(state), indent=1).encode(),
        LEDGER: ledger.to_bytes(),
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


def verify_upload(uri: str) -> None:
    """Raise StorageError unless every file is there with its size. That the bytes are right was
    checked by `storage.write_bytes`."""
    for name, entry in _read_manifest(uri).items():
        size = storage.size(storage.join(uri, name))
        if size != entry["bytes"]:
            raise storage.StorageError(
                f"{storage.join(uri, name)}: {size} bytes after the upload, not {entry['bytes']}"
            )


# Reading --------------------------------------------------------------------------------------


def read_state(uri: str) -> State:
    """Where the run stood when the checkpoint at this URI was taken; CheckpointError if unknown."""
    return _parse_state(uri, _read(uri, [STATE]))


def _parse_state(uri: str, files: dict[str, bytes]) -> State:
    return from_dict(State, json.loads(files[STATE]), f"{uri}/{STATE}")


def read_about(uri: str) -> About:
    """What is known of the checkpoint at exactly this URI (of several: of the first) without its
    weights: a few small files, no captioner.

    Raises CheckpointError if a file is missing, damaged or not what it should be.
    """
    first = members(uri)[0]
    return _parse_about(first, _read(first, [CONFIG, VOCABULARY, STATE]))


def _parse_about(uri: str, files: dict[str, bytes]) -> About:
    try:
        config = json.loads(files[CONFIG])
        return About(
            uri=uri,
            vocabulary=Vocabulary.from_json(files[VOCABULARY].decode(), f"{uri}/{VOCABULARY}"),
            model=from_dict(ModelConfig, config["model"], f"{uri}/{CONFIG}"),
            search=from_dict(SearchConfig, config["search"], f"{uri}/{CONFIG}"),
            state=_parse_state(uri, files),
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{uri}: cannot be rebuilt: {error}") from error


def members(uri: str) -> list[str]:
    """The URIs that `uri` lists, separated by commas. A local path may have commas of its own, as
    long as it is the only one."""
    if "," not in uri or (storage.is_local(uri) and Path(storage.resolve(uri)).exists()):
        return [uri]
    return [part.strip() for part in uri.split(",")]


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
    `run_folder.find`).

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
            "the vocabulary": one.vocabulary == other.vocabulary,
            f"image_size ({a.image_size} and {b.image_size})": a.image_size == b.image_size,
            f"image_fit ({a.image_fit} and {b.image_fit})": a.image_fit == b.image_fit,
            f"interpolation ({a.interpolation} and {b.interpolation})": mode_of(a.interpolation)
            == mode_of(b.interpolation),
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
    about = _parse_about(uri, files)
    try:
        captioner = build_captioner(about.model, len(about.vocabulary), None, pretrained=False)
        _load_weights(captioner, load_safetensors(files[MODEL]))
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{uri}: cannot be rebuilt: {error}") from error
    return Loaded(**vars(about), captioner=captioner.eval())


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
        "encoder": {
            "weights",
            "trainable_from",
            "batch_norm",
            "drop_path",
            "image_size",
            "image_fit",
            "interpolation",
        },
        "decoder": {"dropout", "encoder_dropout"},
    }
    found = [
        f"{part}.{name} {value!r} != {to_dict(other)[part][name]!r}"
        for part, settings in to_dict(one).items()
        for name, value in settings.items()
        if name not in free[part] and value != to_dict(other)[part][name]
    ]
    return ", ".join(found)


Resumed: TypeAlias = tuple[State, dict[str, Any], Ledger]


def load_for_resume(
    uri: str, captioner: Captioner, device: torch.device, sizes: NDArray[np.int64]
) -> Resumed:
    """Load weights into `captioner`; returns state, what `save` got as `optimizer`, and ledger.

    sizes: (shards,), pictures in each shard of the training split. Raises CheckpointError if a file
    is missing or damaged, and if the weights do not fit the captioner or the ledger those sizes.
    """
    kept = EARLIER_LEDGER if EARLIER_LEDGER in _read_manifest(uri) else LEDGER
    files = _read(uri, [MODEL, STATE, OPTIMIZER, kept])
    try:
        _load_weights(captioner, load_safetensors(files[MODEL]))
        ledger = _parse_ledger(files, sizes)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{uri}: does not fit: {error}") from error
    extra = torch.load(io.BytesIO(files[OPTIMIZER]), map_location=device, weights_only=True)
    return _parse_state(uri, files), extra, ledger


def _parse_ledger(files: dict[str, bytes], sizes: NDArray[np.int64]) -> Ledger:
    if LEDGER in files:
        ledger = Ledger.from_bytes(files[LEDGER])
        if not np.array_equal(ledger.sizes, sizes):
            raise ValueError(f"{LEDGER} is of {_told(ledger.sizes)}, training has {_told(sizes)}")
        return ledger
    seen = np.load(io.BytesIO(files[EARLIER_LEDGER]), allow_pickle=False)
    if seen.shape != (sizes.sum(),):
        raise ValueError(
            f"{EARLIER_LEDGER} is of {len(seen)} pictures, training has {_told(sizes)}"
        )
    ledger = Ledger(sizes)
    ledger.mark(np.flatnonzero(seen))
    return ledger


def _told(sizes: NDArray[np.int64]) -> str:
    return f"{sizes.sum()} pictures in {len(sizes)} shards"
