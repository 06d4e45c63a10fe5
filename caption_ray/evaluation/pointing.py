"""The pointing game: when a word names an object, did the model attend to that object?

After Zhang et al., 1608.00507: a word is a hit if its attention peaks inside the box of an object
that it names. Boxes come from the embedded data set or from COCO's instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_ray.evaluation.naming import Names

Box = Sequence[float]
"""Left, top, right and bottom, as fractions of the picture."""


@dataclass(frozen=True)
class Pointing:
    """The result of the pointing game over many captions."""

    words: int
    """Number of words that name an object in their picture."""
    hits: int
    """How many of these have their attention's peak inside a box of that object."""
    chance: float
    """Expected number of hits if every peak were at a random place."""

    @property
    def score(self) -> float:
        """Share of words that are hits; 0 if no word names an object."""
        return self.hits / self.words if self.words else 0.0

    @property
    def chance_score(self) -> float:
        return self.chance / self.words if self.words else 0.0

    def __add__(self, other: Pointing) -> Pointing:
        return Pointing(
            self.words + other.words, self.hits + other.hits, self.chance + other.chance
        )


def point(
    words: Sequence[str],
    attention: NDArray[np.float32],
    objects: Sequence[Mapping[str, Any]],
    box: Box = (0.0, 0.0, 1.0, 1.0),
) -> Pointing:
    """Play the game with one caption. `attention` is (T, rows, columns) and covers the part `box`
    of the picture.

    `objects` are those in the shards: `category`, and `bbox` as x, y, width and height. In a name
    of several words the last one counts ("circle" in "large red circle"), singular or plural.
    """
    rows, columns = attention.shape[1:]
    left, top, right, bottom = box
    x = left + (np.arange(columns) + 0.5) / columns * (right - left)
    y = top + (np.arange(rows) + 0.5) / rows * (bottom - top)
    inside: dict[str, NDArray[np.bool_]] = {}
    for thing in objects:
        x0, y0, width, height = thing["bbox"]
        cells = np.outer((y0 <= y) & (y <= y0 + height), (x0 <= x) & (x <= x0 + width))
        category = str(thing["category"])
        inside[category] = inside.get(category, np.zeros((rows, columns), bool)) | cells
    names = Names(inside)
    total = Pointing(0, 0, 0.0)
    for place in range(len(words)):
        named = names.at_the_end(words[: place + 1])
        if named is not None:
            hit = bool(inside[named].flat[int(attention[place].argmax())])
            total += Pointing(1, int(hit), float(inside[named].mean()))
    return total
