"""COCO zips, folders or a bucket -> verified, shuffled shards and an index of them.

Each shard is a pure function of the plan (which pictures, in which order, under which settings),
so shards are written in any order by any worker, twice if need be, and an ingest that died is
completed by running it again: shards whose receipt is there are not written anew. The index is
written last; without it there is no data set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from caption_ray import cluster, storage
from caption_ray.config import DataConfig, from_dict
from caption_ray.data import shapes, shards, transforms
from caption_ray.data.shards import INDEX_FILE, Index, LeftOut, Shard
from caption_ray.data.sources import PictureError, Record, Split, find_splits, read_picture
from caption_ray.data.tokenizer import tokenize

RECEIPTS = ".receipts"
"""Folder of the receipts of an unfinished ingest, below its output."""

SHARD_NAME = re.compile(r"\d+-of-\d+\.parquet")

IMAGES_PER_SHARD = 500
"""Default size of a shard: 10 MB of shrunk COCO, one request of object storage."""

READ_THREADS = 8
"""Pictures that one task fetches at a time: storage latency, not bandwidth, is what costs."""


@dataclass(frozen=True)
class Receipt:
    """What is known of one finished shard."""

    shard: Shard
    left_out: list[LeftOut]
    word_counts: dict[str, int]


def ingest(
    source: str,
    out: str,
    *,
    image_size: int | None,
    images_per_shard: int,
    seed: int,
    splits: tuple[str, ...],
    karpathy: str | None = None,
    progress: bool = True,
) -> Index:
    """Write the pictures of `source` (see `find_splits`) as shards below `out`.

    `image_size`: shorter side, in pixels, that larger pictures are shrunk to; None keeps originals.
    Returns the index, also when an earlier run with the same plan had finished it. Raises
    ValueError if `out` holds another data set, or if nothing of a split is readable.
    """
    source, out = storage.resolve(source), storage.resolve(out)
    found = find_splits(source, splits=splits, karpathy=karpathy)
    pieces = {split: _shuffled(content, images_per_shard, seed) for split, content in found.items()}
    plan = plan_digest(pieces, image_size)

    finished = read_index(out) if storage.exists(storage.join(out, INDEX_FILE)) else None
    if finished is not None:
        if finished.plan != plan:
            raise ValueError(
                f"--out {out}: holds another data set (from {finished.source}, image size "
                f"{finished.image_size}); choose an empty folder or delete that one"
            )
        _tidy(out, finished)
        return finished

    _remove_unfinished(out, splits=tuple(found), plan=plan)
    receipts = _write_shards(pieces, out, plan, image_size, progress)
    word_counts: Counter[str] = Counter()
    left_out = [LeftOut(split, *entry) for split, content in found.items()
                for entry in content.left_out]  # fmt: skip
    listed: dict[str, list[Shard]] = {}
    for split, done in receipts.items():
        listed[split] = [receipt.shard for receipt in done if receipt.shard.rows]
        left_out += [entry for receipt in done for entry in receipt.left_out]
        if not listed[split]:
            raise ValueError(
                f"{source}: no picture of split {split!r} is readable; the first: {left_out[:3]}"
            )
        if split == "train":
            for receipt in done:
                word_counts.update(receipt.word_counts)
    index = Index(
        source=source,
        plan=plan,
        image_size=image_size,
        seed=seed,
        splits=listed,
        word_counts=dict(sorted(word_counts.items())),
        left_out=sorted(left_out, key=dataclasses.astuple),
    )
    storage.write_bytes(storage.join(out, INDEX_FILE), index.to_json().encode())
    _tidy(out, index)
    return index


def _remove_unfinished(out: str, *, splits: tuple[str, ...], plan: str) -> None:
    """Remove what an ingest left that was killed, but for finished shards of the same plan.

    Receipts of another plan vouch for shards that this one is about to replace.
    """
    for place in (*splits, RECEIPTS, INDEX_FILE):
        storage.delete_partial(storage.join(out, place))
    for other in storage.list_folders(storage.join(out, RECEIPTS)):
        if other != plan:
            storage.delete(storage.join(out, RECEIPTS, other))


def _tidy(out: str, index: Index) -> None:
    """Remove the receipts of a finished ingest, and shards of another plan that never was."""
    listed = {shard.file for split in index.splits for shard in index.shards(split)}
    for split in index.splits:
        for file in storage.list_files(storage.join(out, split)):
            name = f"{split}/{storage.name(file)}"
            if SHARD_NAME.fullmatch(storage.name(file)) and name not in listed:
                storage.delete(file)
    if storage.list_files(storage.join(out, RECEIPTS)):
        storage.delete(storage.join(out, RECEIPTS))


def read_index(uri: str) -> Index:
    """The index of the shards below `uri`; ValueError if there is none."""
    location = storage.join(storage.resolve(uri), INDEX_FILE)
    try:
        return Index.from_json(storage.read_text(location), location)
    except FileNotFoundError:
        raise ValueError(
            f"{location}: no index, so no complete data set; run jobs/ingest.py --out {uri}"
        ) from None


def ensure_shapes(runs: str, data: DataConfig) -> str:
    """URI of the shards of the embedded data set, drawn and ingested beside the runs if need be."""
    name = f"shapes-{data.shapes_train}-{data.shapes_val}-{data.shapes_seed}"
    out = storage.join(storage.resolve(runs), "data", name)
    if storage.exists(storage.join(out, INDEX_FILE)):
        return out
    source = storage.join(out, "source")
    with tempfile.TemporaryDirectory() as folder:
        print(f"Drawing {data.shapes_train} + {data.shapes_val} scenes ...", flush=True)
        shapes.write(Path(folder), data.shapes_train, data.shapes_val, data.shapes_seed)
        # as COCO ships its pictures: one object to move instead of thousands, and workers on
        # other nodes can read it
        for split in shapes.SPLITS:
            archive = shutil.make_archive(str(Path(folder, split)), "zip", folder, split)
            storage.write_bytes(storage.join(source, f"{split}.zip"), Path(archive).read_bytes())
        storage.upload(Path(folder, "annotations"), storage.join(source, "annotations"))
    ingest(
        source,
        out,
        image_size=None,
        images_per_shard=IMAGES_PER_SHARD,
        seed=data.shapes_seed,
        splits=shapes.SPLITS,
    )
    return out


def _shuffled(split: Split, images_per_shard: int, seed: int) -> list[list[Record]]:
    """The records in random order, cut into shards of equal size (give or take one)."""
    order = np.random.default_rng(seed).permutation(len(split.records))
    count = math.ceil(len(order) / images_per_shard)
    return [[split.records[i] for i in part] for part in np.array_split(order, count)]


def plan_digest(pieces: dict[str, list[list[Record]]], image_size: int | None) -> str:
    """Of all that determines the shards: which pictures with which captions, where, settings."""
    text = json.dumps(
        {
            "format": shards.FORMAT,
            "image_size": image_size,
            "pieces": {
                split: [[dataclasses.astuple(record) for record in piece] for piece in parts]
                for split, parts in pieces.items()
            },
        },
        default=str,
    )
    return storage.digest(text.encode())


def _write_shards(
    pieces: dict[str, list[list[Record]]],
    out: str,
    plan: str,
    image_size: int | None,
    progress: bool,
) -> dict[str, list[Receipt]]:
    waiting: dict[Any, tuple[str, int]] = {}
    receipts: dict[str, list[Receipt | None]] = {}
    total = sum(len(piece) for parts in pieces.values() for piece in parts)
    with cluster.progress_bar(total, "ingest", progress) as bar:
        for split, parts in pieces.items():
            receipts[split] = [None] * len(parts)
            for number, records in enumerate(parts):
                file = f"{split}/{number:05d}-of-{len(parts):05d}.parquet"
                receipt_uri = storage.join(out, RECEIPTS, plan, f"{file}.json")
                task = _write_shard.remote(records, split, out, file, receipt_uri, image_size)
                waiting[task] = (split, number)
        while waiting:
            (task,), _ = ray.wait(list(waiting), num_returns=1)
            split, number = waiting.pop(task)
            try:
                receipts[split][number] = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the reason, without the stack of the worker
            bar.update(len(pieces[split][number]))
    return {split: [r for r in done if r is not None] for split, done in receipts.items()}


# a task whose worker or node dies is run again by Ray; storage errors were already retried
@ray.remote(num_cpus=1, max_retries=3)
def _write_shard(
    records: list[Record], split: str, out: str, file: str, receipt_uri: str, image_size: int | None
) -> Receipt:
    done = _read_receipt(receipt_uri, out)
    if done is not None:
        return done
    with ThreadPoolExecutor(READ_THREADS) as threads:
        results = list(threads.map(lambda record: to_row(record, image_size), records))
    rows = [row for row in results if row["error"] is None]
    left_out = [LeftOut(split, r["file_name"], r["error"]) for r in results if r["error"]]
    counts = Counter(
        word for row in rows for caption in row["captions"] for word in tokenize(caption)
    )
    data = shards.to_bytes(rows)
    if rows:
        storage.write_bytes(storage.join(out, file), data)
    receipt = Receipt(
        Shard(file, len(rows), len(data), storage.checksum(data)), left_out, dict(counts)
    )
    storage.write_bytes(receipt_uri, json.dumps(dataclasses.asdict(receipt)).encode())
    return receipt


def _read_receipt(uri: str, out: str) -> Receipt | None:
    """The receipt, if it is there and its shard, too."""
    try:
        receipt = from_dict(Receipt, json.loads(storage.read_bytes(uri)), uri)
        shard = receipt.shard
        if shard.rows and storage.size(storage.join(out, shard.file)) != shard.bytes:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return receipt


def to_row(record: Record, image_size: int | None) -> dict[str, Any]:
    """One row of a shard (`shards.SCHEMA`): the picture read, checked, and shrunk if asked for.

    A picture that cannot be had or decoded gives a row without `image`, and `error` says why.
    """
    picture = record.picture
    row: dict[str, Any] = {
        "image_id": picture.image_id,
        "file_name": picture.file_name,
        "width": picture.width,
        "height": picture.height,
        "image": None,
        "captions": picture.captions,
        "objects": picture.objects,
        "error": None,
    }
    try:
        data = read_picture(record.location)
        if image_size is None:
            transforms.decode(data)  # the only proof that it can be decoded
        else:
            data = transforms.shrink(data, image_size)
        row["image"] = data
    except PictureError as error:
        row["error"] = str(error)
    except transforms.ImageError as error:
        row["error"] = f"corrupt: {error}"
    return row
