"""Captions in a table beside the pictures, or beside their addresses on the web.

Flickr8k (`captions.txt`, or `Flickr8k.token.txt` with the lists `Flickr_8k.trainImages.txt` and so
on), Flickr30k (`results.csv`), Conceptual Captions (a caption and an address a line), and any CSV,
TSV, JSON Lines or Parquet file with a column of pictures and one of captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caption_ray.config import SourceConfig
from caption_ray.data.formats.collecting import Collector, checked_name
from caption_ray.data.formats.columns import caption_columns, picture_column, split_column, texts_in
from caption_ray.data.formats.pictures import locate_pictures
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.formats.splits import split_named, split_of_path, splits_of_paths
from caption_ray.data.formats.table_files import Table, lines_of, open_table
from caption_ray.data.locations import Location, WebAddress
from caption_ray.data.sources import Split

FILES = r"captions?\.txt|(?!.*lemma).*\.token(\.txt)?|.*\.(csv|tsv|jsonl|parquet)"

LISTS = r".*\.(txt|lst|list)"
"""Files that may list the pictures of a split."""

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures that the tables name, by split: the rows', the lists', or the tables' own."""
    found: dict[str, Table] = {}
    reasons = []
    files = source.files if source.is_file else source.names(FILES)
    for path, uri in files.items():
        table = open_table(uri, path)
        try:
            if table is None:
                raise Unfit(f"{path} has no header with the names of its columns")
            picture_column(table.columns, options.image_column, path)
            caption_columns(table.columns, options.caption_column, path)
            found[path] = table
        except Unfit as error:
            reasons.append(str(error))
    if not found:
        if reasons:
            raise Unfit("; ".join(reasons[:3]))
        return None
    tokens = {path: table for path, table in found.items() if table.kind == "token"}
    collector, lists = Collector(), _split_lists(source)
    # where there are both, a table of another kind repeats the token file
    splits_of = splits_of_paths(tokens or found)
    collector.expect(lists.values() or splits_of.values())
    for path, split in splits_of.items():
        of_name = _by_list(lists) if lists else (lambda name, split=split: split)
        read_rows(collector, found[path], options, of_name)
    for reason in reasons:
        collector.odd("train", reason, "table that is none of captions")

    def locate(split: str, names: Sequence[str]) -> Sequence[Location | None]:
        return locate_pictures(source.folder, split, names, is_ours=True)

    return collector.splits(locate)


def read_rows(
    collector: Collector,
    table: Table,
    options: SourceConfig,
    split_of: Callable[[str], str | None],
    folder: str = "",
) -> None:
    """Gather the rows of a table. `split_of` has the split of each picture's name, for rows that do
    not name theirs; `folder` is put before the names."""
    picture = picture_column(table.columns, options.image_column, table.name)
    captions = caption_columns(table.columns, options.caption_column, table.name)
    column = split_column(table.columns, options.split_column, table.name)
    for where, row in table.rows():
        if row is None:
            collector.odd("train", where, "row with another number of cells")
            continue
        name = row.get(picture)
        if name is None or name == "":
            collector.odd("train", where, "captions but no picture")
            continue
        name, location = _placed(name, where, folder, options.hosts or ())
        split = None if column is None else split_named(row.get(column))
        if split is None and options.split_column is not None:
            shown = f"{where}: {column} is {row.get(options.split_column)!r:.40}"
            collector.odd("train", shown, "split of no known name")
            continue
        split = split or split_of(name)
        if split is None:
            collector.odd("train", f"{where}: {name}", "picture that nothing puts in a split")
            continue
        values = [text for path in captions for text in _captions(row, path)]
        collector.add(split, name, values, where, location)


def _placed(
    name: Any, where: str, folder: str, hosts: tuple[str, ...]
) -> tuple[str, WebAddress | None]:
    text = name.strip() if isinstance(name, str) else name
    if isinstance(text, str) and _ADDRESS.match(text):
        return text, WebAddress(text, hosts)
    return folder + checked_name(text, where), None


def _captions(row: Mapping[str, Any], path: str) -> list[Any]:
    if path in row:
        return list(texts_in(row[path]))
    name, _, rest = path.partition(".")
    return list(texts_in(row.get(name), rest))


def _split_lists(source: Source) -> dict[str, str]:
    """The split of each picture that lists name, by its name with and without its ending; empty if
    there are no such lists."""
    found: dict[str, str] = {}
    if source.is_file:
        return found
    for path, uri in source.names(LISTS).items():
        split = split_of_path(path.rpartition("/")[2])
        if split is None:
            continue
        names = lines_of(uri, path)
        if not names or any(len(name.split()) > 1 for name in names):
            continue  # no list of names
        found |= dict.fromkeys(names, split)
    return found


def _by_list(lists: Mapping[str, str]) -> Callable[[str], str | None]:
    def split_of(name: str) -> str | None:
        last = name.rpartition("/")[2]
        keys = (name, last, last.rpartition(".")[0])
        return next((lists[key] for key in keys if key in lists), None)

    return split_of
