"""Reads tables row by row: CSV, TSV and other separated text, JSON Lines, Parquet, token files.

Text is UTF-8; a byte order mark, Windows' line ends, and line ends inside of quotes do no harm. A
row with another number of cells than the header is handed on as None, so that it can be counted.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from caption_ray import storage
from caption_ray.data.formats.columns import parsed_list

SEPARATORS = "\t|;,"

LONGEST_CELL = 1 << 24
"""Characters of a cell; the csv module's own limit is shorter than some captions."""

TOKEN_FILE = re.compile(r".*\.token(\.txt)?", re.IGNORECASE)
"""`picture.jpg#0 TAB caption`, as Flickr8k and Flickr30k came at first."""

_TOKEN = re.compile(r"(.+?)#\d+\s*\t(.*)")

_ADDRESS = re.compile(r"https?://\S+", re.IGNORECASE)

PICTURE, CAPTION = "image", "caption"
"""The columns of files that have no header."""

Row = tuple[str, dict[str, Any] | None]
"""What names the row in messages, and its cells by column."""


@dataclass(frozen=True)
class Table:
    """A file of rows."""

    uri: str
    name: str
    columns: list[str]
    kind: str
    """csv, token, address, jsonl or parquet."""
    separator: str = ","
    is_quoted: bool = True

    def rows(self) -> Iterator[Row]:
        """All rows, read anew. Raises ValueError naming the file where it is damaged."""
        reader = {"token": _token_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
        return reader.get(self.kind, _separated_rows)(self)


def open_table(uri: str, name: str) -> Table | None:
    """The table of this file; None if it has no header that could be one."""
    lower = name.lower()
    if lower.endswith(".parquet"):
        return Table(uri, name, _parquet_columns(uri), "parquet")
    if lower.endswith(".jsonl"):
        first = next(_json_rows(Table(uri, name, [], "jsonl")), ("", None))[1]
        return Table(uri, name, list(first or ()), "jsonl")
    with _opened(uri, name) as file:
        line = file.readline(LONGEST_CELL).rstrip("\r\n")
    if TOKEN_FILE.fullmatch(name.rpartition("/")[2]):
        return Table(uri, name, [PICTURE, CAPTION], "token")
    cells = line.split("\t")
    addresses = [_ADDRESS.fullmatch(cell.strip()) is not None for cell in cells]
    if len(cells) == 2 and sum(addresses) == 1:
        order = [PICTURE, CAPTION] if addresses[0] else [CAPTION, PICTURE]
        return Table(uri, name, order, "address", "\t", is_quoted=False)
    return _with_header(uri, name, line)


def _with_header(uri: str, name: str, line: str) -> Table | None:
    """Separated by whatever makes the most of the header."""
    separator = max(SEPARATORS, key=lambda sign: (line.count(sign), sign == ","))
    if not line.count(separator):
        return None
    header = [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]
    if len(set(header)) < len(header) or "" in header[1:]:  # pandas names its index nothing
        return None
    table = Table(uri, name, header, "csv", separator, is_quoted=separator != "|")
    if separator == "\t" and not _is_even(table):
        # quotes mean nothing in most files with tabs, where a caption may begin with one
        return Table(uri, name, header, "csv", separator, is_quoted=False)
    return table


def _is_even(table: Table) -> bool:
    """Whether each row has as many cells as the header, if quotes are taken for quotes."""
    try:
        return all(cells is not None for _, cells in table.rows())
    except ValueError:
        return False


@contextmanager
def _opened(uri: str, name: str) -> Iterator[TextIO]:
    with storage.open_seekable(uri) as file:
        try:
            yield io.TextIOWrapper(file, "utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 text ({error}); convert it with iconv -t UTF-8"
            ) from None


def _separated_rows(table: Table) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    with _opened(table.uri, table.name) as file:
        lines: Iterable[str] = file if table.is_quoted else _lines(file)
        # strict: a quote that nobody closes would otherwise swallow all rows behind it
        reader = csv.reader(
            lines,
            delimiter=table.separator,
            quoting=csv.QUOTE_MINIMAL if table.is_quoted else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            if table.kind != "address":
                next(reader, None)
            for cells in reader:
                where = f"{table.name}: line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(table.columns):
                    yield where, None
                    continue
                yield (
                    where,
                    {
                        column: parsed_list(cell)
                        for column, cell in zip(table.columns, cells, strict=True)
                    },
                )
        except csv.Error as error:
            raise ValueError(f"{table.name}: line {reader.line_num}: no CSV ({error})") from None


def _lines(file: TextIO) -> Iterator[str]:
    """Without quotes, only line feeds end a row: other line ends are part of some captions."""
    for line in file:
        yield line.rstrip("\r\n").replace("\r", " ")


def _token_rows(table: Table) -> Iterator[Row]:
    with _opened(table.uri, table.name) as file:
        for number, line in enumerate(file, start=1):
            found = _TOKEN.fullmatch(line.rstrip("\r\n"))
            cells = {PICTURE: found[1].strip(), CAPTION: found[2]} if found else None
            if line.strip():
                yield f"{table.name}: line {number}", cells


def _json_rows(table: Table) -> Iterator[Row]:
    with _opened(table.uri, table.name) as file:
        for number, line in enumerate(file, start=1):
            where = f"{table.name}: line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); one object a line") from None
            yield where, row if isinstance(row, dict) else None


def _parquet_columns(uri: str) -> list[str]:
    with open_parquet(uri) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(table: Table) -> Iterator[Row]:
    with open_parquet(table.uri) as file:
        number = 0
        for batch in file.iter_batches(columns=table.columns):
            for row in batch.to_pylist():
                yield f"{table.name}: row {number}", row
                number += 1


@contextmanager
def open_parquet(uri: str) -> Iterator[Any]:
    """pyarrow's ParquetFile; ValueError naming the file if it is none, or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_seekable(uri) as file:
        try:
            yield pq.ParquetFile(file, pre_buffer=False)
        except storage.StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{uri}: a broken Parquet file ({error}); copy or download it again"
            ) from None


def lines_of(uri: str, name: str) -> Sequence[str]:
    """The lines of a text file, as lists of pictures in a split have them."""
    with _opened(uri, name) as file:
        return [line.strip() for line in file if line.strip()]
