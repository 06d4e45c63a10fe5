"""JSON files of entries, checked field by field: annotations, and the results that are scored.

An error names the file, the entry by its place, the field and its value.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO


def parse(
    name: str, file: BinaryIO, hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
    """What the JSON says, each object passed through `hook`; ValueError naming the file if it is
    none, or not UTF-8 (a byte order mark does no harm)."""
    try:
        return json.load(io.TextIOWrapper(file, "utf-8-sig"), object_hook=hook)
    except (ValueError, RecursionError) as error:
        several = "; one object is needed, not one a line" if "Extra data" in str(error) else ""
        raise ValueError(f"{name}: not JSON in UTF-8 ({error}{several})") from error


def parse_text(name: str, data: bytes) -> Any:
    """What the bytes say; ValueError as `parse`."""
    return parse(name, io.BytesIO(data))


def entries(name: str, dataset: Any, key: str) -> list[Any]:
    """The list `key` of the file's object; ValueError, saying what there is instead."""
    if isinstance(dataset, dict) and isinstance(dataset.get(key), list):
        found: list[Any] = dataset[key]
        return found
    raise ValueError(
        f"{name}: not the layout of COCO's annotations: no list {key!r}; it is {outline(dataset)}"
    )


def outline(value: Any) -> str:
    """For messages: what kind of value this is, without all that is in it."""
    if isinstance(value, dict):
        more = ", ..." if len(value) > 5 else ""
        return f"an object with {', '.join(map(repr, list(value)[:5]))}{more}"[:200]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{value!r:.80}"


def check(where: str, entry: Any, fields: Mapping[str, type]) -> None:
    """Raise ValueError if the entry has a `fault`."""
    found = fault(entry, fields)
    if found is not None:
        raise ValueError(f"{where}{found}")


def fault(entry: Any, fields: Mapping[str, type]) -> str | None:
    """What keeps the entry from being an object with these fields of these types, to be written
    behind its place; None if nothing does.

    Numbers must fit in 64 bits, and text in UTF-8, so that shards can hold them.
    """
    if not isinstance(entry, dict):
        return f" is {entry!r:.80}, not an object"
    for name, kind in fields.items():
        if name not in entry:
            return f" has no {name!r}: {entry!r:.200}"
        value = entry[name]
        if type(value) is not kind:  # True is no number, nor is 1.0
            return f": {name} is {value!r:.80}, not of type {kind.__name__}"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f": {name} is {value!r:.80}, beyond 64 bits"
        if isinstance(value, str) and not is_unicode(value):
            return f": {name} is {value!r:.80}, which is not Unicode text"
    return None


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
