from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from caption_ray.data.coco import CocoCaptions, read_captions, read_karpathy

IMAGES = [
    {"id": 7, "file_name": "seven.jpg", "width": 200, "height": 100},
    {"id": 3, "file_name": "three.jpg", "width": 50, "height": 50},
]
CAPTIONS = [
    {"id": 1, "image_id": 3, "caption": "A cat."},
    {"id": 2, "image_id": 7, "caption": " A dog runs. \n"},
    {"id": 3, "image_id": 7, "caption": "Ein Hund läuft."},
]
OBJECTS = [
    {"id": 1, "image_id": 7, "category_id": 18, "bbox": [20, 10, 100, 50], "segmentation": [[1]]},
    {"id": 2, "image_id": 99, "category_id": 18, "bbox": [0, 0, 1, 1]},
]
CATEGORIES = [{"id": 18, "name": "dog", "supercategory": "animal"}]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def captions_file(folder: Path, images: Any = IMAGES, annotations: Any = CAPTIONS) -> Path:
    return write(folder / "captions_x.json", {"images": images, "annotations": annotations})


def instances_file(folder: Path, annotations: Any, categories: Any = CATEGORIES) -> Path:
    content = {"images": IMAGES, "annotations": annotations, "categories": categories}
    return write(folder / "instances_x.json", content)


@pytest.fixture
def annotations(coco_mini: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(coco_mini / "annotations_trainval2017.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "annotations"


def read(path: Path, split: str) -> CocoCaptions:
    return read_captions(path / f"captions_{split}.json", path / f"instances_{split}.json")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_annotations_are_read_whole(annotations: Path, split: str) -> None:
    raw = json.loads((annotations / f"captions_{split}.json").read_bytes())
    boxes = json.loads((annotations / f"instances_{split}.json").read_bytes())["annotations"]
    found = read(annotations, split)
    assert found.left_out == []
    assert [image.image_id for image in found.images] == [image["id"] for image in raw["images"]]
    assert sum(len(image.captions) for image in found.images) == len(raw["annotations"])
    assert sum(len(image.objects) for image in found.images) == len(boxes)
    for image, entry in zip(found.images, raw["images"], strict=True):
        assert (image.file_name, image.width, image.height) == (
            entry["file_name"],
            entry["width"],
            entry["height"],
        )
        expected = {
            it["caption"].strip() for it in raw["annotations"] if it["image_id"] == entry["id"]
        }
        assert set(image.captions) == expected
        for thing in image.objects:
            x, y, width, height = thing["bbox"]
            assert 0 <= x <= x + width <= 1.001
            assert 0 <= y <= y + height <= 1.001


def test_nothing_is_printed(annotations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(annotations, "val2017")
    assert capsys.readouterr() == ("", "")


def test_images_come_with_their_captions_and_scaled_boxes(tmp_path: Path) -> None:
    found = read_captions(captions_file(tmp_path), instances_file(tmp_path, OBJECTS))
    seven, three = found.images
    assert (seven.image_id, seven.file_name, seven.width, seven.height) == (
        7,
        "seven.jpg",
        200,
        100,
    )
    assert seven.captions == ["A dog runs.", "Ein Hund läuft."]
    assert seven.objects == [{"category": "dog", "bbox": [0.1, 0.1, 0.5, 0.5]}]
    assert (three.captions, three.objects) == (["A cat."], [])


def test_without_instances_there_are_no_objects(tmp_path: Path) -> None:
    found = read_captions(captions_file(tmp_path))
    assert [image.objects for image in found.images] == [[], []]


def test_what_has_no_counterpart_is_left_out_with_the_reason(tmp_path: Path) -> None:
    texts = [
        {"id": 1, "image_id": 7, "caption": "A dog."},
        {"id": 2, "image_id": 7, "caption": "  \n"},
        {"id": 3, "image_id": 3, "caption": ""},
        {"id": 4, "image_id": 42, "caption": "Nothing to see."},
        {"id": 5, "image_id": 42, "caption": "Indeed."},
    ]
    found = read_captions(captions_file(tmp_path, annotations=texts))
    assert [(image.image_id, image.captions) for image in found.images] == [(7, ["A dog."])]
    assert found.left_out == [
        ("three.jpg", "no captions", 1),
        ("image 42", "2 captions but no picture", 1),
        (r"captions_x.json: annotations[1]: caption is '  \n'", "caption without a word", 2),
    ]


ODD_CAPTIONS = [None, ["A cat."], 5, True, {"raw": "A cat."}]


@pytest.mark.parametrize("odd", ODD_CAPTIONS, ids=repr)
def test_a_caption_that_is_no_text_costs_that_caption_alone(tmp_path: Path, odd: Any) -> None:
    texts = [*CAPTIONS, {"id": 4, "image_id": 7, "caption": odd}, {"id": 5, "image_id": 7}]
    found = read_captions(captions_file(tmp_path, annotations=texts))
    assert [image.captions for image in found.images] == [
        ["A dog runs.", "Ein Hund läuft."],
        ["A cat."],
    ]
    ((name, reason, entries),) = found.left_out
    assert name.startswith("captions_x.json: annotations[3]: caption is ") and repr(odd) in name
    assert (reason, entries) == ("caption that is no text", 2)


@pytest.mark.parametrize("text", ["", " \n\t", "...", "-- , .", "“ ”", "\u200b"])
def test_marks_alone_are_no_caption(tmp_path: Path, text: str) -> None:
    texts = [*CAPTIONS, {"id": 4, "image_id": 3, "caption": text}]
    found = read_captions(captions_file(tmp_path, annotations=texts))
    assert [image.captions for image in found.images][1] == ["A cat."]
    ((name, reason, entries),) = found.left_out
    assert name == f"captions_x.json: annotations[3]: caption is {text!r}"
    assert (reason, entries) == ("caption without a word", 1)


@pytest.mark.parametrize("text", ["7", "é", "狗", "!!", "&", "A"])
def test_whatever_the_tokenizer_calls_a_word_makes_a_caption(tmp_path: Path, text: str) -> None:
    texts = [{"id": 1, "image_id": 3, "caption": text}]
    found = read_captions(captions_file(tmp_path, annotations=texts))
    assert [image.captions for image in found.images] == [[text]]


@pytest.mark.parametrize("ids", [[], [0, 0, 0], [None, "a", 1.5]], ids=str)
def test_the_ids_of_annotations_mean_nothing(tmp_path: Path, ids: list[Any]) -> None:
    texts = [{key: one[key] for key in ("image_id", "caption")} for one in CAPTIONS]
    for text, annotation_id in zip(texts, ids, strict=False):
        text["id"] = annotation_id
    assert read_captions(captions_file(tmp_path, annotations=texts)) == read_captions(
        captions_file(tmp_path)
    )


def test_a_picture_that_is_listed_again_is_one_picture(tmp_path: Path) -> None:
    path = captions_file(tmp_path, images=[*IMAGES, {**IMAGES[0], "width": 1}])
    found = read_captions(path)
    assert found.images == read_captions(captions_file(tmp_path)).images
    assert [(reason, entries) for _, reason, entries in found.left_out] == [
        ("picture listed again", 1)
    ]


def test_the_size_of_a_picture_may_be_missing(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "seven.jpg"}]
    path = captions_file(tmp_path, images=images)
    assert [(image.width, image.height) for image in read_captions(path).images] == [(0, 0)]
    found = read_captions(path, instances_file(tmp_path, OBJECTS))
    assert found.images[0].objects == []
    assert found.left_out[-1] == (
        "instances_x.json: annotations[0]",
        "box in a picture of unknown size",
        1,
    )


@pytest.mark.parametrize(
    ("width", "pixels"), [(64.0, 64), (64, 64), (None, 0), (0, 0), (1e3, 1000)]
)
def test_a_whole_number_is_a_width_however_it_is_written(
    tmp_path: Path, width: Any, pixels: int
) -> None:
    found = read_captions(captions_file(tmp_path, images=[{**IMAGES[0], "width": width}]))
    assert [image.width for image in found.images] == [pixels]
    assert "size" not in str(found.left_out)


@pytest.mark.parametrize("width", [-1, 64.5, "64", True, [64], 2**31, float("nan"), float("inf")])
def test_a_size_that_cannot_be_is_unknown(tmp_path: Path, width: Any) -> None:
    found = read_captions(
        captions_file(tmp_path, images=[{**IMAGES[0], "width": width}, IMAGES[1]])
    )
    assert [image.width for image in found.images] == [0, 50]
    assert found.left_out[-1] == (
        f"captions_x.json: images[0]: width is {width!r}",
        "size that is no number of pixels, taken as unknown",
        1,
    )


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = captions_file(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_captions(path).images) == 2


@pytest.mark.parametrize(
    "data", [b"", b"{", b"<html></html>", b"\xff\xfe\x00", '{"caption": "é"}'.encode("latin-1")]
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "captions_x.json"
    path.write_bytes(data)
    for function in (read_captions, read_karpathy):
        with pytest.raises(ValueError, match=r"^captions_x.json: not JSON in UTF-8"):
            function(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no list 'images'"),
        ({"annotations": []}, "no list 'images'"),
        ({"images": [], "annotations": {}}, "no list 'annotations'"),
        ({"images": [5], "annotations": []}, r"images\[0\] is 5, not an object"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no 'file_name'"),
        (
            {"images": [{"id": "1", "file_name": "a"}], "annotations": []},
            r"images\[0\]: id is '1', not of type int",
        ),
        (
            {"images": [{"id": True, "file_name": "a"}], "annotations": []},
            r"images\[0\]: id is True, not of type int",
        ),
        (
            {"images": [{"id": 1, "file_name": None}], "annotations": []},
            r"images\[0\]: file_name is None, not of type str",
        ),
        (
            {"images": [*IMAGES, {"id": 7, "file_name": "again.jpg"}], "annotations": []},
            r"images\[2\]: id 7 \(again.jpg\) is there twice",
        ),
        (
            {"images": IMAGES, "annotations": [*CAPTIONS, "A dog."]},
            r"annotations\[3\] is 'A dog.', not an object",
        ),
        (
            {"images": IMAGES, "annotations": [{"image_id": "7", "caption": "A dog."}]},
            r"annotations\[0\]: image_id is '7', not of type int",
        ),
        (
            {"images": IMAGES, "annotations": [{"id": 4, "caption": "A dog."}]},
            r"annotations\[0\] has no 'image_id'",
        ),
    ],
)
def test_captions_that_break_the_layout_are_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^captions_x.json: .*{message}"):
        read_captions(write(tmp_path / "captions_x.json", content))


@pytest.mark.parametrize(
    ("change", "place", "reason"),
    [
        ({"category_id": 5}, ": category_id is 5", "box of no known category"),
        ({"category_id": "18"}, ": category_id is '18', not of", "box of no known category"),
        ({"bbox": [1, 2, 3]}, ": bbox is [1, 2, 3]", "box that is not four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, ": bbox is", "box that is not four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, ": bbox is", "box that is not four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, ": bbox is", "box that is not four numbers"),
        ({"bbox": [1, 2, 3, 1e300]}, ": bbox is", "box that is not four numbers"),
        ({"bbox": None}, ": bbox is None", "box that is not four numbers"),
    ],
)  # fmt: skip
def test_a_box_that_cannot_be_used_costs_that_box_alone(
    tmp_path: Path, change: dict[str, Any], place: str, reason: str
) -> None:
    instances = instances_file(tmp_path, [{**OBJECTS[0], **change}, *OBJECTS])
    found = read_captions(captions_file(tmp_path), instances)
    assert [len(image.objects) for image in found.images] == [1, 0]
    ((name, why, entries),) = found.left_out
    assert name.startswith(f"instances_x.json: annotations[0]{place}")
    assert (why, entries) == (reason, 1)


def test_objects_need_categories(tmp_path: Path) -> None:
    for categories, message in ((None, "no list 'categories'"), ([{"id": 18}], "has no 'name'")):
        with pytest.raises(ValueError, match=f"^instances_x.json: .*{message}"):
            read_captions(
                captions_file(tmp_path), instances_file(tmp_path, OBJECTS, categories=categories)
            )


# Karpathy's splits


def karpathy_file(folder: Path, *images: Any) -> Path:
    return write(folder / "dataset_coco.json", {"dataset": "coco", "images": images})


def test_karpathys_restval_is_trained_on(tmp_path: Path) -> None:
    names = ["train", "restval", "val", "test"]
    path = karpathy_file(
        tmp_path,
        *({"cocoid": i, "split": name, "filename": "a.jpg"} for i, name in enumerate(names)),
    )
    assert read_karpathy(path) == {0: "train", 1: "train", 2: "val", 3: "test"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"split": "train"}], r"images\[0\] has no 'cocoid'"),
        ([{"cocoid": "1", "split": "train"}], "cocoid is '1', not of type int"),
        ([{"cocoid": 1, "split": "dev"}], "split is 'dev', not one of train, restval, val, test"),
        ([{"cocoid": 1, "split": "val"}] * 2, r"images\[1\]: cocoid 1 is there twice"),
    ],
)
def test_what_is_not_karpathys_file_is_refused(
    tmp_path: Path, images: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^dataset_coco.json: .*{message}"):
        read_karpathy(karpathy_file(tmp_path, *images))
    with pytest.raises(ValueError, match=r"^other.json: .*no list 'images'"):
        read_karpathy(write(tmp_path / "other.json", {"dataset": "coco"}))
