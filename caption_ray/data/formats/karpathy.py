"""Karpathy's `dataset_coco.json`, `dataset_flickr8k.json` and `dataset_flickr30k.json` as
annotations in their own right, beside their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import json_entries
from caption_ray.data.coco import KARPATHY_SPLITS
from caption_ray.data.formats.collecting import Collector, checked_name
from caption_ray.data.formats.pictures import locate_pictures
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.locations import Location
from caption_ray.data.sources import Split

FILES = r"dataset_.*\.json"

CAPTION = "raw"
"""The field of a sentence that has it as it was written; its tokens are another field."""


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures of the one file of this kind, by its splits; `restval` is trained on."""
    files = source.names(r".*\.json" if options.format == "karpathy" else FILES)
    if not files:
        return None
    if len(files) > 1:
        raise Unfit(f"there are {', '.join(files)}: give one of them as --source")
    ((path, uri),) = files.items()
    dataset = json_entries.parse_text(path, storage.read_bytes(uri))
    collector = Collector()
    for i, image in enumerate(json_entries.entries(path, dataset, "images")):
        where = f"{path}: images[{i}]"
        json_entries.check(where, image, {"filename": str, "split": str, "sentences": list})
        if image["split"] not in KARPATHY_SPLITS:
            raise ValueError(
                f"{where}: split is {image['split']!r}, not one of {', '.join(KARPATHY_SPLITS)}"
            )
        folder = image.get("filepath") or ""
        name = checked_name(f"{folder}/{image['filename']}".lstrip("/"), where)
        collector.add(KARPATHY_SPLITS[image["split"]], name, map(_text, image["sentences"]), where)

    def locate(split: str, names: Sequence[str]) -> Sequence[Location | None]:
        return locate_pictures(source.folder, None, names, is_ours=True)  # restval is in val2014/

    return collector.splits(locate)


def _text(sentence: Any) -> Any:
    return sentence.get(CAPTION) if isinstance(sentence, dict) else sentence
