"""Which pictures are the same to the eye: a fingerprint of what is seen, and groups of those alike.

The fingerprint (64 bits of the lowest frequencies of the picture in grey) hardly changes when a
picture is encoded anew, in another format, quality or size.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_ray.data import transforms

SIDE, KEPT = 32, 8
"""Pixels of a side of the picture that is looked at, and frequencies that are kept of each side."""

MOST_DIFFERENT = 4
"""Bits in which the fingerprints of two pictures that count as the same may differ. Of 159
photographs of COCO, those encoded anew (JPEG of quality 40, or of half the size) differ in 4 at
most, different ones in 14 at least."""

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
        low, high = sorted((root(one), root(other)))
        first[high] = low

    seen: dict[Hashable, int] = {}
    for place, key in enumerate(exact):
        join(seen.setdefault(key, place), place)
    # one of each fingerprint: data sets of the web have thousands of equal placeholders, which
    # would make millions of pairs
    with_bits: dict[int, int] = {}
    for place, bits in enumerate(fingerprints):
        if bits is not None:
            join(with_bits.setdefault(bits, place), place)
    for one, other in _alike(list(with_bits)):
        join(with_bits[one], with_bits[other])
    return [root(place) for place in range(len(exact))]


def _alike(fingerprints: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pairs of them that hardly differ, some several times."""
    known = np.array(fingerprints, np.uint64)
    for band in np.array_split(np.arange(64, dtype=np.uint64), BANDS):
        mask = np.bitwise_or.reduce(np.left_shift(np.uint64(1), band))
        order = np.argsort(known & mask, kind="stable")
        part = known[order] & mask
        for same in np.split(order, np.flatnonzero(part[1:] != part[:-1]) + 1):
            for number, one in enumerate(same[:-1], start=1):
                others = same[number:]
                differing = np.unpackbits((known[others] ^ known[one]).view(np.uint8))
                near = differing.reshape(len(others), 64).sum(axis=1) <= MOST_DIFFERENT
                for other in others[near]:
                    yield fingerprints[one], fingerprints[other]
