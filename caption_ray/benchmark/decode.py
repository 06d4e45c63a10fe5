"""From JPEG to a square picture on one core: the speed of several ways, and how they differ."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from caption_ray.benchmark import measuring, pictures
from caption_ray.config import Count, Uri
from caption_ray.data import transforms

SIZE = 224

SHORTER_SIDE = 256
"""Pixels of the shorter side that ingest shrinks pictures to."""


@dataclass
class Decode:
    """Decoding and resizing on one core, of originals and of pictures that ingest shrank."""

    pictures: Uri | None = None
    """A folder of JPEGs; None: made-up ones of 640 x 480."""
    images: Count = 200
    """How many of them."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds of 40 pictures."""


Pixels = NDArray[np.uint8]


def run(options: Decode) -> None:
    rounds, count = (2, 40) if options.quick else (options.rounds, options.images)
    originals = read(options.pictures, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shrunk = [transforms.shrink(data, SHORTER_SIDE) for data in originals]
        for title, jpegs in (("originals", originals), (f"shrunk to {SHORTER_SIDE}", shrunk)):
            _measure(title, jpegs, rounds)
    finally:
        torch.set_num_threads(threads)


def read(folder: str | None, count: int) -> list[bytes]:
    """The first `count` JPEGs of a folder, or as many made-up ones."""
    if folder is None:
        rng = np.random.default_rng(0)
        return [pictures.photograph(rng) for _ in range(count)]
    files = sorted(Path(folder).rglob("*.jpg"))[:count]
    if not files:
        raise ValueError(f"--pictures {folder}: no .jpg file is there")
    return [file.read_bytes() for file in files]


def _measure(title: str, jpegs: list[bytes], rounds: int) -> None:
    ways = {"usual (Pillow, bicubic)": usual, "Pillow, one resize": fused, "torchvision v2": v2_way,
            "caption_ray": ours}  # fmt: skip

    def all_of(way: Callable[[bytes], Pixels]) -> Callable[[], float]:
        return lambda: float(len([way(data) for data in jpegs]))

    rates = measuring.in_turn({name: all_of(way) for name, way in ways.items()}, rounds)
    size = sum(map(len, jpegs)) / len(jpegs) / 1e3
    found = measuring.report(
        "decode", f"decode: {title} ({size:.0f} kB each) to {SIZE} x {SIZE}, one core", "images",
        rates, "usual (Pillow, bicubic)",
    )  # fmt: skip
    # the usual way crops after rounding the size, which shifts by half a pixel: only a comparison
    # to the single resize shows the filters' difference
    level, psnr = difference([fused(data) for data in jpegs], [ours(data) for data in jpegs])
    print(f"caption_ray differs from Pillow's bicubic by {level:.2f} levels ({psnr:.1f} dB)")
    measuring.record({**found, "mean_level": round(level, 3), "psnr": round(psnr, 2)})


def difference(expected: list[Pixels], found: list[Pixels]) -> tuple[float, float]:
    """Mean absolute difference in levels, and the peak signal-to-noise ratio in dB."""
    error = np.stack(found).astype(np.float32) - np.stack(expected)
    mse = float(np.square(error).mean())
    psnr = 10 * np.log10(255**2 / mse) if mse else np.inf
    return float(np.abs(error).mean()), float(min(psnr, 99.0))


# Ways: each gives (224, 224, 3) of the centre of a JPEG -----------------------------------------


def usual(data: bytes) -> Pixels:
    """Pillow's bicubic resize of the shorter side, then a crop: the usual evaluation transform."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = (max(SIZE, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def fused(data: bytes) -> Pixels:
    """The same in one resize, which computes only the pixels that are kept."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def v2_way(data: bytes) -> Pixels:
    """Pillow's decoder, and torchvision's v2 transforms as their documentation shows them."""
    from torchvision.transforms import v2

    image = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    resized = v2.Resize(SIZE, antialias=True)(image.permute(2, 0, 1))
    pixels: Pixels = v2.CenterCrop(SIZE)(resized).permute(1, 2, 0).numpy()
    return pixels


def ours(data: bytes) -> Pixels:
    """As ingest, training and serving do it."""
    return transforms.fit(transforms.decode(data), SIZE, "crop")
