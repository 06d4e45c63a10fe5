"""Pictures that look the same are known to be: encoded anew they are, others are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from captioned import pictures_of
from PIL import Image

from caption_ray.data import likeness
from caption_ray.data.formats import find_splits


@pytest.fixture(scope="module")
def photographs(coco_mini: Path) -> list[bytes]:
    found = find_splits(str(coco_mini))
    pictures = [picture for split in found.values() for picture in pictures_of(split)]
    return [picture for picture in pictures if isinstance(picture, bytes)]


def encoded_anew(data: bytes, kind: str, scale: float = 1.0, **options: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    image = image.resize((round(width * scale), round(height * scale)))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_no_two_photographs_look_the_same(photographs: list[bytes]) -> None:
    fingerprints = [likeness.fingerprint(data) for data in photographs]
    assert len(photographs) == 159
    assert likeness.groups(range(159), fingerprints) == list(range(159))


@pytest.mark.parametrize(
    ("kind", "scale", "options"),
    [
        ("PNG", 1.0, {}),
        ("JPEG", 1.0, {"quality": 90}),
        ("JPEG", 1.0, {"quality": 40}),
        ("WEBP", 1.0, {"quality": 60}),
        ("JPEG", 0.5, {"quality": 75}),
    ],
)
def test_a_photograph_that_is_encoded_anew_looks_the_same(
    photographs: list[bytes], kind: str, scale: float, options: dict[str, int]
) -> None:
    some = photographs[::8]
    again = [encoded_anew(data, kind, scale, **options) for data in some]
    fingerprints = [likeness.fingerprint(data) for data in [*some, *again]]
    groups = likeness.groups(range(len(fingerprints)), fingerprints)
    assert groups == [*range(len(some)), *range(len(some))]


def test_groups_are_those_that_all_pairs_give() -> None:
    """Compared with looking at every pair, on fingerprints that are near each other often."""
    rng = np.random.default_rng(0)
    seeds = [int(seed) for seed in rng.integers(0, 2**63, 20)]
    bits = []
    for _ in range(400):
        flipped = [1 << int(bit) for bit in rng.integers(0, 64, rng.integers(0, 4))]
        bits.append(seeds[rng.integers(20)] ^ sum(set(flipped)))
    exact = [int(key) for key in rng.integers(0, 300, 400)]
    expected = list(range(400))
    for i in range(400):
        for j in range(i):
            near = (bits[i] ^ bits[j]).bit_count() <= likeness.MOST_DIFFERENT
            if near or exact[i] == exact[j]:
                old, new = max(expected[i], expected[j]), min(expected[i], expected[j])
                expected = [new if group == old else group for group in expected]
    assert likeness.groups(exact, list(bits)) == expected
    assert len(set(expected)) < 400


def test_a_picture_of_one_colour_is_like_none_but_by_its_bytes() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), "white").save(buffer, "PNG")
    assert likeness.fingerprint(buffer.getvalue()) is None
    assert likeness.groups(["a", "b", "a"], [None, None, None]) == [0, 1, 0]


def test_thousands_of_equal_placeholders_are_one_group_and_no_pairs() -> None:
    placeholder, other = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    fingerprints: list[int | None] = [placeholder] * 20_000 + [other, placeholder ^ 1, None, None]
    assert list(likeness._alike([placeholder, other, placeholder ^ 1]))
    groups = likeness.groups(range(len(fingerprints)), fingerprints)
    assert groups == [0] * 20_000 + [20_000, 0, 20_002, 20_003]
