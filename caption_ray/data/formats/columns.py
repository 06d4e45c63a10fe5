"""Which column of a table holds the pictures and which the captions, and what a cell of captions
says.

Names are compared without regard to capitals and surrounding spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from caption_ray.data.formats.source import Unfit

PICTURE_NAMES = (
    *("image", "image_name", "file_name", "filename", "image_path", "file_path", "filepath"),
    *("path", "file", "img", "picture", "url", "image_url", "img_url", "link"),
)
"""Usual names of the column with pictures, their file names or addresses, the best first."""

CAPTION_NAMES = (
    *("caption", "captions", "text", "sentences", "raw"),
    *("sentence", "comment", "description"),
)
"""Usual names of the column with captions, and of the field in a struct, the best first."""

NUMBERED = re.compile(r"(?:caption|sentence|text|comment)s?[_ ]?\d+")
"""Names of columns that hold one caption each."""

SPLIT_NAME = "split"
"""Usual name of the column with the split."""


def picture_column(columns: Sequence[str], given: str | None, table: str) -> str:
    """The column with the pictures; Unfit, or ValueError naming the option, if there is none."""
    if given is not None:
        return _given("image-column", given, columns, table)
    found = _first(PICTURE_NAMES, columns)
    if found is None:
        raise Unfit(f"{_has(table, columns)}: name the one with pictures with --image-column")
    return found


def caption_columns(columns: Sequence[str], given: Sequence[str] | None, table: str) -> list[str]:
    """The columns with the captions, perhaps with fields in them (`sentences.raw`); Unfit, or
    ValueError naming the option, if there are none."""
    if given is not None:
        for path in given:
            if path not in columns:
                _given("caption-column", path.partition(".")[0], columns, table)
        return list(given)
    found = _first(CAPTION_NAMES, columns)
    if found is not None:
        return [found]
    numbered = [column for column in columns if NUMBERED.fullmatch(_plain(column))]
    if not numbered:
        raise Unfit(f"{_has(table, columns)}: name the one with captions with --caption-column")
    return numbered


def split_column(columns: Sequence[str], given: str | None, table: str) -> str | None:
    """The column that names the split of each row, if there is one."""
    if given is not None:
        return _given("split-column", given, columns, table)
    return _first((SPLIT_NAME,), columns)


def texts_in(value: Any, path: str = "") -> Iterator[Any]:
    """The captions in a cell: itself, the entries of a list, or of a struct the field that `path`
    (names with dots between) or its name says. What is no text comes as it is."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from texts_in(entry, path)
    elif isinstance(value, dict):
        name, _, rest = path.partition(".")
        field = name or _first(CAPTION_NAMES, list(value))
        if field in value:
            yield from texts_in(value[field], rest)
        else:
            yield value
    else:
        yield value


def parsed_list(cell: str) -> Any:
    """What a cell of a CSV file says: several captions, if it is a list of texts in JSON."""
    if cell.lstrip().startswith("["):
        try:
            found = json.loads(cell)
        except ValueError:
            return cell
        if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
            return found
    return cell


def _plain(column: str) -> str:
    return column.strip().lower()


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    by_name = {_plain(column): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _given(option: str, name: str, columns: Sequence[str], table: str) -> str:
    if name not in columns:
        raise ValueError(f"--{option} {name}: {_has(table, columns)}; name one of them")
    return name


def _has(table: str, columns: Sequence[str]) -> str:
    return f"{table} has the columns {', '.join(columns)}"
