"""Kinds of failure, parroting, and whether a captioner knows when it is wrong."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption_ray.data.tokenizer import PTB
from caption_ray.evaluation import calibration, failures
from caption_ray.evaluation.naming import CATEGORIES


def record(
    caption: str, references: list[str], cider: float = 0.0, objects: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "caption": caption,
        "references": references,
        "objects": [{"category": name, "bbox": [0, 0, 1, 1]} for name in objects],
        "scores": {"CIDEr-D": cider},
        "log_prob": -1.0,
    }


DOG = ["A dog runs over the grass.", "A brown puppy on a meadow", "The dog is running"]


@pytest.mark.parametrize(
    ("caption", "references", "objects", "kind"),
    [
        ("A cat runs over the grass", DOG, (), "object"),
        ("A cat runs over the grass", DOG, ("cat",), None),
        ("A puppy runs over the grass", DOG, (), None),
        ("Dogs run over the grass", DOG, (), None),
        ("A dog with a tennis racket", DOG, (), "object"),
        ("Two dogs run over the grass", DOG, (), "count"),
        ("Two dogs", ["two dogs play", "dogs play"], (), None),
        ("Three dogs", ["two dogs play", "dogs play"], (), "count"),
        ("A couple of dogs", ["two dogs play", "dogs play"], (), None),
        ("A dog behind the grass", DOG, (), "relation"),
        ("A dog on the grass", DOG, (), None),
        ("A large red circle left of a blob", ["a red circle right of a blob"], (), "relation"),
        ("A unicorn", ["A horse"], ("unicorn",), None),
    ],
)
def test_a_failure_is_found_by_what_others_say(
    caption: str, references: list[str], objects: tuple[str, ...], kind: str | None
) -> None:
    found = failures.kinds([record(caption, references, objects=objects)], PTB)
    assert [name for name, chosen in found.items() if chosen] == ([kind] if kind else [])


def test_the_same_caption_for_several_pictures_is_generic() -> None:
    same = [record("A man is standing", ["a man stands there"], 0.1 * i) for i in range(3)]
    found = failures.kinds([*same, record("A man runs", ["a man runs"])], PTB)
    assert found["generic"] == same and sum(map(len, found.values())) == 3


def test_each_caption_is_shown_once_and_the_worst_first() -> None:
    both = record("Two cats behind a tree", DOG, 0.5)
    worse = record("A cat", DOG, 0.1)
    found = failures.kinds([both, worse], PTB)
    assert found["object"] == [worse, both]
    assert found["count"] == found["relation"] == []
    assert failures.shown(found, 1) == {failures.KINDS["object"]: [worse]}


def test_categories_are_cocos() -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 80


def test_the_nearest_training_caption_is_found_however_it_is_written() -> None:
    training = ["A dog runs.", "Two cats sit on a mat", "a man with a hat", ""]
    captions = ["a dog runs", "cats sit on a sofa", "", "zebra"]
    known = {tuple(PTB.scored(text)): text for text in training}
    found = failures.nearest([PTB.scored(text) for text in captions], known)
    assert found[0] == ("A dog runs.", 1.0)
    words, pairs = {"cats", "sit", "on", "a"}, {("cats", "sit"), ("sit", "on"), ("on", "a")}
    theirs = {*"two cats sit on a mat".split()}
    expected = 2 * (len(words) + len(pairs)) / ((5 + 4) + (len(theirs) + 5))
    assert found[1] == ("Two cats sit on a mat", pytest.approx(expected))
    assert found[2:] == [("", 0.0), ("", 0.0)]


# Calibration ----------------------------------------------------------------------------------


def scored(count: int, score: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for words in rng.integers(3, 12, count):
        confidence = -rng.uniform(0.2, 2.0)
        records.append(
            {
                "caption": " ".join(["word"] * words),
                "log_prob": confidence * (words + 1),
                "scores": {"CIDEr-D": score(confidence, rng)},
            }
        )
    return records


@pytest.mark.parametrize(
    ("score", "low", "high"),
    [
        (lambda confidence, rng: np.exp(confidence), 0.9999, 1.0001),
        (lambda confidence, rng: -confidence, -1.0001, -0.9999),
        (lambda confidence, rng: rng.uniform(), -0.2, 0.2),
        (lambda confidence, rng: float(confidence > -1), 0.8, 0.9),  # half of them share a score
    ],
)
def test_rank_correlation_says_how_far_probability_foretells_the_score(
    score: Any, low: float, high: float
) -> None:
    found = calibration.calibration(scored(400, score))
    assert found is not None and low < found.correlation < high
    assert (np.diff(found.confidence) > 0).all() and len(found.score) == calibration.BINS
    picture = Image.open(io.BytesIO(calibration.draw(found)))
    assert picture.size == (960, 540)


@pytest.mark.parametrize(
    "records",
    [[], scored(19, lambda confidence, rng: confidence), scored(50, lambda confidence, rng: 0.0)],
    ids=["none", "few", "all alike"],
)
def test_without_differences_there_is_no_calibration(records: list[dict[str, Any]]) -> None:
    assert calibration.calibration(records) is None
