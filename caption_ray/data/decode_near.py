"""Decoding near the trainer: in threads of its process, or on its GPU. pipeline.py calls it.

B pictures in a batch, S side of the square that a picture becomes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from caption_ray.data import transforms
from caption_ray.data.preparation import Preparation
from caption_ray.data.transforms import Window

AHEAD = 2
"""How many batches are prefetched: decoded, or being decoded, before they are asked for."""

TOGETHER = 4
"""Pictures that a decoding thread takes at a time."""

Columns: TypeAlias = dict[str, Any]
"""What `Preparation` gives for each of the B pictures, stacked."""

Undecoded: TypeAlias = tuple[Sequence[pa.Scalar], Columns]
"""The encoded pictures of a batch, and its columns except `inputs`."""

logger = logging.getLogger(__name__)


def decoded(
    batches: Iterable[Undecoded], prepare: Preparation, threads: int, device: torch.device | None
) -> Iterator[Columns]:
    """The batches with their pictures as `inputs`, uint8 (B, S, S, 3), decoded by `threads` threads
    that work AHEAD of the reader: arrays, or tensors on `device` if there is one (see
    `squares_on`)."""
    ahead: deque[tuple[Columns, list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for encoded, columns in batches:
            ahead.append((columns, _begin(encoded, columns, prepare, pool, device)))
            if len(ahead) > AHEAD:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    encoded: Sequence[pa.Scalar],
    columns: Columns,
    prepare: Preparation,
    pool: ThreadPoolExecutor,
    device: torch.device | None,
) -> list[Future[None]]:
    if device is not None:

        def decode_all() -> None:
            columns["inputs"] = squares_on(device, encoded, columns, prepare)

        return [pool.submit(decode_all)]
    size = prepare.encoder.image_size
    columns["inputs"] = images = np.empty((len(encoded), size, size, 3), np.uint8)

    def decode_some(first: int) -> None:
        for i in range(first, min(first + TOGETHER, len(encoded))):
            _square(encoded, columns, i, prepare, images[i])

    return [pool.submit(decode_some, first) for first in range(0, len(encoded), TOGETHER)]


def _finished(columns: Columns, decoding: list[Future[None]]) -> Columns:
    for future in decoding:
        future.result()
    images = columns["inputs"]
    if isinstance(images, Tensor) and images.is_cuda:
        # its memory belongs to another stream's pool
        images.record_stream(torch.cuda.current_stream(images.device))
    return columns


def _square(
    encoded: Sequence[pa.Scalar],
    columns: Columns,
    i: int,
    prepare: Preparation,
    out: NDArray[np.uint8],
) -> None:
    """Decode picture `i` into `out`, or note why that is impossible."""
    row = {name: columns[name][i] for name in ("tokens", "number", "file_name", "flip", "error")}
    prepare.square(encoded[i].as_py(), row, out)
    if row["error"]:
        columns["error"][i], columns["captions_json"][i] = row["error"], ""


# On a GPU -------------------------------------------------------------------------------------


def squares_on(
    device: torch.device, encoded: Sequence[pa.Scalar], columns: Columns, prepare: Preparation
) -> Tensor:
    """The same squares, decoded (by nvJPEG) and resized on `device`: uint8 (B, S, S, 3).

    They show the same part of each picture and differ only by rounding, which the JPEG standard
    leaves to the decoder. Whatever is not an upright JPEG in colour or grey is decoded by this
    thread on the CPU instead; so is, with a warning, a batch that the device's decoder refuses.
    """
    size, how = prepare.encoder.image_size, prepare.encoder.interpolation
    places, pictures, windows = [], [], []
    for i, picture in enumerate(encoded):
        data = picture.as_py()
        shape = _upright_jpeg_shape(data)
        if shape:
            places.append(i)
            pictures.append(data)
            windows.append(prepare.window(*shape, columns["number"][i], columns["flip"][i]))
    with _own_stream(device):
        squares = torch.empty((len(encoded), size, size, 3), dtype=torch.uint8, device=device)
        try:
            for i, square in zip(
                places, _decode(device, pictures, windows, size, how), strict=True
            ):
                squares[i] = square
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            names = ", ".join(columns["file_name"][i] for i in places)
            logger.warning("%s cannot decode one of these, the CPU takes over: %s", device, names)
            logger.warning("its reason: %s", error)
            places = []
        for i in sorted(set(range(len(encoded))) - set(places)):
            by_host = np.empty((size, size, 3), np.uint8)
            _square(encoded, columns, i, prepare, by_host)
            squares[i] = torch.from_numpy(by_host)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return squares


def _upright_jpeg_shape(data: bytes | None) -> tuple[int, int] | None:
    """(height, width) of what the device can decode; None for what the CPU has to look at."""
    try:
        return transforms.upright_jpeg_shape(data) if data else None
    except transforms.ImageError:
        return None


def _decode(
    device: torch.device,
    pictures: Sequence[bytes],
    windows: Sequence[Window],
    size: int,
    how: transforms.Interpolation,
) -> list[Tensor]:
    """What the windows show of the JPEGs: uint8 (S, S, 3) each."""
    if not pictures:
        return []
    # imported here, because it takes a second to load and most runs never need it
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.tensor(np.frombuffer(picture, np.uint8)) for picture in pictures]
    decoded = decode_jpeg(encoded, ImageReadMode.RGB, device)
    return [_squeeze(*each, size, how) for each in zip(decoded, windows, strict=True)]


def _squeeze(image: Tensor, window: Window, size: int, how: transforms.Interpolation) -> Tensor:
    """What `transforms.squeeze` does, of a picture (3, H, W)."""
    top, left, height, width, is_mirrored = window
    part = image[:, top : top + height, left : left + width]
    if (height, width) != (size, size):
        # in floating point, because only CPUs have a kernel for uint8
        part = torch.nn.functional.interpolate(
            part[None].float(), (size, size), mode=transforms.mode_of(how), antialias=True
        )[0]
        part = part.round().clamp(0, 255).to(torch.uint8)  # bicubic overshoots
    if is_mirrored:
        part = part.flip(-1)
    return part.permute(1, 2, 0)


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A stream beside the one that trains."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(_stream(device))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all threads and epochs: torch keeps memory for every stream it ever made."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
