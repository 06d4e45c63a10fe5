from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from caption_ray.data import shapes
from caption_ray.data.judge import judge

SWAPS = {"left": "right", "right": "left", "above": "below", "below": "above"}


def objects(scene: shapes.Scene) -> list[dict[str, Any]]:
    return [
        {"category": figure.name, "bbox": [number / shapes.SIZE for number in figure.bbox]}
        for figure in scene.figures
    ]


def scenes(split: str, count: int) -> Iterator[shapes.Scene]:
    for image_id in range(1, count + 1):
        yield shapes.scene(split, image_id, seed=7)


def captioned(count: int) -> Iterator[tuple[shapes.Scene, str]]:
    for split in shapes.SPLITS:
        for scene in scenes(split, count):
            for caption in shapes.captions(scene, np.random.default_rng(scene.image_id)):
                yield scene, caption


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, num_train=30, num_val=10, seed=3)
    return folder


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    written: Path, tmp_path: Path
) -> None:
    shapes.write(tmp_path / "again", num_train=30, num_val=10, seed=3)
    shapes.write(tmp_path / "other", num_train=30, num_val=10, seed=4)
    first, again, other = map(digests, (written, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_a_larger_set_begins_with_the_smaller_one(written: Path, tmp_path: Path) -> None:
    shapes.write(tmp_path, num_train=35, num_val=12, seed=3)
    small, large = digests(written), digests(tmp_path)
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 40
    assert all(small[name] == large[name] for name in pictures)


def test_five_captions_are_different_true_and_complete() -> None:
    for split in shapes.SPLITS:
        for scene in scenes(split, 400):
            captions = shapes.captions(scene, np.random.default_rng(scene.image_id))
            assert len(set(captions)) == 5
            for caption in captions:
                assert judge(caption, objects(scene)) == (True, True, ""), caption


def test_captions_are_short_and_their_vocabulary_small() -> None:
    lengths = [len(caption.split()) for _, caption in captioned(400)]
    words = {word for _, caption in captioned(400) for word in caption.split()}
    assert max(lengths) <= 38
    assert 10 <= sum(lengths) / len(lengths) <= 16
    assert len(words) <= 60


def test_every_phrase_but_those_against_the_order_is_used() -> None:
    text = "\n".join(caption for _, caption in captioned(400))
    backwards = {phrase for phrase, direction in shapes.LINKS.items() if direction == (-1, 0)}
    for phrase in {*shapes.LINKS, *shapes.POSITIONS, *shapes.OPENINGS, " and "} - backwards:
        assert phrase in text


@pytest.mark.parametrize("words", [list(shapes.COLOURS), list(shapes.SHAPES), list(shapes.RADII)])
def test_another_colour_shape_or_size_is_judged_false(words: list[str]) -> None:
    for scene, caption in captioned(60):
        names = {figure.name for figure in scene.figures}
        for match in re.finditer("|".join(words), caption):
            for word in set(words) - {match.group()}:
                mutated = caption[: match.start()] + word + caption[match.end() :]
                judgement = judge(mutated, objects(scene))
                said = re.findall(r"(?:small|large) \w+ \w+", mutated)
                assert not judgement.true or set(said) == names
                assert not (judgement.true and judgement.complete), mutated


def test_another_direction_is_judged_false() -> None:
    for scene, caption in captioned(150):
        for match in re.finditer("|".join(SWAPS), caption):
            mutated = caption[: match.start()] + SWAPS[match.group()] + caption[match.end() :]
            assert not judge(mutated, objects(scene)).true, mutated


def test_another_position_is_judged_false() -> None:
    for scene, caption in captioned(100):
        for phrase in shapes.POSITIONS:
            if phrase in caption:
                for other in shapes.POSITIONS.keys() - {phrase}:
                    mutated = caption.replace(phrase, other, 1)
                    assert not judge(mutated, objects(scene)).true, mutated


def test_a_dropped_object_is_judged_incomplete_but_true() -> None:
    scene = next(scene for scene in scenes("train", 100) if len(scene.figures) == 3)
    first, second, third = scene.figures
    caption = f"a {first.name} and a {third.name}"
    assert judge(caption, objects(scene)) == (
        True,
        False,
        f"the {second.name} is not named",
    )


def test_an_object_named_twice_is_judged_false() -> None:
    scene = next(scenes("train", 1))
    name = scene.figures[0].name
    judgement = judge(f"a {name} and a {name}", objects(scene))
    assert not judgement.true
    assert "no (further)" in judgement.reason


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "large red circle",
        "a red circle",
        "a large red circle and",
        "a large red circle a small blue star",
        "a large red circles",
        "a large red circle left of",
        "a large red circle and a small blue star extra",
        "there is there is a large red circle",
        "and a large red circle",
        "a large red circle in the lower left in the lower left",
        "we see",
    ],
)
def test_a_caption_outside_the_grammar_is_judged_false(caption: str) -> None:
    things = [
        {"category": "large red circle", "bbox": [0.0, 0.4, 0.3, 0.3]},
        {"category": "small blue star", "bbox": [0.7, 0.4, 0.2, 0.2]},
    ]
    assert judge("a large red circle left of a small blue star", things) == (True, True, "")
    judgement = judge(caption, things)
    assert not judgement.true
    assert "grammar" in judgement.reason


def test_a_diagonal_relation_holds_only_along_its_longer_side() -> None:
    things = [
        {"category": "small red circle", "bbox": [0.1, 0.1, 0.2, 0.2]},
        {"category": "small blue star", "bbox": [0.6, 0.5, 0.2, 0.2]},
    ]
    assert judge("a small blue star right of a small red circle", things).true
    assert not judge("a small blue star below a small red circle", things).true


def test_held_out_kinds_are_in_every_validation_scene_and_no_training_scene() -> None:
    def kinds(scene: shapes.Scene) -> set[tuple[str, str, str]]:
        return {(figure.size, figure.colour, figure.shape) for figure in scene.figures}

    seen = set().union(*(kinds(scene) for scene in scenes("train", 1000)))
    every = set(itertools.product(shapes.RADII, shapes.COLOURS, shapes.SHAPES))
    assert seen == every - set(shapes.HELD_OUT)
    # their parts are known two by two, so that they can be put together
    for size, colour, shape in shapes.HELD_OUT:
        assert any(kind[1:] == (colour, shape) for kind in seen)
        assert any(kind[:2] == (size, colour) for kind in seen)
        assert any(kind[::2] == (size, shape) for kind in seen)
    novel = [kinds(scene) & set(shapes.HELD_OUT) for scene in scenes("val", 300)]
    assert all(novel) and set().union(*novel) == set(shapes.HELD_OUT)


def test_boxes_bound_what_is_drawn() -> None:
    for scene in scenes("train", 60):
        empty = dataclasses.replace(scene, figures=())
        for figure in scene.figures:
            alone = dataclasses.replace(scene, figures=(figure,))
            changed = np.any(np.asarray(shapes.draw(alone)) != np.asarray(shapes.draw(empty)), 2)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            x, y, width, height = figure.bbox
            drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.subtract(drawn, [x, y, x + width, y + height])).max() <= 1.6, figure


def test_figures_of_a_scene_do_not_touch() -> None:
    for scene in scenes("val", 100):
        empty = dataclasses.replace(scene, figures=())
        ground = np.asarray(shapes.draw(empty))
        touched = np.zeros(ground.shape[:2], int)
        for figure in scene.figures:
            alone = dataclasses.replace(scene, figures=(figure,))
            touched += np.any(np.asarray(shapes.draw(alone)) != ground, 2)
        assert touched.max() == 1


def test_figures_stand_out_from_their_background() -> None:
    for scene in scenes("train", 100):
        ground = np.asarray(shapes.draw(dataclasses.replace(scene, figures=())), float)
        for figure in scene.figures:
            distance = np.abs(ground - np.asarray(figure.rgb)).max(2)
            assert distance.min() > 60, figure


def test_written_folder_is_a_coco_layout(written: Path) -> None:
    for split, count in (("train", 30), ("val", 10)):
        captions = COCO(written / "annotations" / f"captions_{split}.json")
        instances = COCO(written / "annotations" / f"instances_{split}.json")
        assert len(captions.getImgIds()) == len(list((written / split).iterdir())) == count
        for image in captions.loadImgs(captions.getImgIds()):
            with Image.open(written / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.format == "JPEG"
            found = instances.loadAnns(instances.getAnnIds(imgIds=image["id"]))
            things = [
                {
                    "category": instances.loadCats(thing["category_id"])[0]["name"],
                    "bbox": [number / image["width"] for number in thing["bbox"]],
                }
                for thing in found
            ]
            texts = [it["caption"] for it in captions.loadAnns(captions.getAnnIds(image["id"]))]
            assert len(texts) == 5
            for text in texts:
                assert judge(text, things) == (True, True, "")


def test_image_ids_of_the_splits_are_disjoint(written: Path) -> None:
    ids = [
        set(COCO(written / "annotations" / f"captions_{split}.json").getImgIds())
        for split in shapes.SPLITS
    ]
    assert not ids[0] & ids[1]


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val: 0 scenes"):
        shapes.write(tmp_path, num_train=1, num_val=0, seed=0)
    with pytest.raises(ValueError, match="'test'"):
        shapes.scene("test", 1, 0)
