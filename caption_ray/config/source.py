"""How a source of pictures and captions is read, for jobs/ingest.py and `--data.source`."""

from __future__ import annotations

from dataclasses import dataclass

from caption_ray.config.bounds import Name, Names, Section


@dataclass(frozen=True)
class SourceConfig(Section):
    """What a source does not say of itself. Without any of it, the format and its columns are
    recognised."""

    format: Name | None = None
    """What the source is: coco, webdataset, imagefolder, parquet, karpathy, json or table. None
    recognises it by what is there."""

    image_column: Name | None = None
    """Column with the pictures, their file names or their addresses (in a tar: the ending of the
    pictures' names). None looks for the usual names."""

    caption_column: Names | None = None
    """Column with the captions, or several; with a dot for a field in it: sentences.raw (in a tar:
    a key of the .json members, or another ending). None looks for the usual names: caption,
    captions, text, sentences, raw."""

    split_column: Name | None = None
    """Column that says to which split a row belongs. None takes a column called split, if there is
    one, and otherwise the names of files and folders."""

    split: Name | None = None
    """Shares of the training pictures that become other splits: val=0.02,test=0.02. Which ones
    depends on nothing but the picture, and pictures that look the same stay together."""

    hosts: Names | None = None
    """Hosts that pictures may be fetched from although their addresses are not public, as 10.0.0.5
    or 10.0.0.5:8080."""
