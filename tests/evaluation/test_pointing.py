"""The pointing game, on attention that is made to look somewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from caption_ray.evaluation.pointing import Pointing, point

CIRCLE = {"category": "large red circle", "bbox": [0.0, 0.0, 0.5, 0.5]}
STAR = {"category": "small blue star", "bbox": [0.5, 0.5, 0.25, 0.5]}


def looking(*cells: tuple[int, int], size: int = 4) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One word each, whose attention is highest in that cell."""
    attention = np.full((len(cells), size, size), 0.01, np.float32)
    for word, cell in enumerate(cells):
        attention[(word, *cell)] = 1
    return attention


def test_a_word_hits_if_it_looks_into_the_box_of_what_it_names() -> None:
    words = "a large red circle above a small blue star".split()
    nowhere = (3, 0)
    right = [nowhere] * 3 + [(1, 1)] + [nowhere] * 4 + [(3, 2)]
    # a quarter of the cells are the circle's, an eighth the star's
    assert point(words, looking(*right), [CIRCLE, STAR]) == Pointing(2, 2, 0.25 + 0.125)
    wrong = [nowhere] * 3 + [(3, 2)] + [nowhere] * 4 + [(1, 1)]
    assert point(words, looking(*wrong), [CIRCLE, STAR]).hits == 0


def test_any_object_of_the_name_will_do() -> None:
    dogs = [{"category": "dog", "bbox": [x, 0.0, 0.25, 0.25]} for x in (0.0, 0.75)]
    for column in (0, 3):
        assert point(["dog"], looking((0, column)), dogs) == Pointing(1, 1, 2 / 16)
    assert point(["dog"], looking((0, 1)), dogs).hits == 0


@pytest.mark.parametrize(
    ("words", "category", "counts"),
    [
        (["dogs"], "dog", True),
        (["buses"], "bus", True),
        (["teddy", "bears"], "teddy bear", True),
        (["bears"], "teddy bear", False),
        (["woman"], "person", True),
        (["table"], "dining table", True),
        (["cat"], "dog", False),
        (["circle"], "large red circle", False),
        ([], "dog", False),
    ],
)
def test_what_names_an_object(words: list[str], category: str, counts: bool) -> None:
    thing = {"category": category, "bbox": [0.0, 0.0, 1.0, 1.0]}
    attention = looking(*[(0, 0)] * len(words))
    assert point(words, attention, [thing]).words == int(counts)


def test_a_picture_cut_to_its_centre_is_compared_there() -> None:
    """The grid covers the middle half; its left column is at 0.3, not at 0.1 of the width."""
    thing = {"category": "dog", "bbox": [0.25, 0.0, 0.1, 1.0]}
    box = (0.25, 0.0, 0.75, 1.0)
    assert point(["dog"], looking((2, 0)), [thing], box).hits == 1
    assert point(["dog"], looking((2, 0)), [thing]).hits == 0


def test_attention_at_random_scores_the_chance() -> None:
    rng = np.random.default_rng(0)
    total = Pointing(0, 0, 0.0)
    for _ in range(2000):
        attention = rng.random((1, 4, 4)).astype(np.float32)
        total += point(["star"], attention, [{**STAR, "category": "star"}])
    assert total.words == 2000
    assert total.chance_score == pytest.approx(0.125)
    assert total.score == pytest.approx(0.125, abs=0.03)


def test_captions_that_name_nothing_have_no_score() -> None:
    nothing = point(["grass"], looking((0, 0)), [CIRCLE])
    assert (nothing.words, nothing.score, nothing.chance_score) == (0, 0.0, 0.0)
