"""To which split something belongs: by the names of files and folders, or by a value in a row."""

from __future__ import annotations

import re
from collections.abc import Iterable

NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # the last is Karpathy's
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What people call the splits -> what they are called here."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_named(value: object) -> str | None:
    """The split that a value in a row names; None if it names none."""
    return NAMES.get(str(value).strip().lower())


def split_of_path(path: str) -> str | None:
    """The split that a path names: in its file name, or else in its innermost folder that does.

    A part that names two splits names none (`trainval` is no word for either).
    """
    for part in reversed(path.split("/")):
        found = {NAMES[word.lower()] for word in _WORD.findall(part) if word.lower() in NAMES}
        if len(found) == 1:
            return found.pop()
    return None


def splits_of_paths(paths: Iterable[str]) -> dict[str, str | None]:
    """The split of each path. Those that name none are for training, unless others are named so:
    then nobody knows, and it is None."""
    found = {path: split_of_path(path) for path in paths}
    rest = None if "train" in found.values() else "train"
    return {path: split or rest for path, split in found.items()}
