"""imagefolder, as Hugging Face datasets has it: pictures, and beside them a table of their
captions.

The table is `metadata.jsonl`, `.csv` or `.parquet`; its column `file_name` has the paths of
pictures below its own folder, which may be one for each split. A picture may have several rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from caption_ray.config import SourceConfig
from caption_ray.data.formats.collecting import Collector
from caption_ray.data.formats.columns import caption_columns
from caption_ray.data.formats.pictures import locate_pictures
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.formats.splits import split_of_path
from caption_ray.data.formats.table_files import open_table
from caption_ray.data.formats.tables import read_rows
from caption_ray.data.locations import Location
from caption_ray.data.sources import Split

FILE_NAME = "file_name"

METADATA = r"metadata\.(jsonl|csv|parquet)"


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures that the metadata name, by split: the rows', or the folders'."""
    files = source.names(METADATA)
    if not files:
        return None
    options = dataclasses.replace(options, image_column=options.image_column or FILE_NAME)
    collector = Collector()
    for path, uri in files.items():
        table = open_table(uri, path)
        if table is None or options.image_column not in table.columns:
            has = ", ".join(table.columns) if table is not None else "no header"
            raise Unfit(f"{path} has no column {options.image_column}: {has}")
        caption_columns(table.columns, options.caption_column, path)
        folder = path.rpartition("/")[0]
        split = split_of_path(path)
        # a table above the folders of the splits says by each picture's path where it belongs
        of_name = _by_folder if split is None else (lambda name, split=split: split)
        read_rows(collector, table, options, of_name, f"{folder}/" if folder else "")

    def locate(split: str, names: Sequence[str]) -> Sequence[Location | None]:
        return locate_pictures(source.folder, split, names, is_ours=True)

    return collector.splits(locate)


def _by_folder(name: str) -> str:
    return split_of_path(name.rpartition("/")[0]) or "train"
