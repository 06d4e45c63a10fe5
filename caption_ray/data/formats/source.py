"""What lies at the URI that somebody gave as a source: a folder, a prefix, a file or a pattern."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import product

from caption_ray import storage
from caption_ray.data import listing

FILES = re.compile(r".*\.(csv|tsv|txt|token|json|jsonl|parquet|tar|tgz|gz|zip)", re.IGNORECASE)
"""Names that a web server's files have; it has no listing that would tell them from folders."""

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")


class Unfit(Exception):
    """What looks like a format, but cannot be read as it; the message says why."""


class Source:
    """The files of a source, listed once and only if a format asks for them."""

    def __init__(self, uri: str, splits: tuple[str, ...] | None = None) -> None:
        self.uri = storage.resolve(uri)
        self.splits = splits
        """The splits that are wanted; None: all there are. A format may save itself the others."""
        self._parts = expanded(self.uri)

    @cached_property
    def is_file(self) -> bool:
        """Whether it is one file, or several by a pattern, rather than a folder."""
        if len(self._parts) > 1:
            return True
        is_web = storage.scheme(self.uri) in ("http", "https")
        if is_web and not FILES.fullmatch(storage.name(self.uri)):
            return False
        return storage.exists(self.uri)

    @cached_property
    def folder(self) -> str:
        """Where pictures are that a file names: the source itself, or the folder it is in."""
        above = {storage.parent(part) for part in self._parts}
        if len(above) > 1:
            return storage.parent(min(above, key=len))
        return above.pop() if self.is_file or self._is_prefix else self.uri

    @cached_property
    def files(self) -> dict[str, str]:
        """URIs of the visible files by their path below `folder`, sorted; none of a web server but
        those that are named."""
        if self.is_file:
            folder = self.folder
            return {storage.relative(part, folder): part for part in self._parts}
        if self._is_prefix:
            return self._below_prefix
        return self._listed

    @cached_property
    def _listed(self) -> dict[str, str]:
        return {storage.relative(file, self.uri): file for file in listing.files_below(self.uri)}

    def names(self, pattern: str) -> dict[str, str]:
        """Those of the files whose name, without its folders, is of the pattern."""
        form = re.compile(pattern, re.IGNORECASE)
        return {
            path: uri for path, uri in self.files.items() if form.fullmatch(path.rpartition("/")[2])
        }

    def describe(self) -> str:
        """For messages: what is there."""
        if self.is_file:
            return f"it is a file, {storage.name(self.uri)}"
        return listing.describe(self.uri)

    @cached_property
    def _is_prefix(self) -> bool:
        """Whether it is neither a file nor a folder, but the beginning of the names of files."""
        if self.is_file or storage.scheme(self.uri) in ("http", "https"):
            return False
        return not self._listed and bool(self._below_prefix)

    @cached_property
    def _below_prefix(self) -> dict[str, str]:
        try:
            folder = storage.parent(self.uri)
        except ValueError:  # a bucket
            return {}
        name = storage.name(self.uri)

        def begins(path: str, is_folder: bool) -> bool:
            return path.startswith(name) and not is_folder

        return {
            storage.relative(file, folder): file for file in listing.files_below(folder, begins)
        }


def expanded(uri: str) -> list[str]:
    """All that a pattern in braces stands for: `{00..12}` or `{a,b}`; else the URI alone."""
    if storage.is_local(uri):
        pattern = uri
        if storage.exists(uri):  # a file that is called like this
            return [uri]
    else:
        pattern = re.sub("%7[bB]", "{", re.sub("%7[dD]", "}", uri))
    pieces = _BRACES.split(pattern)
    if len(pieces) == 1:
        return [uri]
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(text: str) -> list[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = numbers.groups()
    if int(last) < int(first):
        raise ValueError(f"{{{text}}}: a range that runs backwards; write {{{last}..{first}}}")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
