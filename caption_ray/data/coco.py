"""COCO annotations: captions, objects and Karpathy's splits, checked.

pycocotools indexes the files. Any pictures with captions in the same JSON layout will do.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's names -> ours; his `restval` is trained on, as everybody does."""


LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""


@dataclass(frozen=True)
class CocoImage:
    """One picture with what people said of it and, if known, what it shows."""

    image_id: int
    file_name: str
    width: int
    """In pixels; 0 if the file does not say."""
    height: int
    captions: list[str]
    objects: list[dict[str, Any]]
    """`category` and `bbox`: [x, y, width, height] as fractions of the picture."""


@dataclass(frozen=True)
class CocoCaptions:
    """The pictures that have captions, in the order of the file, and what cannot be used."""

    images: list[CocoImage]
    left_out: list[tuple[str, str]]
    """(file name, or id of an image that is not there; reason)"""


def read_captions(captions: Path, instances: Path | None = None) -> CocoCaptions:
    """The pictures of a COCO captions file, with the objects of an instances file, if given.

    Empty captions are dropped; a picture without captions, and captions without a picture, are
    left out. Objects of pictures that the captions file does not have are ignored. Raises
    ValueError naming the file and the entry where a file is not UTF-8 JSON in COCO's layout or an
    image stands in it twice.
    """
    coco = _index(captions, _read_json(captions), {"caption": str})
    objects: Mapping[int, list[dict[str, Any]]] = {}
    if instances is not None:
        objects = _read_objects(instances, coco.imgs)
    images, left_out = [], []
    for entry in coco.dataset["images"]:
        image_id, file_name = entry["id"], entry["file_name"]
        texts = [annotation["caption"].strip() for annotation in coco.imgToAnns.get(image_id, [])]
        texts = [text for text in texts if text]
        if not texts:
            left_out.append((file_name, "no captions"))
            continue
        width, height = entry.get("width") or 0, entry.get("height") or 0
        images.append(
            CocoImage(image_id, file_name, width, height, texts, objects.get(image_id, []))
        )
    for image_id, found in coco.imgToAnns.items():
        if image_id not in coco.imgs:
            left_out.append((f"image {image_id}", f"{len(found)} captions but no picture"))
    return CocoCaptions(images, left_out)


def read_karpathy(path: Path) -> dict[int, str]:
    """COCO image id -> `train`, `val` or `test`, from Karpathy's `dataset_coco.json`.

    His `restval` is part of `train`. Raises ValueError naming the file if it is something else.
    """
    splits: dict[int, str] = {}
    for i, image in enumerate(_entries(path, _read_json(path), "images")):
        where = f"{path.name}: images[{i}]"
        _check(where, image, {"cocoid": int, "split": str})
        if image["split"] not in KARPATHY_SPLITS:
            raise ValueError(
                f"{where}: split is {image['split']!r}, not one of {', '.join(KARPATHY_SPLITS)}"
            )
        if image["cocoid"] in splits:
            raise ValueError(f"{where}: cocoid {image['cocoid']} is there twice")
        splits[image["cocoid"]] = KARPATHY_SPLITS[image["split"]]
    return splits


# Reading and checking -------------------------------------------------------------------------


def _index(path: Path, dataset: Any, fields: Mapping[str, type]) -> COCO:
    """pycocotools' index of a data set, once checked; its annotations have those fields as well."""
    seen = set()
    for i, image in enumerate(_entries(path, dataset, "images")):
        where = f"{path.name}: images[{i}]"
        _check(where, image, {"id": int, "file_name": str})
        if not _is_inside(image["file_name"]):
            raise ValueError(
                f"{where}: file_name {image['file_name']!r:.200} is no path below the pictures"
            )
        for side in ("width", "height"):
            if image.get(side) is not None:
                _check(where, image, {side: int}, bits=32)
        if image["id"] in seen:
            raise ValueError(f"{where}: id {image['id']} ({image['file_name']}) is there twice")
        seen.add(image["id"])
    fields = {"id": int, "image_id": int, **fields}
    for i, annotation in enumerate(_entries(path, dataset, "annotations")):
        _check(f"{path.name}: annotations[{i}]", annotation, fields)
    coco = COCO()
    coco.dataset = {key: dataset[key] for key in ("images", "annotations")}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco.createIndex()
    return coco


def _read_objects(
    path: Path, images: Mapping[int, dict[str, Any]]
) -> dict[int, list[dict[str, Any]]]:
    """Image id -> objects, for the images that are given."""
    dataset = _read_json(path)
    coco = _index(path, dataset, {"category_id": int, "bbox": list})
    names = {}
    for i, category in enumerate(_entries(path, dataset, "categories")):
        _check(f"{path.name}: categories[{i}]", category, {"id": int, "name": str})
        names[category["id"]] = category["name"]
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in coco.dataset["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            continue
        where = f"{path.name}: annotation {annotation['id']} of image {image['id']}"
        if annotation["category_id"] not in names:
            raise ValueError(f"{where}: there is no category {annotation['category_id']}")
        if not image.get("width") or not image.get("height"):
            raise ValueError(f"{where}: the image needs a width and a height to scale its boxes")
        box = {
            "category": names[annotation["category_id"]],
            "bbox": _fractions(where, annotation["bbox"], image["width"], image["height"]),
        }
        objects.setdefault(image["id"], []).append(box)
    return objects


def _fractions(where: str, bbox: list[Any], width: int, height: int) -> list[float]:
    sides = (width, height, width, height)
    try:
        fractions = [number / side for number, side in zip(bbox, sides, strict=True)]
    except (TypeError, ValueError):
        fractions = [math.nan]
    if not all(map(math.isfinite, fractions)):
        raise ValueError(f"{where}: bbox is {bbox!r}, not four numbers")
    return fractions


def _read_json(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=_without_outline)
    except ValueError as error:
        raise ValueError(f"{path.name}: not JSON in UTF-8 ({error})") from error


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of an instances file: forgotten as they are read, they take no memory."""
    entry.pop("segmentation", None)
    return entry


def _entries(path: Path, dataset: Any, key: str) -> Iterable[Any]:
    if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
        raise ValueError(f"{path.name}: not the layout of COCO's annotations: no list {key!r}")
    entries: list[Any] = dataset[key]
    return entries


def _is_inside(file_name: str) -> bool:
    """Whether this can only be a file below the folder that it is joined to."""
    parts = file_name.replace("\\", "/").split("/")
    is_short = all(len(part.encode()) <= LONGEST_NAME for part in parts)
    return is_short and "\0" not in file_name and not {"", ".", ".."} & set(parts)


def _is_utf8(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(where: str, entry: Any, fields: Mapping[str, type], bits: int = 64) -> None:
    """Raise ValueError unless the entry is an object with these fields of these types.

    Numbers must fit in so many bits, and text in UTF-8, so that shards can hold them.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.80}, not an object")
    for name, kind in fields.items():
        if name not in entry:
            raise ValueError(f"{where} has no {name!r}: {entry!r:.200}")
        if type(entry[name]) is not kind:
            raise ValueError(f"{where}: {name} is {entry[name]!r:.80}, not of type {kind.__name__}")
        if kind is int and not -(2 ** (bits - 1)) <= entry[name] < 2 ** (bits - 1):
            raise ValueError(f"{where}: {name} is {entry[name]!r:.80}, beyond {bits} bits")
        if kind is str and not _is_utf8(entry[name]):
            raise ValueError(f"{where}: {name} is {entry[name]!r:.80}, which is not Unicode text")
