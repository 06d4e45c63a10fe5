"""The features of a frozen encoder, computed once per picture: a Ray Data job that writes feature
shards beside the picture shards, and the data set that training reads instead of pictures.

Features lie below `features/KEY`. KEY is the digest of all that they depend on: the pictures, how a
picture is prepared for the encoder, and the encoder with its weights. So stale features are never
read: whatever changes, new ones are computed. A feature shard counts once its receipt is there. An
interrupted job is completed by the next one, which also adds what earlier ones were not asked for
(`data.max_images`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from caption_ray import cluster, storage
from caption_ray.config import Config, DataConfig, EncoderConfig, require
from caption_ray.data import feature_shards, receipts
from caption_ray.data.dataset import DataSet, FeatureFile, ShardFile, Unit, open_shards
from caption_ray.data.ledger import Ledger
from caption_ray.data.plan import ShardSlice
from caption_ray.data.preparation import Preparation
from caption_ray.data.read_tasks import SliceSource
from caption_ray.data.shards import Shard
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.encoder import Encoder, build_encoder, to_tensor
from caption_ray.training import initial

FOLDER = "features"
ABOUT_FILE = "about.json"
"""Says, for people, what a folder of features was computed from."""

BATCH_SIZE = 32
"""Pictures that the encoder sees at a time."""


def is_wanted(config: Config) -> bool:
    """Whether training reads features instead of pictures. Raises ValueError if `data.features` is
    on although that cannot work."""
    reason = _reason_against(config)
    if config.data.features == "on" and reason is not None:
        raise ValueError(f"--data.features is 'on', but {reason}; give --data.features off")
    if config.data.features == "auto":
        return reason is None and config.train.epochs > 1
    return config.data.features == "on"


def _reason_against(config: Config) -> str | None:
    """Why features would not give the same results as pictures; None if they would."""
    data, stage = config.data, config.model.encoder.trainable_from
    if stage != "none":
        return f"the encoder trains (--model.encoder.trainable-from {stage})"
    if data.flip:
        return "pictures are mirrored at random (--data.flip; --data.no-flip turns that off)"
    if data.min_crop < 1:
        return f"pictures are cropped at random (--data.min-crop {data.min_crop})"
    if data.source is not None and not data.ingest:
        return (
            f"the pictures of --data.source {data.source} have no digests by which features could "
            "be known to be theirs (give --data.ingest)"
        )
    return None


def check_encoder(config: EncoderConfig) -> None:
    """Raise ValueError for an encoder that `encode_shards` cannot have."""
    require(
        config.weights != "none",
        "encoder.weights",
        config.weights,
        "no run could have the same random ones; give the weights that training will name",
    )
    try:
        initial.check_encoder(config)
    except ValueError as error:
        raise ValueError(str(error).replace("--model.encoder.", "--encoder.")) from None


def encode_shards(uri: str, config: EncoderConfig) -> dict[str, int]:
    """Compute the features of all training and validation pictures of the shards below `uri`, which
    every run with this frozen encoder then reads. Returns how many pictures of each split have
    them.

    Raises ValueError for an encoder that cannot be, or without weights.
    """
    check_encoder(config)
    config = initial.settled(config)
    dataset = open_shards(uri)
    limits = {split: None for split in ("train", "val") if split in dataset.splits}
    with_features(dataset, initial.initial_encoder(config), config, limits=limits)
    return {split: sum(dataset.rows(split)) for split in limits}


def with_features(
    dataset: DataSet,
    encoder: Encoder,
    config: EncoderConfig,
    *,
    limits: Mapping[str, int | None],
    progress: bool = True,
) -> DataSet:
    """`dataset` with features in the place of its pictures; missing ones are computed first.

    limits: the splits that are wanted, and how many pictures of each, from the first (None: all);
    shards beyond them keep their pictures. The encoder runs on the cluster's GPUs, or on its CPUs
    if it has none. Raises ValueError where a feature is too large for float16.
    """
    about = _about(dataset, encoder, config)
    folder = storage.join(dataset.uri, FOLDER, _key(about))
    wanted = {split: _units(dataset, split, limit) for split, limit in limits.items()}
    found = {split: receipts.read_all(storage.join(folder, split), Shard) for split in wanted}
    missing = {
        split: [number for number in numbers if _name(number) not in found[split]]
        for split, numbers in wanted.items()
    }
    if any(missing.values()):
        storage.write_bytes(storage.join(folder, ABOUT_FILE), json.dumps(about, indent=1).encode())
        rows = sum(dataset.splits[split][n].rows for split in missing for n in missing[split])
        size = rows * math.prod(encoder.grid) * encoder.region_dim * np.float16().itemsize
        print(
            f"Encoding {rows} pictures once, into {folder} ({size / 1e9:.1f} GB; --data.features "
            "off does without)",
            flush=True,
        )
        shared = ray.put((config, encoder.state_dict()))
        with cluster.progress_bar(rows, "encode", progress) as bar:
            for split, numbers in missing.items():
                for name, shard in _encode(dataset, split, numbers, folder, config, shared):
                    found[split][name] = shard
                    bar.update(shard.rows)
    splits: dict[str, list[Unit]] = {split: list(units) for split, units in dataset.splits.items()}
    for split, numbers in wanted.items():
        for number in numbers:
            pictures, shard = splits[split][number], found[split][_name(number)]
            assert isinstance(pictures, ShardFile)
            uri = storage.join(folder, split, shard.file)
            splits[split][number] = FeatureFile(uri, shard, pictures)
    return dataclasses.replace(dataset, splits=splits)


def _about(dataset: DataSet, encoder: Encoder, config: EncoderConfig) -> dict[str, Any]:
    """Everything that the features depend on."""
    pictures = hashlib.sha256(dataset.digest.encode())
    for units in dataset.splits.values():
        for unit in units:
            assert isinstance(unit, ShardFile)
            pictures.update(unit.shard.checksum.encode())
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().numpy().tobytes())
    return {
        "format": feature_shards.FORMAT,
        "pictures": pictures.hexdigest(),
        "encoder": config.name,
        "weights": weights.hexdigest(),
        "image_size": config.image_size,
        "image_fit": config.image_fit,
        **({"interpolation": "bicubic"} if config.interpolation == "bicubic" else {}),
        "grid": list(encoder.grid),
        "region_dim": encoder.region_dim,
    }


def _key(about: Mapping[str, Any]) -> str:
    return storage.digest(json.dumps(about, sort_keys=True).encode())[:16]


def _units(dataset: DataSet, split: str, limit: int | None) -> list[int]:
    """Numbers of the units that hold the first `limit` pictures."""
    return [int(number) for number in np.flatnonzero(Ledger(dataset.rows(split)).left(limit))]


def _name(number: int) -> str:
    return f"{number:05d}"


# The job --------------------------------------------------------------------------------------


def _encode(
    dataset: DataSet,
    split: str,
    numbers: list[int],
    folder: str,
    config: EncoderConfig,
    encoder: ray.ObjectRef,
) -> Iterator[tuple[str, Shard]]:
    """Encode these units of a split; yields name and receipt of each feature shard once
    finished."""
    if not numbers:
        return
    rows = dataset.rows(split)
    firsts = Ledger(rows).firsts
    slices = [ShardSlice(n, np.arange(rows[n]), int(firsts[n])) for n in numbers]
    names = {shard_slice.first: _name(shard_slice.shard) for shard_slice in slices}
    # captions are kept as text; the vocabulary plays no part here
    untouched = DataConfig(captions_per_image=1, min_crop=1.0, flip=False)
    prepare = Preparation(config, untouched, Vocabulary([]), None, with_captions=True)
    gpus = cluster.num_gpus()
    # On CPUs, equal requests let Ray Data fuse reading and encoding into one process; half a CPU
    # each leaves room for both if it does not.
    actors = min(len(slices), gpus or max(1, int(cluster.num_cpus())))
    resources = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 0.5}
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # one block per shard, which is written as a whole
    with ray.data.DataContext.current(context):
        blocks = ray.data.read_datasource(
            SliceSource(dataset.splits[split], slices, prepare, block_rows=None),
            override_num_blocks=len(slices),
            num_cpus=1 if gpus else 0.5,
        )
        finished = blocks.map_batches(
            _Encode,
            batch_size=None,
            batch_format="numpy",
            fn_constructor_args=(encoder, storage.join(folder, split), names),
            compute=ActorPoolStrategy(size=actors),
            **resources,
        )
        with cluster.original_errors():
            for row in finished.iter_rows():
                if row["error"] is not None:
                    raise row["error"]
                yield row["name"], Shard(row["file"], row["rows"], row["bytes"], row["checksum"])


class _Encode:
    """Encodes shards and writes them."""

    def __init__(self, encoder: Any, folder: str, names: dict[int, str]) -> None:
        """names: shard names by the number of their first picture."""
        config, weights = ray.get(encoder) if isinstance(encoder, ray.ObjectRef) else encoder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = build_encoder(dataclasses.replace(config, weights="none"), None)
        self.encoder.load_state_dict(weights)
        self.encoder.eval().to(self.device)
        self.folder, self.names = folder, names

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """The receipt of these pictures' feature shard, once both are written, or the error that
        prevented it (as a value, because Ray Data would only pass on its text)."""
        name, shard, problem = self.names[int(block["number"][0])], Shard("", 0, 0, ""), None
        try:
            shard = self._write(name, block)
        except (ValueError, storage.StorageError) as error:
            problem = error
        found = {"name": name, **dataclasses.asdict(shard), "error": problem}
        return {key: [value] for key, value in found.items()}

    def _write(self, name: str, block: dict[str, Any]) -> Shard:
        data = feature_shards.to_bytes(
            self._regions(block["inputs"]),
            block["image_id"],
            [json.loads(text) if text else [] for text in block["captions_json"]],
            list(block["error"]),
        )
        checksum = storage.checksum(data)
        # named by its content: another worker that encodes the same may round differently
        shard = Shard(f"{name}-{checksum[:12]}.arrow", len(block["number"]), len(data), checksum)
        storage.write_bytes(storage.join(self.folder, shard.file), data)
        receipts.write(storage.join(self.folder, f"{name}.json"), shard)
        return shard

    @torch.inference_mode()
    def _regions(self, images: NDArray[np.uint8]) -> NDArray[np.float16]:
        """float16 (rows, N, E) of uint8 (rows, S, S, 3), computed in float32."""
        parts = [
            self.encoder(to_tensor(images[start : start + BATCH_SIZE]).to(self.device)).half()
            for start in range(0, len(images), BATCH_SIZE)
        ]
        regions = torch.cat(parts)
        if not torch.isfinite(regions).all():
            raise ValueError(
                "--data.features: the encoder gives features that are not finite in float16; give "
                "--data.features off"
            )
        found: NDArray[np.float16] = regions.cpu().numpy()
        return found
