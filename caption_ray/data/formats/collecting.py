"""Gathers the pictures and captions of a format row by row, with the strictness of `coco.py`.

What concerns one picture or caption alone is left out, counted with its reason, and the first is
named; what would put captions below wrong pictures is the format's to refuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from caption_ray.data.locations import Location
from caption_ray.data.sources import (
    SPLITS,
    OddEntries,
    Picture,
    Record,
    Split,
    Unusable,
    caption_fault,
    is_inside,
)

Locate: TypeAlias = Callable[[str, Sequence[str]], Sequence[Location | None]]
"""From a split and the names of its pictures to where they are."""


@dataclass
class _Entry:
    name: str
    location: Location | None
    captions: list[str] = field(default_factory=list)


class Collector:
    """Pictures with their captions, by split, in the order in which they come."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[Hashable, _Entry]] = {}
        self._odd: dict[str, OddEntries] = {}

    def expect(self, splits: Iterable[str | None]) -> None:
        """These splits are there, even if nothing of them comes."""
        for split in splits:
            if split is not None:
                self._entries.setdefault(split, {})

    def add(
        self,
        split: str,
        name: str,
        captions: Iterable[Any],
        where: str,
        location: Location | None = None,
        key: Hashable = None,
    ) -> None:
        """Captions of the picture of this name. Further ones may follow for the same `key` (None:
        for the same name). `where` names the row in messages."""
        entries = self._entries.setdefault(split, {})
        entry = entries.setdefault(name if key is None else key, _Entry(name, location))
        for caption in captions:
            fault = caption_fault(caption)
            if fault is not None:
                self.odd(split, f"{where}: caption is {caption!r:.80}", fault)
            elif (text := caption.strip()) in entry.captions:
                self.odd(split, f"{where}: {text!r:.80}", "caption listed again")
            else:
                entry.captions.append(text)

    def odd(self, split: str, name: str, reason: str) -> None:
        """Something of the split that cannot be used."""
        self._odd.setdefault(split, OddEntries()).add(name, reason)

    def splits(self, locate: Locate | None = None) -> dict[str, Split]:
        """All that was gathered; `locate` finds the pictures of which only the name is known.

        Pictures are numbered over all splits. One that is at the same place in two splits is left
        out of the earlier one, so that no training picture is tested with.
        """
        found: dict[str, list[tuple[_Entry, Location | None]]] = {}
        for split in SPLITS:
            entries = [e for e in self._entries.get(split, {}).values() if e.captions]
            nowhere = [entry.name for entry in entries if entry.location is None]
            places = iter(locate(split, nowhere) if nowhere and locate is not None else ())
            found[split] = [
                (entry, next(places, None) if entry.location is None else entry.location)
                for entry in entries
            ]
        later: dict[Location, str] = {}
        for split in reversed(SPLITS):
            kept = []
            for entry, location in found[split]:
                if location is not None and location in later:
                    self.odd(split, entry.name, f"picture that is in {later[location]} as well")
                else:
                    kept.append((entry, location))
            found[split] = kept
            later |= {location: split for _, location in kept if location is not None}
        numbers, result = itertools.count(1), {}
        for split in SPLITS:
            if split not in self._entries and split not in self._odd:
                continue
            records = [
                Record(Picture(next(numbers), entry.name, 0, 0, entry.captions, []), location)
                for entry, location in found[split]
            ]
            bare = [e.name for e in self._entries.get(split, {}).values() if not e.captions]
            left_out = [Unusable(name, "no captions") for name in bare]
            left_out += self._odd.get(split, OddEntries()).by_reason.values()
            result[split] = Split(records, left_out)
        return result


def checked_name(name: Any, where: str) -> str:
    """A picture's file name, without `./` before it. Raises ValueError naming the row if it is no
    path below the pictures."""
    text = name.removeprefix("./") if isinstance(name, str) else ""
    if not is_inside(text):
        raise ValueError(
            f"{where}: {name!r:.200} is no path below the pictures; write the path below their "
            "folder"
        )
    return text
