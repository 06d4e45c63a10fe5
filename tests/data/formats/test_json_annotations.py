"""Karpathy's JSON, NoCaps, VizWiz and TextCaps, each in its documented form, with real pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from captioned import Photo, captions_of, pictures_of, reasons_of

from caption_ray.config import SourceConfig
from caption_ray.data.formats import find_splits
from caption_ray.data.locations import WebAddress


def put(folder: Path, photos: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / photo.name).write_bytes(photo.data)


def karpathy(photos: Sequence[Photo], name: str, **more: Any) -> dict[str, Any]:
    splits = ("train", "restval", "val", "test")
    images = [
        {"filename": photo.name, "imgid": i, "split": splits[i % 4], "sentids": [], **more,
         "sentences": [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": j}
                       for j, text in enumerate(photo.captions)]}
        for i, photo in enumerate(photos)
    ]  # fmt: skip
    return {"dataset": name, "images": images}


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k"])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_karpathys_flickr_is_a_data_set_of_its_own(
    photos: list[Photo], tmp_path: Path, name: str, is_zipped: bool
) -> None:
    put(tmp_path / "pictures", photos)
    if is_zipped:
        shutil.make_archive(str(tmp_path / "any"), "zip", tmp_path, "pictures")
        shutil.rmtree(tmp_path / "pictures")
    path = tmp_path / f"dataset_{name}.json"
    path.write_text(json.dumps(karpathy(photos, name)))
    for source in (tmp_path, path):
        found = find_splits(str(source))
        assert captions_of(found) == {
            "train": {p.name: p.captions for i, p in enumerate(photos) if i % 4 < 2},
            "val": {p.name: p.captions for p in photos[2::4]},
            "test": {p.name: p.captions for p in photos[3::4]},
        }
        assert pictures_of(found["val"]) == [photo.data for photo in photos[2::4]]


def test_karpathys_coco_names_folders_of_other_splits(photos: list[Photo], tmp_path: Path) -> None:
    """restval is trained on, and lies in val2014: in a folder, and in a zip."""
    put(tmp_path / "val2014", photos)
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps(karpathy(photos, "coco", filepath="val2014", cocoid=1)))
    found = find_splits(str(tmp_path))
    folders = {split: pictures_of(content) for split, content in found.items()}
    assert len(folders["train"]) == 6
    shutil.make_archive(str(tmp_path / "val2014"), "zip", tmp_path, "val2014")
    shutil.rmtree(tmp_path / "val2014")
    zipped = find_splits(str(tmp_path))
    for split, pictures in folders.items():
        assert pictures_of(zipped[split]) == pictures
        assert all(isinstance(picture, bytes) for picture in pictures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": "other"},
            r"images\[0\]: split is 'other', not one of train, restval, val",
        ),
        ({"filename": "../a.jpg"}, r"images\[0\]: '\.\./a\.jpg' is no path below the pictures"),
        ({"filename": 3}, r"images\[0\]: filename is 3, not of type str"),
        ({"sentences": None}, r"images\[0\]: sentences is None, not of type list"),
    ],
)
def test_karpathys_file_is_refused_where_it_cannot_be_meant(
    photos: list[Photo], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    put(tmp_path, photos)
    dataset = karpathy(photos, "flickr8k")
    dataset["images"][0] |= change
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=message):
        find_splits(str(tmp_path))


def test_sentences_that_cannot_be_used_are_left_out(photos: list[Photo], tmp_path: Path) -> None:
    put(tmp_path, photos)
    dataset = karpathy(photos, "flickr8k")
    dataset["images"][0]["sentences"] = [{"tokens": ["a"]}, {"raw": "..."}, {"raw": "a dog"}]
    dataset["images"][1]["sentences"] = []
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(dataset))
    train = find_splits(str(tmp_path))["train"]
    assert train.records[0].picture.captions == ["a dog"]
    assert reasons_of(train) == {
        "no captions": 1, "caption that is no text": 1, "caption without a word": 1
    }  # fmt: skip


def nocaps(photos: Sequence[Photo], **more: Any) -> str:
    images = [
        {"id": i, "file_name": photo.name, "coco_url": f"https://s3.amazonaws.com/n/{photo.name}",
         "width": 640, "height": 480, "open_images_id": "x", "domain": "in-domain"}
        for i, photo in enumerate(photos)
    ]  # fmt: skip
    annotations = [
        {"image_id": i, "id": 5 * i + j, "caption": text, **more}
        for i, photo in enumerate(photos)
        for j, text in enumerate(photo.captions)
    ]
    return json.dumps({"images": images, "annotations": annotations, "info": {}, "licenses": []})


@pytest.mark.parametrize("has_pictures", [True, False])
def test_nocaps_beside_its_pictures_or_by_its_addresses(
    photos: list[Photo], tmp_path: Path, has_pictures: bool
) -> None:
    (tmp_path / "nocaps_val_4500_captions.json").write_text(nocaps(photos))
    if has_pictures:
        put(tmp_path / "images", photos)
    found = find_splits(str(tmp_path), splits=("val",))
    assert captions_of(found)["val"] == {photo.name: photo.captions for photo in photos}
    if has_pictures:
        assert pictures_of(found["val"]) == [photo.data for photo in photos]
    else:
        assert [record.location for record in found["val"].records] == [
            WebAddress(f"https://s3.amazonaws.com/n/{photo.name}") for photo in photos
        ]


def test_vizwiz_rejects_captions_itself(photos: list[Photo], tmp_path: Path) -> None:
    for split, part in {"train": photos[:8], "val": photos[8:]}.items():
        put(tmp_path / split, part)
        dataset = json.loads(nocaps(part, is_precanned=False, is_rejected=False))
        dataset["annotations"][0]["is_rejected"] = True
        dataset["annotations"][1]["is_precanned"] = True
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(dataset))
    # the test split has no captions
    images = {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}
    (tmp_path / "annotations" / "test.json").write_text(json.dumps(images))
    found = find_splits(str(tmp_path))
    assert found["train"].records[0].picture.captions == photos[0].captions[2:]
    assert pictures_of(found["val"]) == [photo.data for photo in photos[8:]]
    assert reasons_of(found["train"]) == {"caption that the data set itself rejects": 2}
    assert found["test"].records == [] and reasons_of(found["test"]) == {"no captions": 1}


def test_textcaps_has_an_entry_for_each_caption(photos: list[Photo], tmp_path: Path) -> None:
    for split, part in {"train": photos[:8], "val": photos[8:]}.items():
        put(tmp_path / "train_images" / "train", part)
        data = [
            {"image_id": photo.name[:-4], "image_path": f"train/{photo.name}", "caption_id": j,
             "caption_str": text, "reference_strs": photo.captions, "set_name": split}
            for photo in part
            for j, text in enumerate(photo.captions)
        ]  # fmt: skip
        content = {"dataset_type": split, "dataset_name": "textcaps", "data": data}
        (tmp_path / f"TextCaps_0.1_{split}.json").write_text(json.dumps(content))
    found = find_splits(str(tmp_path))
    assert captions_of(found) == {
        "train": {f"train/{photo.name}": photo.captions for photo in photos[:8]},
        "val": {f"train/{photo.name}": photo.captions for photo in photos[8:]},
    }
    assert pictures_of(found["val"]) == [photo.data for photo in photos[8:]]


def test_json_of_something_else_is_not_taken_for_captions(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"images": []}')
    (tmp_path / "package.json").write_text('["a"]')
    with pytest.raises(ValueError, match="no captions in a format that is known"):
        find_splits(str(tmp_path))
    with pytest.raises(ValueError, match="no captions in a format"):
        find_splits(str(tmp_path), options=SourceConfig(format="json"))
