"""Splits for a source that has none: shares of its training pictures, chosen by the pictures.

Which split a picture is in depends on nothing but what it shows: not on its name, its place, or
which others there are. Pictures that look the same (the same bytes, or encoded anew) stay together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from caption_ray.data import likeness, transforms
from caption_ray.data.locations import Location, PictureError, WebAddress, readers
from caption_ray.data.sources import SPLITS, Record, Split

READ_THREADS = 16
"""Pictures that are looked at at a time."""

FORM = "val=0.02,test=0.02"


def parse(text: str | None) -> dict[str, float]:
    """What `--split` says: the share of each new split. Raises ValueError naming the option."""
    shares: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        name, _, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if name not in SPLITS[1:] or name in shares or not 0 < share < 1:
            raise ValueError(f"--split {text}: give shares between 0 and 1 as in {FORM}")
        shares[name] = share
    if sum(shares.values()) >= 1:
        raise ValueError(f"--split {text}: nothing is left to train on; give smaller shares")
    return shares


def share_out(
    found: Mapping[str, Split], shares: Mapping[str, float], source: str
) -> dict[str, Split]:
    """The same with these shares of the training pictures as splits of their own."""
    for name in shares:
        if name in found:
            raise ValueError(
                f"--split {name}={shares[name]}: {source} has a split {name} of its own "
                f"({len(found[name].records)} pictures); leave {name} out"
            )
    if "train" not in found:
        raise ValueError(f"--split: {source} has no training pictures, only {', '.join(found)}")
    records = found["train"].records
    parts: dict[str, list[Record]] = {name: [] for name in ("train", *shares)}
    for record, number in zip(records, _numbers(records), strict=True):
        for name, share in shares.items():
            if number < share:
                parts[name].append(record)
                break
            number -= share
        else:
            parts["train"].append(record)
    return {
        **found,
        **{name: Split(part, []) for name, part in parts.items()},
        "train": Split(parts["train"], found["train"].left_out),
    }


def _numbers(records: list[Record]) -> list[float]:
    """A number from 0 to 1 for each picture, which is the same for those that look the same."""
    if len(records) > 1000:
        print(f"Looking at {len(records)} pictures, to keep those alike together ...", flush=True)
    digests = [""] * len(records)
    fingerprints: list[int | None] = [None] * len(records)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for places, read in readers([record.location for record in records]):
            looked = threads.map(lambda place, read=read: _look(records[place], read), places)
            for place, (digest, bits) in zip(places, looked, strict=True):
                digests[place], fingerprints[place] = digest, bits
    firsts = likeness.groups(digests, fingerprints)
    least: dict[int, str] = {}
    for digest, first in zip(digests, firsts, strict=True):
        least[first] = min(digest, least.get(first, digest))
    return [int(least[first][:16], 16) / 2**64 for first in firsts]


def _look(record: Record, read: Callable[[Location | None], bytes]) -> tuple[str, int | None]:
    """Digest and fingerprint of the picture. One on the web is known by its address alone, so that
    it is not fetched twice, and so is one that cannot be read, by its name."""
    if isinstance(record.location, WebAddress):
        return _digest(record.location.url.encode()), None
    try:
        data = read(record.location)
    except PictureError:
        return _digest(record.picture.file_name.encode()), None
    try:
        return _digest(data), likeness.fingerprint(data)
    except transforms.ImageError:
        return _digest(data), None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
