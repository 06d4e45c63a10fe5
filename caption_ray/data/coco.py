"""COCO annotations: captions, objects and Karpathy's splits, checked.

pycocotools indexes the files. Any pictures with captions in the same JSON layout will do.

What is refused, and what is only left out: a file that cannot be read, another layout, and whatever
says which entry belongs to which picture (ids, file names) must be right, or every caption might
stand below a wrong picture: then the whole file is refused, with the entry, the field and its
value. What is said of one picture (a caption, a size, a box) concerns that picture alone: where it
is nothing that can be used, it is left out, counted with its reason, and named.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from caption_ray.data import json_entries
from caption_ray.data.sources import OddEntries, Picture, Unusable, has_word, is_inside

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's names -> ours; his `restval` is trained on, as everybody does."""


MOST_PIXELS = 2**31 - 1
"""Of a side, in a shard."""

LARGEST_FRACTION = 1e30
"""Of a side that a box may span: shards hold float32."""


@dataclass(frozen=True)
class CocoCaptions:
    """The pictures that have captions, in the order of the file, and what cannot be used."""

    images: list[Picture]
    left_out: list[Unusable]


def read_captions(captions: Path, instances: Path | None = None) -> CocoCaptions:
    """The pictures of a COCO captions file, with the objects of an instances file, if given.

    Left out are pictures without captions, captions without a picture or without a word, and what
    else the head of this module says. Objects of pictures that the captions file does not have are
    ignored. Raises ValueError naming the file and the entry where a file is refused.
    """
    odd = OddEntries()
    dataset = _read_json(captions)
    listed = list(_images(captions.name, dataset, odd))
    coco = _index(captions.name, dataset, listed)
    objects: Mapping[int, list[dict[str, Any]]] = {}
    if instances is not None:
        objects = _read_objects(instances, coco.imgs, odd)
    images, left_out = [], []
    for entry in listed:
        texts = []
        for annotation in coco.imgToAnns.get(entry["id"], []):
            where = f"{captions.name}: annotations[{annotation['id']}]"
            found = json_entries.fault(annotation, {"caption": str})
            if found is not None:
                odd.add(where + found, "caption that is no text")
            elif not has_word(annotation["caption"]):
                odd.add(
                    f"{where}: caption is {annotation['caption']!r:.80}", "caption without a word"
                )
            elif annotation.get("is_rejected") is True or annotation.get("is_precanned") is True:
                odd.add(where, "caption that the data set itself rejects")
            else:
                texts.append(annotation["caption"].strip())
        if texts:
            boxes = objects.get(entry["id"], [])
            images.append(
                Picture(
                    entry["id"], entry["file_name"], entry["width"], entry["height"], texts, boxes
                )
            )
        else:
            left_out.append(Unusable(entry["file_name"], "no captions"))
    for image_id, orphans in coco.imgToAnns.items():
        if image_id not in coco.imgs:
            reason = f"{len(orphans)} captions but no picture"
            left_out.append(Unusable(f"image {image_id}", reason))
    return CocoCaptions(images, left_out + list(odd.by_reason.values()))


def read_karpathy(path: Path) -> dict[int, str]:
    """COCO image id -> `train`, `val` or `test`, from Karpathy's `dataset_coco.json`.

    His `restval` is part of `train`. Raises ValueError naming the file if it is something else.
    """
    splits: dict[int, str] = {}
    for i, image in enumerate(json_entries.entries(path.name, _read_json(path), "images")):
        where = f"{path.name}: images[{i}]"
        json_entries.check(where, image, {"cocoid": int, "split": str})
        if image["split"] not in KARPATHY_SPLITS:
            raise ValueError(
                f"{where}: split is {image['split']!r}, not one of {', '.join(KARPATHY_SPLITS)}"
            )
        if image["cocoid"] in splits:
            raise ValueError(f"{where}: cocoid {image['cocoid']} is there twice")
        splits[image["cocoid"]] = KARPATHY_SPLITS[image["split"]]
    return splits


# Files ----------------------------------------------------------------------------------------


def _images(name: str, dataset: Any, odd: OddEntries) -> Iterator[dict[str, Any]]:
    """The images of a captions file, each once: `id`, `file_name`, `width` and `height`."""
    names: dict[int, str] = {}
    for i, image in enumerate(json_entries.entries(name, dataset, "images")):
        where = f"{name}: images[{i}]"
        json_entries.check(where, image, {"id": int, "file_name": str})
        image_id, file_name = image["id"], image["file_name"].removeprefix("./")
        if not is_inside(file_name):
            raise ValueError(
                f"{where}: file_name {image['file_name']!r:.200} is no path below the pictures; "
                "write the path below their folder"
            )
        if image_id in names:
            if names[image_id] != file_name:
                raise ValueError(
                    f"{where}: id {image_id} ({file_name}) is there twice, first for "
                    f"{names[image_id]!r}"
                )
            odd.add(f"{where}: id {image_id} ({file_name})", "picture listed again")
            continue
        names[image_id] = file_name
        sides = {}
        for side in ("width", "height"):
            sides[side] = _pixels(image.get(side))
            if sides[side] is None:
                shown = f"{where}: {side} is {image[side]!r:.80}"
                odd.add(shown, "size that is no number of pixels, taken as unknown")
        yield {
            "id": image_id,
            "file_name": file_name,
            **{side: pixels or 0 for side, pixels in sides.items()},
        }


def _pixels(value: Any) -> int | None:
    """A side of a picture, 0 if it is unknown; None for what cannot be one."""
    if value is None:
        return 0
    if type(value) is float and value.is_integer():  # as pandas writes a column with gaps
        value = int(value)
    return value if type(value) is int and 0 <= value <= MOST_PIXELS else None


def _index(name: str, dataset: Any, images: list[dict[str, Any]]) -> COCO:
    """pycocotools' index of the images and of all annotations, each of which has an `image_id`.

    Annotations get their place in the file as `id`: theirs are missing from some files, or all the
    same, and nothing refers to them.
    """
    annotations = json_entries.entries(name, dataset, "annotations")
    for i, annotation in enumerate(annotations):
        json_entries.check(f"{name}: annotations[{i}]", annotation, {"image_id": int})
        annotation["id"] = i
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco.createIndex()
    return coco


def _read_objects(
    path: Path, images: Mapping[int, dict[str, Any]], odd: OddEntries
) -> dict[int, list[dict[str, Any]]]:
    """Image id -> objects, for the images that are given."""
    dataset = _read_json(path)
    categories = {}
    for i, category in enumerate(json_entries.entries(path.name, dataset, "categories")):
        json_entries.check(f"{path.name}: categories[{i}]", category, {"id": int, "name": str})
        categories[category["id"]] = category["name"]
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in _index(path.name, dataset, []).dataset["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            continue
        where = f"{path.name}: annotations[{annotation['id']}]"
        found = json_entries.fault(annotation, {"category_id": int})
        if found is not None or annotation["category_id"] not in categories:
            found = found or f": category_id is {annotation['category_id']}"
            odd.add(where + found, "box of no known category")
        elif not image["width"] or not image["height"]:
            odd.add(where, "box in a picture of unknown size")
        elif (box := _fractions(annotation.get("bbox"), image["width"], image["height"])) is None:
            shown = f"{where}: bbox is {annotation.get('bbox')!r:.80}"
            odd.add(shown, "box that is not four numbers")
        else:
            category = categories[annotation["category_id"]]
            objects.setdefault(image["id"], []).append({"category": category, "bbox": box})
    return objects


def _fractions(bbox: Any, width: int, height: int) -> list[float] | None:
    """The box in widths and heights of the picture; None if it is not four numbers."""
    sides = (width, height, width, height)
    try:
        fractions = [number / side for number, side in zip(bbox, sides, strict=True)]
    except (TypeError, ValueError, OverflowError):
        return None
    # not true of what is no number
    return fractions if all(abs(part) < LARGEST_FRACTION for part in fractions) else None


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        return json_entries.parse(path.name, file, _without_outline)


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of an instances file: forgotten as they are read, they take no memory."""
    entry.pop("segmentation", None)
    return entry
