"""What is wrong with captions, by kind, and what in the training captions is close to them.

The kinds are found from what people wrote of the same picture, by rules that err: they choose what
to look at, and are no metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from caption_ray.data.tokenizer import Tokenizer
from caption_ray.evaluation.naming import CATEGORIES, Names

Record: TypeAlias = Mapping[str, Any]
"""A record of evaluate.caption_split, with its `scores`."""

KINDS = {
    "object": "Names an object that nobody else names",
    "count": "Gives a number that nobody else gives",
    "relation": "Places things as nobody else does",
    "generic": "Says the same of several pictures",
}
"""The kinds of failure, in the order in which a caption that has several is shown under one."""

NUMBERS = {
    word: number
    for number, words in enumerate(
        ("two 2 couple pair both", "three 3", "four 4", "five 5", "six 6", "seven 7", "eight 8"), 2
    )
    for word in words.split()
}
RELATIONS = frozenset(
    "above below under underneath over behind beside between inside outside left right front top "
    "through across around into off along against".split()
)
"""Words for where things are that leave little choice; `on`, `in`, `at`, `near` leave more."""


def kinds(records: Sequence[Record], tokenizer: Tokenizer) -> dict[str, list[Record]]:
    """The captions of each kind of failure, those with the lowest CIDEr-D first; each caption under
    one kind at most.

    Objects are COCO's categories and those that the picture is known to hold.
    """
    told = [tokenizer.scored(record["caption"]) for record in records]
    times = Counter(map(tuple, told))
    found: dict[str, list[Record]] = {kind: [] for kind in KINDS}
    for record, words in zip(records, told, strict=True):
        references = [tokenizer.scored(text) for text in record["references"]]
        there = {str(thing["category"]) for thing in record["objects"]}
        wrong = {
            "object": _names_wrongly(words, references, there),
            "count": _counts_wrongly(words, references),
            "relation": _places_wrongly(words, references),
            "generic": times[tuple(words)] > 1,
        }
        for kind in KINDS:
            if wrong[kind]:
                found[kind].append(record)
                break
    for chosen in found.values():
        chosen.sort(key=lambda record: float(record["scores"]["CIDEr-D"]))
    return found


def _names_wrongly(
    words: Sequence[str], references: Sequence[Sequence[str]], there: set[str]
) -> bool:
    """Whether an object is named that is neither known to be in the picture nor in a reference
    (after CHAIR: Rohrbach et al., 1809.02156)."""
    names = Names([*CATEGORIES, *there])
    seen = there.union(*map(names.within, references))
    return bool(names.within(words) - seen)


def _counts_wrongly(words: Sequence[str], references: Sequence[Sequence[str]]) -> bool:
    """Whether a number is given that no reference gives, though one gives another or speaks of a
    single thing in its first words."""
    said = {NUMBERS[word] for word in words if word in NUMBERS}
    given = {NUMBERS[word] for reference in references for word in reference if word in NUMBERS}
    single = any(reference[:1] in (["a"], ["an"], ["one"]) for reference in references)
    return bool(said - given) and (bool(given) or single)


def _places_wrongly(words: Sequence[str], references: Sequence[Sequence[str]]) -> bool:
    """Whether a place is told that no reference tells, though one tells another."""
    given = {word for reference in references for word in reference if word in RELATIONS}
    return bool(given) and bool({word for word in words if word in RELATIONS} - given)


def shown(found: Mapping[str, Sequence[Record]], count: int) -> dict[str, list[Record]]:
    """The first `count` captions of each kind that has any, under the kind's heading."""
    return {KINDS[kind]: list(chosen[:count]) for kind, chosen in found.items() if chosen}


# Parroting ------------------------------------------------------------------------------------


def nearest(
    captions: Sequence[Sequence[str]], training: Mapping[tuple[str, ...], str]
) -> list[tuple[str, float]]:
    """For each caption the training caption that shares most with it, and how much: Dice's
    coefficient of their words and pairs of words, from 0 to 1, the same.

    captions: as words. training: captions by their words.
    """
    wanted = [_pieces(words) for words in captions]
    by_piece: dict[Any, list[int]] = {}
    for number, pieces in enumerate(wanted):
        for piece in pieces:
            by_piece.setdefault(piece, []).append(number)
    best = [("", 0.0)] * len(captions)
    for words, text in training.items():
        pieces = _pieces(words)
        shared = Counter(number for piece in pieces for number in by_piece.get(piece, ()))
        for number, count in shared.items():
            share = 2 * count / (len(pieces) + len(wanted[number]))
            if share > best[number][1]:
                best[number] = (text, share)
    return best


def _pieces(words: Sequence[str]) -> set[Any]:
    return {*words, *pairwise(words)}
