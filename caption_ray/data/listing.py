"""What lies below a folder or in a zip, and which of it a file name means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from urllib.parse import unquote

from caption_ray import storage

SPLIT = re.compile(r"(train|val|valid|validation|dev|test|unlabeled)(\d{4})?", re.IGNORECASE)

SHOWN = 5
"""Names that a message lists."""


MACOS = "__MACOSX"
"""The folder that macOS leaves in archives."""


def is_visible(path: str) -> bool:
    """Whether people put it there: not a hidden file, nor what macOS leaves in zips and folders."""
    return not any(part.startswith(".") or part == MACOS for part in path.split("/"))


def files_below(
    uri: str, is_meant: Callable[[str, bool], bool] = lambda path, is_folder: is_visible(path)
) -> list[str]:
    """URIs of the files below a folder, sorted; none of a web server, which has no listing.

    `is_meant` is asked of the path of each below `uri`, and on local paths of each folder as well
    before it is listed. There links to folders are followed, each folder once, by its own name if
    it has one there. In a bucket it takes one request for each 1,000 objects.
    """
    if storage.is_local(uri):
        return sorted(_walk(uri, is_meant))
    files = storage.list_files(uri)
    return [file for file in files if is_meant(storage.relative(file, uri), False)]


def _walk(top: str, is_meant: Callable[[str, bool], bool]) -> Iterator[str]:
    seen, waiting, links = set[str](), [top], list[str]()
    while waiting or links:
        # links last: what they lead to may be here under its own name
        folder = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # no folder, or not ours to read
            continue
        for entry in entries:
            if not is_meant(storage.relative(entry.path, top), entry.is_dir()):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif entry.is_file():
                yield entry.path


# What a name means ----------------------------------------------------------------------------


def match(
    names: Sequence[str], paths: Collection[str], folder: str | None, is_ours: bool
) -> dict[str, str]:
    """Which of the paths the file names of a split mean; what is not there is left out.

    They are looked for below `folder` (such as `train2017`), images/`folder`, images, and as they
    are. Where none is there, each means the one path that ends like it, or the one file of its
    last part: also with other capitals, other slashes, or escaped as in URLs.

    A wrong picture is worse than a missing one: a name that could mean several files means none,
    files below the names of other splits are nobody's, and unless something says that the others
    belong to this split (a folder's name, or `is_ours`), half of the names must be among them.
    With None for `folder` the names are those of all splits, and folders are nobody's.
    """
    of_split = (f"{folder}/", f"images/{folder}/") if folder is not None else ()
    prefixes = (*of_split, "images/", "")
    expected = [
        {name: prefix + name for name in names if prefix + name in paths} for prefix in prefixes
    ]
    found = max(expected, key=len)
    if found:
        return found
    visible = filter(is_visible, paths)
    owners = {path: set() if folder is None else _owners(path, folder) for path in visible}
    ours = [path for path, owner in owners.items() if owner == {folder}]
    others = [path for path, owner in owners.items() if not owner]
    ends = {form: _by_ending(ours or others, form) for form in (str, _plain)}
    asked = {form: Counter(map(form, names)) for form in (str, _plain)}
    asked_last = Counter(_last(_plain(name)) for name in names)
    for name in names:
        candidates = [ends[form].get(form(name)) for form in ends if asked[form][form(name)] == 1]
        if asked_last[_last(_plain(name))] == 1:
            candidates.append(ends[_plain].get(_last(_plain(name))))
        path = next(filter(None, candidates), None)
        if path is not None:
            found[name] = path
    is_sure = is_ours or bool(ours) or 2 * len(found) >= len(names)
    return found if is_sure else {}


def _owners(path: str, folder: str) -> set[str]:
    """The splits, `folder` among them, that folders of the path are named after, in any year."""
    ours = SPLIT.fullmatch(folder)
    owners = set()
    for part in path.split("/")[:-1]:
        named = SPLIT.fullmatch(part)
        if part == folder or (ours and named and named[1].lower() == ours[1].lower()):
            owners.add(folder)
        elif named:
            owners.add(part)
    return owners


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _plain(path: str) -> str:
    """The same for all spellings of a path."""
    return unicodedata.normalize("NFC", unquote(path.replace("\\", "/"))).casefold()


def _by_ending(paths: Iterable[str], form: Callable[[str], str]) -> dict[str, str | None]:
    """The path by each of its endings (`c.jpg`, `b/c.jpg`, ...); None where several have it."""
    found: dict[str, str | None] = {}
    for path in paths:
        ending = form(path)
        while ending:
            found[ending] = None if ending in found else path
            ending = ending.partition("/")[2]
    return found


# For messages ---------------------------------------------------------------------------------


def outline(paths: Iterable[str]) -> str:
    """The folders at the top, with the number of files in each, and the first files."""
    first: dict[str, str] = {}
    files: Counter[str] = Counter()
    for path in paths:
        top, slash, rest = path.partition("/")
        first.setdefault(top + slash, rest)
        files[top + slash] += 1
    shown = [
        f"{top} ({files[top]} files, the first: {first[top]})" if first[top] else top
        for top in list(first)[:SHOWN]
    ]
    more = [f"{len(first) - SHOWN} more"] if len(first) > SHOWN else []
    return ", ".join(shown + more) or "nothing"


def several(name: str, paths: Iterable[str]) -> str:
    """The rest of a message, if several of the paths end with the name."""
    ends = [path for path in paths if path.endswith(f"/{name}")]
    if len(ends) < 2:
        return ""
    return f"; {name} may be {ends[0]} or {ends[1]}: write file_name with its folders"


def describe(uri: str) -> str:
    """What a source holds.

    Of a bucket only the folders at the top are listed, if it has any.
    """
    if storage.is_local(uri) and os.path.isfile(uri):
        return "it is a file; give the folder that holds it"
    if storage.scheme(uri) in ("http", "https"):
        return "a web server does not say what it has"
    folders = [] if storage.is_local(uri) else storage.list_folders(uri)
    paths = [f"{folder}/" for folder in folders] or [
        storage.relative(file, uri) for file in files_below(uri)
    ]
    return f"it holds {outline(paths)}"
