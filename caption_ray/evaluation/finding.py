"""Which pictures somebody means who names a file, a folder, a glob or a bucket prefix."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from caption_ray import storage
from caption_ray.data import listing, transforms

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".avif",
)
"""Of files that are taken for pictures unseen."""

SHOWN = 3
"""Files that the console names."""

LOOKS_AT_A_TIME = 16


def find_images(images: str) -> list[str]:
    """URIs of the pictures that `images` means; ValueError if it means none.

    What exists is meant as it stands, also with marks of a glob in its name. In a glob `*`, `?` and
    `[...]` stand for parts of one name, `**` for any number of folders or none, and a folder that
    matches for all in it. What is hidden is meant only by a pattern that begins with a dot.

    Files without a suffix of pictures are looked into, at two small requests each; those that are
    no pictures are told on the console. On local paths no more folders are listed than the pattern
    can mean; in a bucket all below its first mark.
    """
    uri = storage.resolve(images)
    if storage.exists(uri):
        return [uri]
    files = listing.files_below(uri) or _glob(uri)
    with ThreadPoolExecutor(LOOKS_AT_A_TIME) as threads:
        looks = list(threads.map(_is_picture, files))
    skipped = [file for file, is_picture in zip(files, looks, strict=True) if not is_picture]
    shown = ", ".join(map(storage.name, skipped[:SHOWN])) + ", ..." * (len(skipped) > SHOWN)
    if len(skipped) == len(files):
        there = f"{len(skipped)} files that are none: {shown}" if skipped else "nothing"
        raise ValueError(
            f"--images {images}: no picture there; give a picture, a folder or bucket prefix of "
            f"pictures ({', '.join(SUFFIXES)}, or what has their content) or a glob; there is "
            f"{there}"
        )
    if skipped:
        print(f"Skipped {len(skipped)} files that are no pictures: {shown}", flush=True)
    return [file for file, is_picture in zip(files, looks, strict=True) if is_picture]


def _is_picture(uri: str) -> bool:
    if uri.lower().endswith(SUFFIXES):
        return True
    try:
        head = storage.read_range(uri, 0, min(transforms.HEAD_BYTES, storage.size(uri)))
    except OSError:
        return True  # so that its line says why it cannot be read
    return transforms.is_picture(head)


def _glob(uri: str) -> list[str]:
    """The files that a pattern means; none if it is no pattern."""
    parts, known = uri.split("/"), 0
    while known < len(parts) and (
        not set("*?[") & set(parts[known]) or _is_folder("/".join(parts[: known + 1]))
    ):
        known += 1
    patterns = parts[known:]
    if not patterns:
        return []

    def is_meant(path: str, is_folder: bool) -> bool:
        return _matches(path.split("/"), patterns, is_folder)

    return listing.files_below("/".join(parts[:known]) or "/", is_meant)


def _is_folder(uri: str) -> bool:
    return storage.name(uri) in storage.list_folders(storage.parent(uri))


def _matches(parts: Sequence[str], patterns: Sequence[str], is_folder: bool) -> bool:
    """Whether the patterns mean a file, or could mean what is in a folder."""
    if not patterns:  # the folder above matches
        return all(map(listing.is_visible, parts))
    if not parts:
        return is_folder
    (part, *below), (pattern, *rest) = parts, patterns
    may_match = listing.is_visible(part) or pattern.startswith(".") or pattern == part
    if pattern == "**":
        return _matches(parts, rest, is_folder) or (
            may_match and _matches(below, patterns, is_folder)
        )
    return may_match and fnmatchcase(part, pattern) and _matches(below, rest, is_folder)
