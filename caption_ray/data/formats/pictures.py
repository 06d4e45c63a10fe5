"""Finding pictures by the file names that captions come with: in folders, below prefixes, in zips.

The formats whose captions lie in a file of their own call this; nothing is read but listings and
the directories of zips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from caption_ray import storage
from caption_ray.data import archives, listing
from caption_ray.data.locations import File, Location

PROBES, PROBES_AT_A_TIME = 64, 16
"""How many file names of a split are tried before its folder is believed to be elsewhere."""


def locate_pictures(
    source: str, folder: str | None, names: Sequence[str], *, is_ours: bool = False
) -> list[Location | None]:
    """Where the pictures of these names are; ValueError if none of them is anywhere.

    A bucket of millions takes long to list, so some names are tried first, spread over all: PROBES
    requests if everything is where it is expected, four times as many if not. What is missing
    beside them shows when it is read. Only if none of them is there, the whole source is listed
    (one request for each 1,000 objects; a web server has no listing), and if it has none of them
    either, the zips in it are opened. `is_ours`: the source holds no pictures but those of the
    split, and so the few that are there are meant.
    """
    if folder is not None:
        for archive in (f"{folder}.zip", f"zips/{folder}.zip", f"images/{folder}.zip"):
            uri = storage.join(source, archive)
            if storage.exists(uri):
                return _locate_in_zip(uri, folder, names)
    count = min(PROBES, len(names))
    probes = [names[i * len(names) // count] for i in range(count)]
    below_source = ("images", *((f"images/{folder}", folder) if folder is not None else ()))
    places = [
        source,
        *(storage.join(source, below) for below in below_source),
    ]
    found: dict[str, int] = {}
    with ThreadPoolExecutor(PROBES_AT_A_TIME) as threads:
        while places and count not in found.values():
            place = places.pop()
            uris = [storage.join(place, name) for name in probes]
            found[place] = sum(threads.map(storage.exists, uris))
    place = max(found, key=lambda place: found[place])
    if found[place]:
        return [File(storage.join(place, name)) for name in names]
    there: dict[str, Location] = {
        storage.relative(file, source): File(file) for file in listing.files_below(source)
    }
    matches = listing.match(names, there, folder, is_ours)
    if not matches:
        there = _in_zips(there) or there
        matches = listing.match(names, there, folder, is_ours)
    if not matches:
        of_split = f"{folder}.zip and for " if folder is not None else ""
        below = f"{folder}/, images/{folder}/, " if folder is not None else ""
        raise ValueError(
            f"{source}: no pictures: looked for {of_split}{names[0]} in {below}images/ and here; "
            f"{listing.describe(source)}{listing.several(names[0], there)}"
        )
    return [there[matches[name]] if name in matches else None for name in names]


def _in_zips(files: Mapping[str, Location]) -> dict[str, Location]:
    """The entries of all zips among the files, by the zip's path without its ending and theirs in
    it, as if they had been unpacked."""
    found: dict[str, Location] = {}
    for path, file in files.items():
        if isinstance(file, File) and path.lower().endswith(".zip"):
            for entry in archives.zip_entries(file.uri):
                if not entry.is_dir():
                    location = archives.zip_location(file.uri, entry)
                    found[f"{path[: -len('.zip')]}/{entry.filename}"] = location
    return found


def _locate_in_zip(uri: str, folder: str, names: Sequence[str]) -> list[Location | None]:
    entries = {entry.filename: entry for entry in archives.zip_entries(uri) if not entry.is_dir()}
    matches = listing.match(names, entries, folder, is_ours=True)
    if not matches:
        raise ValueError(
            f"{uri}: holds none of the pictures; {folder}/{names[0]} is one looked for; it holds "
            f"{listing.outline(entries)}{listing.several(names[0], entries)}"
        )
    return [
        archives.zip_location(uri, entries[matches[name]]) if name in matches else None
        for name in names
    ]
