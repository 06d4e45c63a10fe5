"""JSON files of captions that differ from COCO's in their names, or in what is in them.

NoCaps (`nocaps_val_4500_captions.json`) and VizWiz (`train.json`, which marks captions that were
rejected) have COCO's entries; if no picture lies beside them, the addresses that they name are
used. TextCaps (`TextCaps_0.1_train.json`) has one entry for each caption.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import coco, json_entries
from caption_ray.data.formats.collecting import Collector, checked_name
from caption_ray.data.formats.pictures import locate_pictures
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.formats.splits import splits_of_paths
from caption_ray.data.locations import Location, WebAddress
from caption_ray.data.sources import Record, Split

MOST_FILES = 50
"""JSON files that are looked into: data sets with one file for each picture have millions."""

ADDRESSES = ("coco_url", "vizwiz_url", "url", "flickr_url")
"""Fields of an image that have its address, the best first."""


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures of these files, by the splits that their names name."""
    files = source.names(r".*\.json")
    if len(files) > MOST_FILES:
        raise Unfit(f"{len(files)} JSON files, of which none is known; give one as --source")
    found: dict[str, Split] = {}
    collector = Collector()
    for path, split in splits_of_paths(files).items():
        data = storage.read_bytes(files[path])
        dataset = json_entries.parse_text(path, data)
        if not isinstance(dataset, dict):
            continue
        is_coco = {"images", "annotations"} <= set(dataset)
        if not is_coco and not _is_textcaps(dataset):
            continue
        if split is None:
            raise Unfit(f"{path} names no split, beside others that do; give one as --source")
        if is_coco:
            if split in found:
                raise Unfit(f"{path} and another file have captions of the split {split}; give one "
                            "as --source")  # fmt: skip
            found[split] = _read_coco(source, split, path, data, options.hosts or ())
        else:
            _read_textcaps(collector, split, path, dataset)

    def locate(split: str, names: Sequence[str]) -> Sequence[Location | None]:
        # TextCaps' pictures for validation are in the folder train, as its paths say
        return locate_pictures(source.folder, None, names, is_ours=True)

    return {**found, **collector.splits(locate)} or None


def _is_textcaps(dataset: Mapping[str, Any]) -> bool:
    entries = dataset.get("data")
    return bool(isinstance(entries, list) and entries and isinstance(entries[0], dict)
                and "image_id" in entries[0] and "image_path" in entries[0])  # fmt: skip


def _read_coco(source: Source, split: str, path: str, data: bytes, hosts: tuple[str, ...]) -> Split:
    with tempfile.TemporaryDirectory(prefix="annotations-") as folder:
        copy = Path(folder, re.sub(r"\W", "_", path))
        copy.write_bytes(data)
        captions = coco.read_captions(copy)
    images = sorted(captions.images, key=lambda image: image.image_id)
    names = [image.file_name for image in images]
    locations: Sequence[Location | None] = []
    try:
        if names:
            locations = locate_pictures(source.folder, split, names, is_ours=True)
    except ValueError:
        addresses = _addresses(json_entries.parse_text(path, data))
        if not all(image.image_id in addresses for image in images):
            raise
        locations = [WebAddress(addresses[image.image_id], hosts) for image in images]
    records = [Record(*pair) for pair in zip(images, locations, strict=True)]
    return Split(records, captions.left_out)


def _addresses(dataset: Mapping[str, Any]) -> dict[int, str]:
    found = {}
    for image in dataset["images"]:
        address = next((image[name] for name in ADDRESSES if image.get(name)), None)
        if isinstance(address, str) and address.startswith(("http://", "https://")):
            found[image["id"]] = address
    return found


def _read_textcaps(collector: Collector, split: str, path: str, dataset: Mapping[str, Any]) -> None:
    seen = set()
    for i, entry in enumerate(json_entries.entries(path, dataset, "data")):
        where = f"{path}: data[{i}]"
        json_entries.check(where, entry, {"image_id": str, "image_path": str})
        name = checked_name(entry["image_path"], where)
        references = entry.get("reference_strs")
        if isinstance(references, list) and references:
            if name in seen:
                continue  # every entry of a picture has all of its captions
            seen.add(name)
            collector.add(split, name, references, where)
        elif entry.get("caption_str") is not None:
            collector.add(split, name, [entry["caption_str"]], where)
        else:
            collector.add(split, name, [], where)
