"""Captions for many pictures: Ray Data actors, on GPUs where there are any.

The same `Predictor` that serves captions them, so what is measured is what is served.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset

from caption_ray import cluster, storage
from caption_ray.captioning.checkpoint import Loaded
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import SearchConfig
from caption_ray.data.dataset import DataSet, Unit
from caption_ray.data.judge import judge
from caption_ray.data.plan import plan_epoch
from caption_ray.data.transforms import thumbnail

BATCH_SIZE = 32
THUMBNAIL_SIDE = 192
"""Longer side of the pictures in reports, in pixels."""
DECODE_THREADS = 4


class _Captions:
    """An actor that captions batches: rows with `image` bytes (or None and an `error`) become rows
    with a caption or an error."""

    def __init__(self, loaded: Any, search: SearchConfig | None, attention: bool) -> None:
        """`loaded` refers to a checkpoint.Loaded in Ray's object store. It was read once for all
        actors, so that all have the same weights even if the run goes on meanwhile."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Ray hands out shared, read-only memory, but a module needs weights that it may write to
        self.predictor = Predictor(copy.deepcopy(ray.get(loaded)), device, search)
        self.attention = attention
        self.threads = ThreadPoolExecutor(DECODE_THREADS)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        found = self.predictor.caption_pictures([row["image"] for row in rows], self.threads)
        for row, one in zip(rows, found, strict=True):
            picture, caption = row["image"], one.caption
            # a picture that could not even be fetched has its reason already
            row.update(caption=None, log_prob=None, image=None, error=row["error"] or one.error)
            if caption is None:
                continue
            row.update(caption=caption.text, log_prob=caption.log_prob)
            if self.attention and caption.attention is not None:
                row.update(
                    words=caption.words,
                    attention=caption.attention.ravel(),
                    grid=caption.attention.shape[1:],
                    box=one.box,
                    thumbnail=thumbnail(picture, THUMBNAIL_SIDE),
                )
        return pa.Table.from_pylist(rows, schema=_RESULT)


_RESULT = pa.schema(
    [
        ("file", pa.string()),
        ("caption", pa.string()),
        ("log_prob", pa.float64()),
        ("error", pa.string()),
        ("details", pa.string()),  # JSON that passes through: ids, references, objects
        # where the words looked, if asked for: see predictor.Caption
        ("words", pa.list_(pa.string())),
        ("attention", pa.list_(pa.float32())),  # of all words, cell by cell
        ("grid", pa.list_(pa.int32(), 2)),
        ("box", pa.list_(pa.float32(), 4)),
        ("thumbnail", pa.binary()),  # a JPEG
    ]
)


def caption_files(
    loaded: Loaded,
    files: Sequence[str],
    out: str,
    *,
    search: SearchConfig | None = None,
    progress: bool = True,
) -> int:
    """Caption pictures, given by their URIs as from `find_images`, with a checkpoint or an ensemble
    from `run_folder.load`.

    Writes JSON lines to `out`, sorted by file: `file`, `caption` and `log_prob`, or `file` and
    `error` for a picture that cannot be read. `search` has the search settings (default: those in
    the checkpoint). Returns the number of pictures that cannot be read.
    """
    dataset = ray.data.from_items(
        [{"uri": file} for file in files], override_num_blocks=_num_blocks(len(files))
    ).map_batches(_read_files, batch_size=BATCH_SIZE, batch_format="pyarrow", zero_copy_batch=True)
    rows = sorted(
        _caption(dataset, loaded, len(files), progress, search), key=lambda row: row["file"]
    )
    lines = []
    for row in rows:
        kept = ("file", "error") if row["error"] else ("file", "caption", "log_prob")
        lines.append(json.dumps({key: row[key] for key in kept}, ensure_ascii=False))
    storage.write_bytes(storage.resolve(out), ("\n".join(lines) + "\n").encode())
    return sum(row["error"] is not None for row in rows)


def caption_split(
    loaded: Loaded,
    dataset: DataSet,
    split: str,
    *,
    search: SearchConfig | None = None,
    attention: bool = False,
    limit: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Caption every picture of a split exactly once, or only the first `limit` in the order of the
    shards, with a checkpoint or an ensemble from `run_folder.load`.

    `search` has the search settings (default: those in the checkpoint). Returns one record for each
    picture, sorted by `image_id`, with `file`, `caption`, `log_prob`, `error` (None unless the
    picture cannot be read), `references` (the human captions) and `objects` (see shards.SCHEMA).
    With `attention`, a record also has `words`, `attention` (T, rows, columns), `box` (see
    pointing.point) and `thumbnail`, a small JPEG.
    """
    slices = plan_epoch(dataset.rows(split), rank=0, world_size=1, shuffle=None, limit=limit)
    pictures = sum(len(shard_slice.rows) for shard_slice in slices)
    read = ray.data.from_items(
        [{"unit": shard_slice.shard, "rows": len(shard_slice.rows)} for shard_slice in slices],
        override_num_blocks=len(slices),
    ).map_batches(
        _read_units,
        fn_args=[ray.put(dataset.splits[split])],
        batch_size=1,
        batch_format="pyarrow",
    )
    records = []
    for row in _caption(read, loaded, pictures, progress, search, attention):
        details = json.loads(row.pop("details"))
        grid = row.pop("grid")
        if grid is not None:
            row["attention"] = np.float32(row["attention"]).reshape(len(row["words"]), *grid)
        records.append({**row, **details})
    return sorted(records, key=lambda record: record["image_id"])


def judge_shapes(records: list[dict[str, Any]]) -> dict[str, float]:
    """For captions of drawn scenes: the shares that say nothing wrong ("true"), that name every
    object ("complete"), and that do both ("exact")."""
    judged = [judge(record["caption"] or "", record["objects"]) for record in records]
    count = max(1, len(judged))
    return {
        "true": sum(j.true for j in judged) / count,
        "complete": sum(j.complete for j in judged) / count,
        "exact": sum(j.true and j.complete for j in judged) / count,
    }


def _num_blocks(items: int) -> int:
    return max(1, min(items // BATCH_SIZE, 200))


def _read_files(table: pa.Table) -> pa.Table:
    rows = []
    for uri in table["uri"].to_pylist():
        row = {"file": uri, "image": None, "error": None, "details": "{}"}
        try:
            row["image"] = storage.read_bytes(uri)
        except OSError as error:
            row["error"] = str(error)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_ENCODED)


_ENCODED = pa.schema(
    [("file", pa.string()), ("image", pa.binary()), ("error", pa.string()),
     ("details", pa.string())]
)  # fmt: skip


def _read_units(table: pa.Table, units: ray.ObjectRef) -> Iterator[pa.Table]:
    loaded: list[Unit] = ray.get(units)
    for shard_slice in table.to_pylist():
        rows = []
        for row in loaded[shard_slice["unit"]].read()[: shard_slice["rows"]]:
            details = {
                "image_id": row["image_id"],
                "references": row["captions"],
                "objects": row["objects"],
            }
            rows.append(
                {
                    "file": row["file_name"],
                    "image": row["image"],
                    "error": row["error"],
                    "details": json.dumps(details),
                }
            )
        yield pa.Table.from_pylist(rows, schema=_ENCODED)


def _caption(
    encoded: Dataset,
    loaded: Loaded,
    total: int,
    progress: bool,
    search: SearchConfig | None = None,
    attention: bool = False,
) -> Iterator[dict[str, Any]]:
    gpus = cluster.num_gpus()
    # one CPU stays free for reading
    actors = gpus or max(1, int(cluster.num_cpus()) - 1)
    captioned = encoded.map_batches(
        _Captions,
        fn_constructor_args=[ray.put(loaded), search, attention],
        batch_size=BATCH_SIZE,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    with cluster.progress_bar(total, "caption", progress) as bar:
        for row in captioned.iter_rows():
            bar.update(1)
            yield row
