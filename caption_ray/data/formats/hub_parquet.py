"""Parquet files with the pictures in them, as data sets lie on the Hugging Face Hub.

A column has the encoded pictures (bytes, or a struct of `bytes` and `path`), another the captions
(a text, a list of texts, or structs with a text in them). Listing reads the captions alone; the
pictures of a row group are read together, by the task whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from caption_ray.config import SourceConfig
from caption_ray.data.formats.collecting import Collector
from caption_ray.data.formats.columns import caption_columns, picture_column, split_column, texts_in
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.formats.splits import split_named, split_of_path, splits_of_paths
from caption_ray.data.formats.table_files import open_parquet
from caption_ray.data.locations import Cell
from caption_ray.data.sources import Split

FILES_AT_A_TIME = 8
"""Files whose captions are read at a time."""

Entry = tuple[dict[str, Any], int, int]
"""A row without its picture, the number of its row group, and its own in that."""


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures in the Parquet files, by split: the rows' own, or that of the file's name."""
    files = source.names(r".*\.parquet")
    if not files:
        return None
    collector, splits_of = Collector(), splits_of_paths(files)
    collector.expect(splits_of.values())
    _check_one_set(splits_of)
    layouts = {}
    for path, uri in files.items():
        with open_parquet(uri) as file:
            layouts[path] = _Layout(path, file.schema_arrow, options)
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
        listed = threads.map(lambda path: list(_entries(files[path], layouts[path])), files)
        for path, entries in zip(files, listed, strict=True):
            layout = layouts[path]
            for number, (row, group, place) in enumerate(entries):
                where = f"{path}: row {number}"
                split = layout.split_of(row, splits_of[path])
                if split is None:
                    collector.odd("train", where, "row that nothing puts in a split")
                    continue
                cell = Cell(files[path], group, place, layout.picture)
                name = layout.name_of(row) or f"{path.removesuffix('.parquet')}-{number}"
                collector.add(split, name, layout.captions_of(row), where, cell, key=cell)
    return collector.splits()


def _check_one_set(splits_of: Mapping[str, str | None]) -> None:
    """Raise ValueError if there are several data sets side by side, as languages are."""
    first: dict[str, str] = {}
    for path in splits_of:
        folders = path.split("/")[:-1]
        kept = [part for part in folders if part != "data" and split_of_path(part) is None]
        first.setdefault("/".join(kept), path)
    if len(first) > 1:
        shown = ", ".join(repr(folder) for folder in list(first)[:5])
        raise ValueError(
            f"Parquet files in several folders that name no split ({shown}): they may be several "
            "data sets; give the folder of one as --source"
        )


class _Layout:
    """Which columns of a file hold what."""

    def __init__(self, name: str, schema: Any, options: SourceConfig) -> None:
        import pyarrow as pa

        kinds = {field.name: field.type for field in schema}

        def is_bytes(kind: Any) -> bool:
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        def holds_pictures(kind: Any) -> bool:
            if pa.types.is_struct(kind):
                return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
            return is_bytes(kind)

        encoded = [column for column, kind in kinds.items() if holds_pictures(kind)]
        chosen = options.image_column
        if chosen is not None and chosen not in encoded:
            picture_column(list(kinds), chosen, name)  # raises if there is no such column
            raise Unfit(f"{name}: --image-column {chosen} is {kinds[chosen]}, not bytes")
        if not encoded:
            raise Unfit(f"{name} has no column of encoded pictures, but {', '.join(kinds)}")
        if chosen is None and len(encoded) > 1:
            chosen = picture_column(encoded, None, name)
        chosen = chosen or encoded[0]
        is_struct = pa.types.is_struct(kinds[chosen])
        others = [column for column in kinds if column not in encoded]
        self.picture = f"{chosen}.bytes" if is_struct else chosen
        self._captions = caption_columns(others, options.caption_column, name)
        self._split = split_column(others, options.split_column, name)
        self._must_name_split = options.split_column is not None
        has_path = is_struct and any(field.name == "path" for field in kinds[chosen])
        self._path = f"{chosen}.path" if has_path else None
        read = [
            column if column in kinds else column.partition(".")[0] for column in self._captions
        ]
        self.read = list(dict.fromkeys([*read, *filter(None, (self._split, self._path))]))

    def split_of(self, row: Mapping[str, Any], split: str | None) -> str | None:
        named = split_named(row[self._split]) if self._split is not None else None
        return named if self._must_name_split else named or split

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        if self._path is None:
            return None
        return (row[self._path.partition(".")[0]] or {}).get("path")

    def captions_of(self, row: Mapping[str, Any]) -> Iterator[Any]:
        for path in self._captions:
            name, _, rest = (path, "", "") if path in row else path.partition(".")
            yield from texts_in(row[name], rest)


def _entries(uri: str, layout: _Layout) -> Iterator[Entry]:
    with open_parquet(uri) as file:
        for group in range(file.num_row_groups):
            rows: Sequence[dict[str, Any]] = file.read_row_group(
                group, columns=layout.read
            ).to_pylist()
            for place, row in enumerate(rows):
                yield row, group, place
