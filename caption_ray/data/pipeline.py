"""Ray Data: shards -> decoded, augmented, tokenised, shuffled batches.

Each training worker builds its own dataset for each epoch from `plan_epoch`. So the pictures that
it reads are a pure function of (seed, epoch, rank), none is dropped to make the shares equal, and
an interrupted epoch continues with what is left of it. A shard is one Ray Data task, which reads
and tokenises. Pictures are decoded either there (far: on any node; they cross the object store as
uint8 tensors of fixed shape) or in threads of the process that wants the batches (near: they cross
encoded, in a fifth of the bytes or less). The batches are the same either way, except for rounding
where a GPU decodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import ExecutionResources
from ray.data.block import BlockAccessor

from caption_ray.data import decode_near
from caption_ray.data.dataset import Unit
from caption_ray.data.plan import ShardSlice
from caption_ray.data.preparation import Preparation
from caption_ray.data.read_tasks import SliceSource

BLOCK_BYTES = 16 * 2**20
"""Size of the blocks that a task yields: small enough for an early first batch and little memory,
large enough that Ray does not spend its time on handling blocks. (Ray's default of 128 MiB is a
whole shard and trebles the time to the first batch; 8 MiB cost a twentieth of the speed.)"""

STORE_BYTES = 64 * 2**20
"""Bytes that may lie in the object store for each CPU that reads (counted as four at least): twice
what one task has in flight. Without a bound, reading runs ahead of the trainer as long as the store
has room: 6,000 pictures of COCO's size took 800 MiB more, and were read no faster."""


class TooManyBadImages(RuntimeError):
    """More pictures of an epoch were unreadable than `data.max_bad_images` allows."""


@dataclass
class Batch:
    """What one step sees, on the host."""

    inputs: NDArray[np.uint8] | NDArray[np.float16] | torch.Tensor
    """Pictures uint8 (B, S, S, 3), on the device that decoded them if one did; or their features
    by a frozen encoder, float16 (B, N, E)."""
    tokens: NDArray[np.int32]
    """(B, K, L)"""
    numbers: NDArray[np.int64]
    """(B,), of the pictures in their split."""
    image_ids: NDArray[np.int64]
    """(B,), as the data set names them."""
    errors: list[str]
    """Of the pictures that could not be read."""
    captions: list[list[str]]
    """What people wrote about each picture, where `Preparation` was told to bring it."""


def batches(
    units: Sequence[Unit],
    slices: list[ShardSlice],
    prepare: Preparation,
    *,
    batch_size: int,
    cpus: float,
    keep_order: bool,
    decode_threads: int = 0,
    decode_on: torch.device | None = None,
) -> Iterator[Batch]:
    """The pictures of `slices`, collated into batches. They are read by at most `cpus` CPUs of the
    cluster at a time, and decoded by these (far) or, if `decode_threads` is above 0, by that many
    threads of this process (near), which may let the GPU `decode_on` do it."""
    if not slices:
        return
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=cpus, object_store_memory=max(4, cpus) * STORE_BYTES
    )
    context.execution_options.preserve_order = keep_order
    context.target_max_block_size = BLOCK_BYTES
    is_near = decode_threads > 0 and not units[0].holds_features
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            SliceSource(units, slices, prepare, decode=not is_near), override_num_blocks=len(slices)
        )
        # whole blocks, as they lie in the object store: batches made by Ray would be copies
        blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        parts = _rebatched(blocks, batch_size)
        if is_near:
            stream = decode_near.decoded(map(_apart, parts), prepare, decode_threads, decode_on)
        else:
            stream = map(_arrays, parts)
        for columns in stream:
            yield Batch(
                columns["inputs"],
                columns["tokens"],
                columns["number"],
                columns["image_id"],
                [error for error in columns["error"] if error],
                [json.loads(text) if text else [] for text in columns["captions_json"]],
            )


def _rebatched(blocks: Iterable[pa.Table], batch_size: int) -> Iterator[list[pa.Table]]:
    """The same rows in batches; each batch is a list of views of the blocks."""
    parts: list[pa.Table] = []
    wanted = batch_size
    for block in blocks:
        start = 0
        while start < len(block):
            part = block.slice(start, wanted)
            parts.append(part)
            start += len(part)
            wanted -= len(part)
            if not wanted:
                yield parts
                parts, wanted = [], batch_size
    if parts:
        yield parts


def _arrays(parts: list[pa.Table]) -> decode_near.Columns:
    """The rows of a batch as arrays; read-only views where all lie in one block."""
    of_parts = [BlockAccessor.for_block(part).to_batch_format("numpy") for part in parts]
    if len(of_parts) == 1:
        return dict(of_parts[0])
    return {name: np.concatenate([part[name] for part in of_parts]) for name in of_parts[0]}


def _apart(parts: list[pa.Table]) -> tuple[list[pa.Scalar], decode_near.Columns]:
    """The encoded pictures, and the rest as arrays that can be written to."""
    pictures = [picture for part in parts for picture in part["encoded"]]
    others = _arrays([part.drop_columns("encoded") for part in parts])
    columns = {name: np.require(array, requirements="W") for name, array in others.items()}
    return pictures, columns
