"""Pictures with captions, in any of the formats -> verified, shuffled shards and an index of them.

Each shard is a pure function of what the fingerprint covers (which pictures, in which order, under
which settings). So any worker may write any shard, twice if need be, and an ingest that died is
completed by running it again: shards that have a receipt are not written again. The index is
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from caption_ray import cluster, storage
from caption_ray.config import DataConfig, SourceConfig
from caption_ray.data import card, card_page, receipts, shapes, shards, unspaced
from caption_ray.data.dataset import read_index
from caption_ray.data.downloads import DEAD_LINK
from caption_ray.data.formats import find_splits
from caption_ray.data.order import shuffled
from caption_ray.data.rows import fingerprint, to_rows
from caption_ray.data.shards import INDEX_FILE, Index, LeftOut, Shard
from caption_ray.data.sources import Record, Split
from caption_ray.data.tokenizer import PTB

RECEIPTS = ".receipts"
"""Folder of the receipts of an unfinished ingest, below its output."""

CARD_FILES = (card.CARD_FILE, card.PAGE_FILE)
"""Names of the data card's files; they are written before the index."""

SHARD_NAME = re.compile(r"\d+-of-\d+\.parquet")

SHORTER_SIDE = 256
"""Pixels that the shorter side of a picture is shrunk to unless something else is asked for."""

IMAGES_PER_SHARD = 500
"""Default size of a shard: 10 MB of shrunk COCO, one request of object storage."""


@dataclass(frozen=True)
class Receipt:
    """What is known of one finished shard."""

    shard: Shard
    left_out: list[LeftOut]
    word_counts: dict[str, int]


@dataclass(frozen=True)
class Inspected:
    """What is to be written, after a look at the source."""

    source: str
    image_size: int | None
    seed: int
    parts: dict[str, list[list[Record]]]
    """The pictures of each shard of each split."""
    left_out: list[LeftOut]
    fingerprint: str
    out: str = ""
    """Where to: see `at`."""
    finished: Index | None = None
    """The index, if all of it is there already."""

    def at(self, out: str) -> Inspected:
        """The same, to be written below `out`. Raises ValueError if that holds another data set."""
        out = storage.resolve(out)
        finished = read_index(out) if storage.exists(storage.join(out, INDEX_FILE)) else None
        if finished is not None and finished.fingerprint != self.fingerprint:
            raise ValueError(
                f"--out {out}: holds another data set (from {finished.source}, image size "
                f"{finished.image_size}); choose an empty folder or delete that one"
            )
        return dataclasses.replace(self, out=out, finished=finished)


def ingest(
    source: str,
    out: str,
    *,
    image_size: int | None,
    images_per_shard: int,
    seed: int,
    splits: tuple[str, ...] | None = None,
    karpathy: str | None = None,
    options: SourceConfig | None = None,
    progress: bool = True,
) -> Index:
    """Write the pictures of `source` (see `find_splits`) as shards below `out`.

    `image_size`: shorter side, in pixels, that larger pictures are shrunk to; None keeps originals.
    Returns the index, also when an earlier run with the same fingerprint had finished it. Raises
    ValueError if `out` holds another data set, or if nothing of a split is readable.
    """
    found = inspect(
        source,
        image_size=image_size,
        images_per_shard=images_per_shard,
        seed=seed,
        splits=splits,
        karpathy=karpathy,
        options=options,
    )
    return write(found.at(out), progress)


def inspect(
    source: str,
    *,
    image_size: int | None,
    images_per_shard: int,
    seed: int,
    splits: tuple[str, ...] | None = None,
    karpathy: str | None = None,
    options: SourceConfig | None = None,
) -> Inspected:
    """The first half of `ingest`, which needs no Ray: a job asks for it before it connects."""
    source = storage.resolve(source)
    found = find_splits(source, splits=splits, karpathy=karpathy, options=options)
    first = next(iter(found.values()))
    unspaced.warn(caption for record in first.records for caption in record.picture.captions)
    parts = {
        split: _in_shards(content, images_per_shard, seed)
        for split, content in found.items()
        if content.records
    }
    left_out = [LeftOut(split, *entry) for split, content in found.items()
                for entry in content.left_out]  # fmt: skip
    wanted = fingerprint(parts, image_size)
    return Inspected(source, image_size, seed, parts, left_out, wanted)


def write(this: Inspected, progress: bool = True) -> Index:
    """The second half of `ingest`, with Ray."""
    if this.finished is not None:
        _tidy(this.out, this.finished)
        cards = [storage.join(this.out, name) for name in CARD_FILES]
        if not all(map(storage.exists, cards)):  # an earlier version left none
            _write_card(this.out, this.finished)
        return this.finished
    _remove_unfinished(this.out, splits=tuple(this.parts), keep=this.fingerprint)
    word_counts: Counter[str] = Counter()
    left_out = list(this.left_out)
    listed: dict[str, list[Shard]] = {}
    for split, done in _write_shards(this, progress).items():
        listed[split] = [receipt.shard for receipt in done if receipt.shard.rows]
        left_out += [entry for receipt in done for entry in receipt.left_out]
        if not listed[split]:
            why = shards.outline(entry for entry in left_out if entry.split == split)
            raise ValueError(f"{this.source}: no picture of split {split!r} is readable: {why}")
        if split == "train":
            for receipt in done:
                word_counts.update(receipt.word_counts)
    index = Index(
        source=this.source,
        fingerprint=this.fingerprint,
        image_size=this.image_size,
        seed=this.seed,
        splits=listed,
        word_counts=dict(sorted(word_counts.items())),
        left_out=shards.counted(left_out, DEAD_LINK),
    )
    _write_card(this.out, index)
    storage.write_bytes(storage.join(this.out, INDEX_FILE), index.to_json().encode())
    _tidy(this.out, index)
    return index


def _remove_unfinished(out: str, *, splits: tuple[str, ...], keep: str) -> None:
    """Remove what a killed ingest left behind, except finished shards of the fingerprint to `keep`.

    Receipts of any other fingerprint vouch for shards that are about to be replaced.
    """
    for place in (*splits, RECEIPTS, INDEX_FILE, *CARD_FILES):
        storage.delete_partial(storage.join(out, place))
    for other in storage.list_folders(storage.join(out, RECEIPTS)):
        if other != keep:
            storage.delete(storage.join(out, RECEIPTS, other))


def _tidy(out: str, index: Index) -> None:
    """Remove the receipts of a finished ingest, and the shards of one that never was."""
    listed = {shard.file for split in index.splits for shard in index.shards(split)}
    for split in index.splits:
        for file in storage.list_files(storage.join(out, split)):
            name = f"{split}/{storage.name(file)}"
            if SHARD_NAME.fullmatch(storage.name(file)) and name not in listed:
                storage.delete(file)
    if storage.list_files(storage.join(out, RECEIPTS)):
        storage.delete(storage.join(out, RECEIPTS))


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


def ensure_ingested(
    source: str, runs: str, image_size: int, options: SourceConfig | None = None
) -> str:
    """URI of the shards of `source` (see `find_splits`), written beside the runs if need be, with
    pictures whose shorter side has `image_size` pixels at most.

    Each state of the source has a folder of its own: after a change it is ingested anew. Raises
    ValueError as `ingest` does.
    """
    found = inspect(
        source,
        image_size=image_size,
        images_per_shard=IMAGES_PER_SHARD,
        seed=0,
        options=options,
    )
    name = f"{storage.name(found.source)}-{found.fingerprint[:12]}"
    there = found.at(storage.join(storage.resolve(runs), "data", name))
    if there.finished is None:
        print(f"Ingesting {found.source} once, into {there.out}", flush=True)
    write(there)
    return there.out


def _write_card(out: str, index: Index) -> None:
    """Survey all shards, and leave the data card beside them."""
    surveys: dict[str, card.Survey] = {}
    for split in index.splits:
        surveys[split] = card.Survey()
        # pictures are shown of the first shard: it is as random as all
        sizes = [card.SAMPLE] + [0] * (len(index.shards(split)) - 1)
        for task in [
            _survey.remote(out, *of) for of in zip(index.shards(split), sizes, strict=True)
        ]:
            with cluster.original_errors():
                surveys[split].add(ray.get(task))
    found = card.card(index, surveys)
    samples = {split: one.sample for split, one in surveys.items()}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(out, card.CARD_FILE), text.encode())
    page = card_page.page(found, samples)
    storage.write_bytes(storage.join(out, card.PAGE_FILE), page.encode())


@ray.remote(num_cpus=1, max_retries=3)
def _survey(out: str, shard: Shard, sample: int) -> card.Survey:
    data = storage.read_verified(storage.join(out, shard.file), shard.bytes, shard.checksum)
    return card.survey(shards.from_bytes(data).to_pylist(), storage.checksum, sample)


def _in_shards(split: Split, images_per_shard: int, seed: int) -> list[list[Record]]:
    """The records in random order, cut into shards of equal size (give or take one)."""
    records = shuffled(split.records, seed, images_per_shard)
    count = math.ceil(len(records) / images_per_shard)
    bounds = [part for part in np.array_split(np.arange(len(records)), count)]
    return [records[part[0] : part[-1] + 1] for part in bounds]


def _write_shards(this: Inspected, progress: bool) -> dict[str, list[Receipt]]:
    """Write the shards that have no receipt yet. Returns the receipts of all, in their order."""
    out, receipts_folder = this.out, storage.join(this.out, RECEIPTS, this.fingerprint)

    def is_valid(receipt: Receipt) -> bool:
        """Whether the shard that it vouches for is there."""
        shard = receipt.shard
        try:
            return not shard.rows or storage.size(storage.join(out, shard.file)) == shard.bytes
        except FileNotFoundError:
            return False

    done = receipts.read_all(receipts_folder, Receipt, is_valid)
    files = {
        f"{split}/{number:05d}-of-{len(listed):05d}.parquet": records
        for split, listed in this.parts.items()
        for number, records in enumerate(listed)
    }
    with cluster.progress_bar(sum(map(len, files.values())), "ingest", progress) as bar:
        bar.update(sum(len(files[file]) for file in done))
        waiting = {
            _write_shard.remote(
                records, out, file, storage.join(receipts_folder, f"{file}.json"), this.image_size
            ): file
            for file, records in files.items()
            if file not in done
        }
        while waiting:
            (task,), _ = ray.wait(list(waiting), num_returns=1)
            file = waiting.pop(task)
            with cluster.original_errors():
                done[file] = ray.get(task)
            bar.update(len(files[file]))
    return {split: [done[f] for f in files if f.startswith(f"{split}/")] for split in this.parts}


# a task whose worker or node dies is run again by Ray; storage errors were already retried
@ray.remote(num_cpus=1, max_retries=3)
def _write_shard(
    records: list[Record], out: str, file: str, receipt_uri: str, image_size: int | None
) -> Receipt:
    results = to_rows(records, image_size)
    rows = [row for row in results if row["error"] is None]
    split = file.partition("/")[0]
    left_out = [LeftOut(split, r["file_name"], r["error"]) for r in results if r["error"]]
    counts = Counter(word for row in rows for caption in row["captions"] for word in PTB(caption))
    data = shards.to_bytes(rows)
    if rows:
        storage.write_bytes(storage.join(out, file), data)
    shard = Shard(file, len(rows), len(data), storage.checksum(data))
    receipt = Receipt(shard, shards.counted(left_out, DEAD_LINK), dict(counts))
    receipts.write(receipt_uri, receipt)
    return receipt
