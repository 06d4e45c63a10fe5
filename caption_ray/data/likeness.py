"""Which pictures are the same to the eye: a fingerprint of what is seen, and groups of those alike.

The fingerprint (64 bits of the lowest frequencies of the picture in grey) hardly changes when a
picture is encoded anew, in another format, quality or size.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_ray.data import transforms

SIDE, KEPT = 32, 8
"""Pixels of a side of the picture that is looked at, and frequencies that are kept of each side."""

MOST_DIFFERENT = 3
"""Bits in which the fingerprints of two pictures that count as the same may differ."""

BANDS = MOST_DIFFERENT + 1
"""Parts of a fingerprint: of two that differ in so few bits, one part is equal."""

FLAT = 2.0
"""Standard deviation of the grey, of 255 levels, below which there is nothing to recognise."""


def fingerprint(data: bytes) -> int | None:
    """64 bits of what is to be seen; None if that is one colour only. Raises ImageError as `decode`
    does."""
    pixels = transforms.decode(data)
    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    if small.std() < FLAT:
        return None
    waves = _waves()
    frequencies = (waves @ small @ waves.T).ravel()[1:]  # without the mean brightness
    frequencies = np.append(frequencies, 0.0)
    bits = frequencies > np.median(frequencies[:-1])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _waves() -> NDArray[np.float64]:
    """The lowest frequencies of the discrete cosine transform: (KEPT, SIDE)."""
    frequency, place = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
    waves: NDArray[np.float64] = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))
    return waves


def groups(exact: Sequence[Hashable], fingerprints: Sequence[int | None]) -> list[int]:
    """For each picture the place of the first of its group: those with an equal entry in `exact`,
    or with fingerprints that hardly differ, and all that are joined by others."""
    first = list(range(len(exact)))

    def root(place: int) -> int:
        while first[place] != place:
            first[place] = first[first[place]]
            place = first[place]
        return place

    def join(one: int, other: int) -> None:
        a, b = sorted((root(one), root(other)))
        first[b] = a

    seen: dict[Hashable, int] = {}
    for place, key in enumerate(exact):
        join(seen.setdefault(key, place), place)
    width = 64 // BANDS
    for band in range(BANDS):
        alike: dict[int, list[int]] = {}
        for place, bits in enumerate(fingerprints):
            if bits is not None:
                part = bits >> (band * width) & ((1 << width) - 1)
                others = alike.setdefault(part, [])
                for other in others:
                    if (bits ^ (fingerprints[other] or 0)).bit_count() <= MOST_DIFFERENT:
                        join(other, place)
                        break  # its group is joined as a whole, or by another band
                others.append(place)
    return [root(place) for place in range(len(exact))]
