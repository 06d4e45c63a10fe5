"""Checks captions of drawn scenes, statement by statement (see shapes.py for their grammar)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from caption_ray.data.shapes import COLOURS, LINKS, OPENINGS, POSITIONS, RADII, SHAPES


class Judgement(NamedTuple):
    """What is to be said of a caption, and why."""

    true: bool
    """Whether the caption follows the grammar and every statement in it holds."""

    complete: bool
    """Whether every object is named."""

    reason: str
    """The first thing wrong; empty if nothing is."""


def _one_of(phrases: Sequence[str]) -> str:
    return "|".join(sorted(phrases, key=len, reverse=True))


_FIGURE = (
    rf"a (?P<name>(?:{_one_of(list(RADII))}) (?:{_one_of(list(COLOURS))}) (?:{_one_of(SHAPES)}))"
    rf"(?: (?P<position>{_one_of(list(POSITIONS))}))?(?: |$)"
)
_OPENING = re.compile(rf"(?:{_one_of(OPENINGS)}) ")
_FIRST = re.compile(_FIGURE)
_NEXT = re.compile(rf"(?P<link>{_one_of([*LINKS, 'and'])}) {_FIGURE}")


def judge(caption: str, objects: Sequence[Mapping[str, Any]]) -> Judgement:
    """Check a caption, statement by statement, against the objects of its picture.

    Args:
        caption: words separated by spaces; case does not count, nor a full stop at the end.
        objects: each with `category` ("large red circle") and `bbox`, [x, y, width, height] as
            fractions of the picture; as the shards hold them.

    A figure is "left of" another if its centre is, by more than the centres differ in height; the
    other relations likewise. It is "in the upper left" if its centre is in that quarter.
    """
    text = " ".join(caption.lower().removesuffix(".").split())
    centres: dict[str, list[tuple[float, float]]] = {}
    for thing in objects:
        x, y, width, height = thing["bbox"]
        centres.setdefault(str(thing["category"]), []).append((x + width / 2, y + height / 2))

    problems: list[str] = []
    opening = _OPENING.match(text)
    at = opening.end() if opening else 0
    pattern, before = _FIRST, None
    while pattern is _FIRST or at < len(text):
        statement = pattern.match(text, at)
        if statement is None:
            problems.append(f"does not follow the grammar at {text[at:]!r}")
            break
        found, at = statement.groupdict(), statement.end()
        if not centres.get(found["name"]):
            problems.append(f"there is no (further) {found['name']}")
            break
        here = centres[found["name"]].pop(0)
        if found["position"] and tuple(int(2 * c) for c in here) != POSITIONS[found["position"]]:
            problems.append(f"the {found['name']} is not {found['position']}")
        if before and found["link"] in LINKS and not _holds(LINKS[found["link"]], before, here):
            problems.append(f"{found['link']!r} does not hold for the {found['name']}")
        pattern, before = _NEXT, here
    missing = [name for name, left in centres.items() if left]
    reasons = [*problems, *(f"the {name} is not named" for name in missing)]
    return Judgement(not problems, not missing, reasons[0] if reasons else "")


def _holds(
    direction: tuple[int, int], before: tuple[float, float], after: tuple[float, float]
) -> bool:
    """Whether the way from one centre to the other goes that way more than any other."""
    dx, dy = after[0] - before[0], after[1] - before[1]
    along = direction[0] * dx + direction[1] * dy
    across = direction[1] * dx + direction[0] * dy
    return along > abs(across)
