"""Finds the pictures that a file name, a folder, a glob pattern or a bucket prefix stands for."""

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
"""Files with these suffixes count as pictures without a look inside."""

SHOWN = 3
"""Most skipped files that are named on the console."""

LOOKS_AT_A_TIME = 16


def find_images(images: str) -> list[str]:
    """URIs of the pictures that `images` stands for; raises ValueError if there are none.

    A path that exists is taken literally, even if it contains `*`, `?` or `[`. In a pattern `*`,
    `?` and `[...]` match within one name, `**` matches any number of folders or none, and a folder
    that matches stands for everything in it. Hidden files match only patterns that begin with a
    dot.

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
    """The files that match a pattern; none if `uri` is not a pattern."""
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
    """Whether the patterns match a file, or may match something inside a folder."""
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
