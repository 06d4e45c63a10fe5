"""Command lines and JSON -> settings, checked; and back."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from caption_ray.config.bounds import check, hints, option_name, remedy, require, shown
from caption_ray.config.presets import DEFAULT_PRESET, PRESETS
from caption_ray.config.settings import Config

T = TypeVar("T")


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> Config:
    """The configuration a command line asks for: `[preset] [--section.field value ...]`.

    Ends the process with a message naming the option, its value and the valid ones if there is
    an unknown or ill-typed one, or one that cannot work.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, DEFAULT_PRESET)

    def read() -> Config:
        presets = {
            name: ((make.__doc__ or "").strip(), _Unchecked(**vars(make())))
            for name, make in PRESETS.items()
        }
        found = tyro.extras.overridable_config_cli(
            presets, args=arguments, description=_described(description)
        )
        return Config(**vars(found))

    return _checked(read, arguments, [Config])


class _Unchecked(Config):
    """Everything one training run depends on, not yet checked: tyro would break into lines, and
    frame, what the check says."""

    def __post_init__(self) -> None:
        pass


def parse_arguments(
    kind: type[T] | Mapping[str, type[T]],
    description: str | None = None,
    arguments: Sequence[str] | None = None,
) -> T:
    """The arguments of a job, an instance of the dataclass `kind`, or of one of several that the
    first argument chooses by name. Ends the process as `parse` does."""
    import tyro

    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(kind, type):
        return _checked(
            lambda: tyro.cli(kind, args=given, description=_described(description)), given, [kind]
        )
    return _checked(
        lambda: tyro.extras.subcommand_cli_from_dict(
            dict(kind), args=given, description=_described(description)
        ),
        given,
        list(kind.values()),
    )


def _described(description: str | None) -> str:
    """What `--help` begins with: about the job, and about the option that command.py adds to
    all."""
    return f"{description or ''}\n\nWith --debug an error shows its whole stack.".strip()


def _checked(read: Callable[[], T], arguments: Sequence[str], kinds: Sequence[type]) -> T:
    """What `read` makes of the arguments for one of these dataclasses, its values checked."""
    try:
        _refuse_values_of_flags(arguments, kinds)
        found = read()
        check(found)
        return found
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _refuse_values_of_flags(arguments: Sequence[str], kinds: Sequence[type]) -> None:
    """Raise ValueError for `--data.flip False`, which tyro would call an unrecognized False, naming
    the form that works."""
    flags: dict[str, tuple[str, str]] = {}
    for path in (path for kind in kinds for path in _flags(kind)):
        section, _, name = option_name(path).rpartition(".")
        yes, no = f"{section}.{name}".strip("."), f"{section}.no-{name}".strip(".")
        flags |= dict.fromkeys((yes, no), (yes, no))
    for argument, after in zip(arguments, [*arguments[1:], "-"], strict=True):
        option, has_value, value = argument.partition("=")
        option = option_name(option.removeprefix("--"))
        if argument.startswith("--") and option in flags and (has_value or after[:1] != "-"):
            yes, no = flags[option]
            remedy = f"it takes no value: give --{yes} for True, or --{no} for False"
            require(False, option, value if has_value else after, remedy)


def _flags(kind: type, prefix: str = "") -> Iterator[str]:
    """Paths of the boolean settings, which are given without a value."""
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), f"{prefix}{name}.")
        elif hint is bool:
            yield f"{prefix}{name}"


def to_dict(section: Any) -> dict[str, Any]:
    """A configuration (or a section of one) as plain JSON values."""
    return dataclasses.asdict(section)


def from_dict(kind: type[T], values: dict[str, Any], origin: str) -> T:
    """The inverse of `to_dict`, checked; `kind` may also be a pydantic model.

    Raises ValueError naming `origin`, the key, the value and what is valid on anything unknown,
    ill-typed or out of bounds.
    """
    from pydantic import ValidationError

    try:
        reader: Any = _reader  # a type is hashable, whatever mypy says
        found: T = reader(kind).validate_python(values)
        return found
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(str(part) for part in problem["loc"])
        advice = problem["msg"].removeprefix("Value error, ")
        if not path:  # of several settings together, which the message names
            raise ValueError(f"{origin}: {advice}") from None
        above, name = _section_at(kind, problem["loc"])
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            valid = list(hints(above))
            close = difflib.get_close_matches(name, valid, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            advice = f"unknown{meant}; valid: {', '.join(valid)}"
        elif name in hints(above) and problem["type"] != "missing":
            advice = remedy(above, name, problem)
        raise ValueError(f"{origin}: {path} = {shown(problem['input'])}: {advice}") from None


@functools.cache
def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _section_at(kind: type, path: Sequence[int | str]) -> tuple[type, str]:
    """The section that a path of keys leads to, and the name that it ends with there."""
    for name in path[:-1]:
        below = hints(kind).get(str(name))
        if not dataclasses.is_dataclass(below):
            return kind, str(name)
        kind = typing.cast(type, below)
    return kind, str(path[-1])
