"""COCO as the world has it: its server's addresses, zips, unpacked folders, a bucket of JPEGs with
the annotations beside them; or any pictures with annotations in the same layout.

A zip is never unpacked: its directory is read once, and each picture is then one range read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import archives, coco
from caption_ray.data.formats.pictures import locate_pictures
from caption_ray.data.formats.source import Source
from caption_ray.data.sources import SPLITS, Record, Split, Unusable

WITH_CAPTIONS = ("train", "val")
"""COCO's own splits that have captions."""

YEARS = ("2017", "2014", "")
"""Suffixes of split names that are looked for, in this order."""

OTHER_NAMES = {"val": ("validation", "valid", "dev")}
"""Further names of splits in files and folders, in the order of trying."""

LAYOUT = (
    'captions_{split}.json, {{"images": [{{"id": 1, "file_name": "a.jpg"}}, ...], "annotations": '
    '[{{"image_id": 1, "caption": "A dog."}}, ...]}}, and the pictures in {split}/ or {split}.zip'
)
"""What a split must consist of, for messages."""

MAX_ANNOTATION_BYTES = 2 << 30
"""An annotation file in a zip that claims to unpack to more than this is refused: four times the
largest of COCO."""


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """Every picture of a COCO layout by split.

    For each split there is `captions_<split><year>.json` (in `annotations/`, beside it, or in
    `annotations_trainval<year>.zip`), and the pictures are in `<split><year>.zip`, in a folder, or
    in zips of any names. Raises ValueError if there are captions without pictures.
    """
    if source.is_file:
        return None
    found: dict[str, Split] = {}
    # other names of a split are only looked for where there is another split, or it is asked for
    # alone: each name is a dozen requests of a bucket
    splits = source.splits or SPLITS
    for names in ({split: (split,) for split in splits}, OTHER_NAMES):
        if names is not OTHER_NAMES or found or len(splits) == 1:
            for split in splits:
                content = None if split in found else _find_split(source.uri, names.get(split, ()))
                if content is not None:
                    found[split] = content
    return {split: found[split] for split in splits if split in found} or None


def _find_split(source: str, names: Sequence[str]) -> Split | None:
    for name in names:
        for year in YEARS:
            with _annotation_files(source, name, year) as files:
                if files is not None:
                    return _read_split(source, f"{name}{year}", *files)
    return None


def _read_split(source: str, folder: str, captions: Path, instances: Path | None) -> Split:
    annotations = coco.read_captions(captions, instances)
    images = sorted(annotations.images, key=lambda image: image.image_id)
    if not images:
        return Split([], annotations.left_out)
    locations = locate_pictures(source, folder, [image.file_name for image in images])
    return Split(
        [Record(*pair) for pair in zip(images, locations, strict=True)], annotations.left_out
    )


@contextmanager
def _annotation_files(
    source: str, split: str, year: str
) -> Iterator[tuple[Path, Path | None] | None]:
    """Local copies of the captions and, if there are any, the instances of a split."""
    names = [f"captions_{split}{year}.json", f"instances_{split}{year}.json"]
    with tempfile.TemporaryDirectory(prefix="annotations-") as folder:
        copies = [Path(folder, name) for name in names]
        zips = [
            f"annotations_trainval{year}.zip",
            f"annotations/annotations_trainval{year}.zip",
        ]
        for archive in (storage.join(source, name) for name in zips):
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
    entries = [e for e in archives.zip_entries(uri) if storage.name(e.filename) == name]
    if not entries:
        return
    if entries[0].file_size > MAX_ANNOTATION_BYTES:
        raise ValueError(
            f"{uri}: {name} claims to unpack to {entries[0].file_size} bytes, more than "
            f"{MAX_ANNOTATION_BYTES}: no annotations are that large; unpack it yourself"
        )

    def extract() -> None:
        with (
            archives.open_zip(uri) as archive,
            archive.open(entries[0]) as packed,
            copy.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)

    archives.retried(uri, extract)


def karpathy_splits(found: dict[str, Split], karpathy: str) -> dict[str, Split]:
    """The same pictures in the splits of Karpathy's `dataset_coco.json`."""
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
        left_out + [Unusable(name, "not in Karpathy's splits") for name in absent]
    )
    empty = [split for split, content in result.items() if not content.records]
    if empty:
        raise ValueError(f"{karpathy}: none of its {', '.join(empty)} pictures are in the source")
    return result
