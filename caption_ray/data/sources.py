"""Finding a COCO layout, and reading its pictures one by one from zips, folders or buckets.

A zip is never unpacked: its directory is read once, and each picture is then one range read.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from caption_ray import storage
from caption_ray.data import coco, listing

T = TypeVar("T")

SPLITS = ("train", "val")
"""COCO's splits that have captions."""

YEARS = ("2017", "2014", "")
"""Suffixes of split names that are looked for, in this order."""

LAYOUT = (
    'captions_{split}.json, {{"images": [{{"id": 1, "file_name": "a.jpg"}}, ...], "annotations": '
    '[{{"image_id": 1, "caption": "A dog."}}, ...]}}, and the pictures in {split}/ or {split}.zip'
)
"""What a split must consist of, for messages."""

MAX_PICTURE_BYTES = 64 << 20
"""A zip entry that claims to unpack to more than this is refused."""


MAX_ANNOTATION_BYTES = 2 << 30
"""An annotation file in a zip that claims to unpack to more than this is refused: four times the
largest of COCO."""


PROBES, PROBES_AT_A_TIME = 64, 16
"""How many file names of a split are tried before its folder is believed to be elsewhere."""


_HEADER, _SLACK = 30, 64
"""Bytes of the fixed part of an entry's local header, and of the room left for its extra field."""


class PictureError(Exception):
    """A picture that cannot be had; the message is the reason that the index records."""


@dataclass(frozen=True)
class Location:
    """Where the bytes of one picture are: a file, or an entry of a zip."""

    uri: str
    offset: int | None = None
    """Of the entry's local header; None: the whole file is the picture."""
    stored_bytes: int = 0
    method: int = zipfile.ZIP_STORED
    crc: int = 0
    picture_bytes: int = 0
    name_bytes: int = 0


@dataclass(frozen=True)
class Record:
    """One picture with its captions, and where to read it."""

    picture: coco.CocoImage
    location: Location | None
    """None: the zip has no such entry."""


@dataclass(frozen=True)
class Split:
    """All pictures of one split in a fixed order, and those without captions."""

    records: list[Record]
    left_out: list[coco.Unusable]


def read_picture(location: Location | None) -> bytes:
    """The encoded picture.

    Raises PictureError if it is missing or its bytes are damaged, StorageError if the storage
    does not answer.
    """
    if location is None:
        raise PictureError("missing")
    try:
        if location.offset is None:
            return storage.read_bytes(location.uri)
        return _read_entry(location, location.offset)
    except FileNotFoundError:
        raise PictureError("missing") from None
    except storage.DamagedError as error:
        raise PictureError(f"corrupt: {error}") from None


def _read_entry(location: Location, offset: int) -> bytes:
    if max(location.picture_bytes, location.stored_bytes) > MAX_PICTURE_BYTES:
        raise PictureError(f"corrupt: claims to unpack to {location.picture_bytes} bytes")
    # what was damaged on its way is read again before it counts as corrupt
    return storage.retry_damaged(location.uri, lambda: _unpack(location, offset))


def _unpack(location: Location, offset: int) -> bytes:
    # one request for the local header and the data: the header's extra field is usually empty, and
    # the zip's directory (68 bytes at least) always follows, so that the slack never overruns
    block = storage.read_range(
        location.uri, offset, _HEADER + location.name_bytes + location.stored_bytes + _SLACK
    )
    if block[:4] != b"PK\x03\x04":
        raise storage.DamagedError("no zip entry where the directory says")
    start = (
        _HEADER + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
    )
    data = block[start : start + location.stored_bytes]
    if len(data) < location.stored_bytes:
        data = storage.read_range(location.uri, offset + start, location.stored_bytes)
    if location.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, location.picture_bytes + 1)
        except zlib.error as error:
            raise storage.DamagedError(str(error)) from None
    elif location.method != zipfile.ZIP_STORED:
        raise PictureError(
            f"zip compression method {location.method}, which is not read: zip it with deflate"
        )
    if len(data) != location.picture_bytes or zlib.crc32(data) != location.crc:
        raise storage.DamagedError("bad CRC in the zip")
    return data


LAYOUTS: dict[str, Callable[[str, str], Split | None]] = {}
"""Layouts that are not COCO's, by name: each a function of the source and a split, which returns
None where the source is laid out otherwise. Another one needs its function and a line here."""


def find_splits(
    source: str, *, splits: tuple[str, ...] = SPLITS, karpathy: str | None = None
) -> dict[str, Split]:
    """Every picture of a COCO layout below `source` by split.

    `source` holds, for each split, `captions_<split><year>.json` (in `annotations/`, beside it, or
    in `annotations_trainval<year>.zip`) and the pictures as `<split><year>.zip` or folder; the
    addresses of COCO's own server work as well. With `karpathy`, the URI of his
    `dataset_coco.json`, its splits replace COCO's.

    Raises ValueError naming what was looked for if annotations or pictures are not there.
    """
    source = storage.resolve(source)
    found = {split: _find_split(source, split) for split in splits}
    return found if karpathy is None else _karpathy_splits(found, karpathy)


def _find_split(source: str, split: str) -> Split:
    for find in LAYOUTS.values():
        if (found := find(source, split)) is not None:
            return found
    for year in YEARS:
        with _annotation_files(source, split, year) as files:
            if files is not None:
                captions, instances = files
                annotations = coco.read_captions(captions, instances)
                break
    else:
        raise ValueError(
            f"{source}: no captions for split {split!r}: looked for "
            f"annotations_trainval2017.zip and captions_{split}2017.json, here and in "
            f"annotations/ (also with 2014 and without a year); {listing.describe(source)}. "
            f"Needed are {LAYOUT.format(split=split)}"
        )
    images = sorted(annotations.images, key=lambda image: image.image_id)
    if not images:
        reasons = ", ".join(f"{one.name}: {one.reason}" for one in annotations.left_out[:3])
        raise ValueError(f"{source}: split {split!r} has no picture with a caption ({reasons})")
    locations = _locate(source, f"{split}{year}", [image.file_name for image in images])
    return Split(
        [Record(*pair) for pair in zip(images, locations, strict=True)],
        annotations.left_out,
    )


@contextmanager
def _annotation_files(
    source: str, split: str, year: str
) -> Iterator[tuple[Path, Path | None] | None]:
    """Local copies of the captions and, if there are any, the instances of a split."""
    names = [f"captions_{split}{year}.json", f"instances_{split}{year}.json"]
    with tempfile.TemporaryDirectory(prefix="annotations-") as folder:
        copies = [Path(folder, name) for name in names]
        archives = [
            f"annotations_trainval{year}.zip",
            f"annotations/annotations_trainval{year}.zip",
        ]
        for archive in (storage.join(source, name) for name in archives):
            if storage.exists(archive):
                for name, copy in zip(names, copies, strict=True):
                    _extract(archive, name, copy)
                break
        else:
            for name, copy in zip(names, copies, strict=True):
                for uri in (storage.join(source, "annotations", name), storage.join(source, name)):
                    if storage.exists(uri):
                        storage.download(uri, copy)
                        break
        captions, instances = copies
        if captions.exists():
            yield captions, instances if instances.exists() else None
        else:
            yield None


def _extract(uri: str, name: str, copy: Path) -> None:
    """Copy the zip's file of that name, in whichever of its folders, if it has one."""
    entries = [e for e in _zip_entries(uri) if storage.name(e.filename) == name]
    if not entries:
        return
    if entries[0].file_size > MAX_ANNOTATION_BYTES:
        raise ValueError(
            f"{uri}: {name} claims to unpack to {entries[0].file_size} bytes, more than "
            f"{MAX_ANNOTATION_BYTES}: no annotations are that large; unpack it yourself"
        )

    def extract() -> None:
        with _open_zip(uri) as archive, archive.open(entries[0]) as packed, copy.open("wb") as file:
            shutil.copyfileobj(packed, file)

    _retried(uri, extract)


def _zip_entries(uri: str) -> list[zipfile.ZipInfo]:
    """The directory of the zip."""

    def read() -> list[zipfile.ZipInfo]:
        with _open_zip(uri) as archive:
            return archive.infolist()

    def known(entries: list[zipfile.ZipInfo]) -> list[tuple[Any, ...]]:
        return [(e.filename, e.header_offset, e.file_size, e.CRC) for e in entries]

    def read_twice() -> list[zipfile.ZipInfo]:
        # a zip guards its entries with a CRC, its directory with nothing
        first, second = read(), read()
        if known(first) != known(second):
            raise zipfile.BadZipFile("its directory reads differently each time")
        return second

    entries = _retried(uri, read if storage.is_local(uri) else read_twice)
    end = storage.size(uri) - _SLACK
    for entry in entries:
        if entry.header_offset + _HEADER + entry.compress_size > end:
            raise ValueError(
                f"{uri}: a broken zip ({entry.filename} reaches beyond its end); copy or download "
                "it again"
            )
    return entries


@contextmanager
def _open_zip(uri: str) -> Iterator[zipfile.ZipFile]:
    with storage.open_seekable(uri) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _retried(uri: str, operation: Callable[[], T]) -> T:
    """`operation` on a zip, again where it finds damage; ValueError naming the zip if it stays."""
    remedy = "copy or download it again"

    def run() -> T:
        nonlocal remedy
        try:
            return operation()
        except NotImplementedError as error:  # zipfile's, of a way to pack that it does not know
            remedy = "zip it again with deflate, or download it again if it is packed so already"
            raise storage.DamagedError(str(error)) from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise storage.DamagedError(str(error)) from None

    try:
        return storage.retry_damaged(uri, run)
    except storage.DamagedError as error:
        raise ValueError(f"{uri}: a broken zip ({error}); {remedy}") from None


def _locate(source: str, folder: str, names: list[str]) -> list[Location | None]:
    """Where the pictures of these names are; ValueError if none of them is anywhere.

    A bucket of millions takes long to list, so some names are tried first, spread over all: PROBES
    requests if everything is where it is expected, four times as many if not. What is missing
    beside them shows when it is read. Only if none of them is there, the whole source is listed
    (one request for each 1,000 objects; a web server has no listing).
    """
    for archive in (f"{folder}.zip", f"zips/{folder}.zip", f"images/{folder}.zip"):
        uri = storage.join(source, archive)
        if storage.exists(uri):
            return _locate_in_zip(uri, folder, names)
    count = min(PROBES, len(names))
    probes = [names[i * len(names) // count] for i in range(count)]
    places = [
        source,
        *(storage.join(source, below) for below in ("images", f"images/{folder}", folder)),
    ]
    found: dict[str, int] = {}
    with ThreadPoolExecutor(PROBES_AT_A_TIME) as threads:
        while places and count not in found.values():
            place = places.pop()
            uris = [storage.join(place, name) for name in probes]
            found[place] = sum(threads.map(storage.exists, uris))
    place = max(found, key=lambda place: found[place])
    if found[place]:
        return [Location(storage.join(place, name)) for name in names]
    files = {storage.relative(file, source): file for file in listing.files_below(source)}
    matches = listing.match(names, files, folder, is_ours=False)
    if not matches:
        raise ValueError(
            f"{source}: no pictures: looked for {folder}.zip and for {names[0]} in {folder}/, "
            f"images/{folder}/, images/ and here; {listing.describe(source)}"
            f"{listing.several(names[0], files)}"
        )
    return [Location(files[matches[name]]) if name in matches else None for name in names]


def _locate_in_zip(uri: str, folder: str, names: list[str]) -> list[Location | None]:
    entries = {entry.filename: entry for entry in _zip_entries(uri) if not entry.is_dir()}
    matches = listing.match(names, entries, folder, is_ours=True)
    if not matches:
        raise ValueError(
            f"{uri}: holds none of the pictures; {folder}/{names[0]} is one looked for; it holds "
            f"{listing.outline(entries)}{listing.several(names[0], entries)}"
        )
    return [
        _entry_location(uri, entries[matches[name]]) if name in matches else None for name in names
    ]


def _entry_location(uri: str, entry: zipfile.ZipInfo) -> Location:
    return Location(
        uri,
        entry.header_offset,
        entry.compress_size,
        entry.compress_type,
        entry.CRC,
        entry.file_size,
        len(entry.orig_filename.encode("utf-8")),
    )


def _karpathy_splits(found: dict[str, Split], karpathy: str) -> dict[str, Split]:
    with tempfile.TemporaryDirectory() as folder:
        chosen = coco.read_karpathy(storage.download(karpathy, Path(folder, "karpathy.json")))
    records = sorted(
        (record for split in found.values() for record in split.records),
        key=lambda record: record.picture.image_id,
    )
    result = {
        split: Split([r for r in records if chosen.get(r.picture.image_id) == split], [])
        for split in ("train", "val", "test")
    }
    absent = [r.picture.file_name for r in records if r.picture.image_id not in chosen]
    left_out = [entry for split in found.values() for entry in split.left_out]
    result["train"].left_out.extend(
        left_out + [coco.Unusable(name, "not in Karpathy's splits") for name in absent]
    )
    empty = [split for split, content in result.items() if not content.records]
    if empty:
        raise ValueError(f"{karpathy}: none of its {', '.join(empty)} pictures are in the source")
    return result
