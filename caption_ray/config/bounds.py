"""Which values settings may have: types with their bounds, and the one check for all of them.

A bound stands on the field itself, in the `Annotated` type that these names stand for, and holds
wherever the value comes from: command line, JSON, Python or serve_config.yaml. Two rules hold for
all settings: a text is never blank (an empty value usually comes from an unset shell variable, and
does not mean an absent one), and a number is neither nan nor infinite.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

SMALLEST = 1e-6
"""Least temperature and top_p: far below, they are zero in float32 and there is nothing to draw."""

MOST, HIGHEST = 2**31 - 1, 1e9
"""Upper bounds of most settings: the largest 32-bit integer, and a number that is still finite when
multiplied by a weight or a time. Messages mention them only if they are exceeded."""

RULES = ConfigDict(allow_inf_nan=False, str_min_length=1)
"""pydantic's form of the two rules; that blanks alone are no text either is for `check`."""


@dataclass(frozen=True)
class Give:
    """What to give for a setting, in words that replace those made from its type and bounds."""

    words: str


def _in_units(quantity: float) -> float:
    if 0 < quantity < 1e-4 or (quantity > 1 and quantity % 1):
        raise ValueError("not a quantity of GPUs")
    return quantity


def _names_a_run(name: str) -> str:
    plain = name.isascii() and name.isprintable()
    if not plain or name in (".", "..") or set(name) & set("/\\?#%,"):
        raise ValueError("a URI, a file system or Ray would take it for something else")
    return name


def _zero_or_drawn(temperature: float) -> float:
    if 0 < temperature < SMALLEST:
        raise ValueError("nothing to draw in float32")
    return temperature


Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Length = Annotated[int, Field(ge=1, le=1000)]
"""Of captions, in words, and of beams: search holds so many at a time."""
LengthOrZero = Annotated[int, Field(ge=0, le=1000)]
Size = Annotated[int, Field(ge=1, le=2**16)]
"""Of vectors and pictures."""
Parallel = Annotated[int, Field(ge=1, le=100_000)]
"""Workers, threads and clients."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What both numpy and torch take."""
Bytes = Annotated[int, Field(ge=1, le=2**40)]
Positive = Annotated[float, Field(gt=0, le=HIGHEST)]
PositiveOrZero = Annotated[float, Field(ge=0, le=HIGHEST)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[
    float,
    Field(ge=0, le=HIGHEST),
    AfterValidator(_zero_or_drawn),
    Give(f"0, or {SMALLEST} or more to draw words"),
]
TopP = Annotated[float, Field(ge=SMALLEST, le=1)]
CPUs = Annotated[float, Field(ge=1e-4, le=HIGHEST)]
"""Ray counts no finer."""
GPUs = Annotated[
    float,
    Field(ge=0, le=HIGHEST),
    AfterValidator(_in_units),
    Give("0, a fraction of one GPU (0.0001 or more) or a whole number"),
]
"""Ray shares one, but no more than one."""
Uri = Annotated[str, Give("a URI or path")]
Name = Annotated[str, Give("a name")]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Weights = Annotated[str, Give("a name of torchvision's weights, the URI of a state dict, or none")]
RunName = Annotated[
    str,
    Field(max_length=255),
    AfterValidator(_names_a_run),
    Give(
        "a name of at most 255 characters, plain ASCII without / \\ ? # % and commas: a folder "
        "and Ray's metrics are called by it"
    ),
]
Project = Annotated[
    str,
    Field(max_length=128, pattern=r"^[^/\\?#%:]*$"),
    Give("a name of at most 128 characters without / \\ ? # % and colons"),
]
FileName = Annotated[
    str,
    Field(max_length=150, pattern=r"^[^/\\?#%]*$"),
    Give("a name of at most 150 characters without / \\ ? # %, since it is part of a file's"),
]


class Section:
    """Base of the sections: a key that is not a field is an error, also when read from JSON."""

    __pydantic_config__ = ConfigDict(extra="forbid", **RULES)


def require(ok: bool, option: str, value: object, remedy: str) -> None:
    """Raise ValueError naming the option, its value and the remedy unless all is well."""
    if not ok:
        raise ValueError(f"--{option} is {shown(value)}: {remedy}")


def shown(value: object) -> str:
    """A value in a message: as Python writes it, but not endless."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def option_name(path: str) -> str:
    """What the command line calls the setting at `path`."""
    return path.replace("_", "-")


def from_environment(variable: str) -> str | None:
    """The value of an environment variable, None if it is not set.

    Raises ValueError, naming it, if it is set but empty: scripts export that when a variable of
    their own is unset, and it must not be taken for a path, a bucket or the absence of tokens.
    """
    value = os.environ.get(variable)
    if value is not None and not value.strip():
        raise ValueError(f"${variable} is {value!r}: it is empty; give it a value, or unset it")
    return value


def check(section: Any, prefix: str = "") -> None:
    """Raise ValueError naming the option, its value and the remedy where a setting of `section`, a
    dataclass, or of the sections below it has a value that its type does not take."""
    kind: Any = type(section)
    for name, hint in hints(kind).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value) and isinstance(value, typing.cast(type, hint)):
            check(value, f"{prefix}{name}.")
        elif (problem := _problem(kind, name, value)) is not None:
            option = option_name(f"{prefix}{name}")
            require(False, option, value, remedy(kind, name, problem))


def _problem(kind: type, name: str, value: object) -> Any:
    """What pydantic has against the value of a field, if anything."""
    from pydantic import ValidationError

    try:
        _adapters(kind)[name].validate_python(value)
    except ValidationError as error:
        return error.errors(include_url=False)[0]
    return None


@functools.cache
def _adapters(kind: type) -> dict[str, Any]:
    from pydantic import TypeAdapter

    # converts nothing, and strips texts only to see whether anything is left
    rules = ConfigDict(strict=True, str_strip_whitespace=True, **RULES)
    return {
        name: TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else rules)
        for name, hint in hints(kind).items()
    }


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass or pydantic model, with their bounds."""
    found = typing.get_type_hints(kind, include_extras=True)
    fields = getattr(kind, "model_fields", None) or [f.name for f in dataclasses.fields(kind)]
    return {name: found[name] for name in fields}


def remedy(kind: type, name: str, problem: Mapping[str, Any]) -> str:
    """What to do about a problem that pydantic has with the value of a field: in the field's own
    words, or those that its type and bounds make."""
    hint = hints(kind)[name]
    what, is_optional = _parts(hint)[0], type(None) in typing.get_args(hint)
    is_blank = isinstance(problem["input"], str) and not problem["input"].strip()
    words = "it is empty (an unset variable?): " if is_blank else ""
    words += f"give {_in_words(what, problem)}"
    if is_blank and _has_default(kind, name):
        return f"{words}, or leave the option out"
    return f"{words}, or None" if is_optional else words


def _has_default(kind: Any, name: str) -> bool:
    if hasattr(kind, "model_fields"):
        return not kind.model_fields[name].is_required()
    field = kind.__dataclass_fields__[name]
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _parts(hint: Any) -> list[Any]:
    """The members of a union but for None, or the type itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [part for part in typing.get_args(hint) if part is not type(None)]
    return [hint]


def constraints(hint: Any) -> dict[str, Any]:
    """The bounds of a type by their names in `Field` (`ge`, `max_length`, ...)."""
    found: dict[str, Any] = {}
    for entry in getattr(hint, "__metadata__", ()):
        for bound in entry.metadata if isinstance(entry, FieldInfo) else ():
            found |= {
                name: getattr(bound, name)
                for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
                if getattr(bound, name, None) is not None
            }
    return found


def _in_words(hint: Any, problem: Mapping[str, Any]) -> str:
    """What a type takes; of upper bounds that nobody meets, only in answer to who exceeds them."""
    given = [entry.words for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Give)]
    if given:
        return str(given[0])
    bounds = constraints(hint)
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(base) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(base)))
    if typing.get_origin(base) is tuple:
        return f"{_in_words(typing.get_args(base)[0], problem)}, or several"
    if base in (int, float):
        if "le" in bounds and bounds["le"] >= HIGHEST and problem["type"] != "less_than_equal":
            del bounds["le"]
        is_endless = problem["type"] == "finite_number"
        kind = "whole number" if base is int else "finite number" if is_endless else "number"
        return f"a {kind}{_range(bounds)}"
    return {bool: "True or False", str: "a text"}.get(base, f"a {getattr(base, '__name__', base)}")


def _range(bounds: Mapping[str, Any]) -> str:
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[name]} {bounds[name]}" for name in words if name in bounds]
    return " " + " and ".join(parts) if parts else ""
