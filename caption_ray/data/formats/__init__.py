"""The formats in which pictures with captions come, and the one door to all of them.

`find_splits` recognises which format a source has, or takes the one that is named, and returns its
pictures by split. Each format is a module beside this one and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from caption_ray.config import SourceConfig
from caption_ray.data.formats import (
    annotation_json,
    coco_layout,
    hub_parquet,
    imagefolder,
    karpathy,
    shares,
    tables,
    webdataset,
)
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.sources import SPLITS, Split
from caption_ray.fetch import check_allow_list

Find: TypeAlias = Callable[[Source, SourceConfig], dict[str, Split] | None]


@dataclass(frozen=True)
class Format:
    """A way to lay out pictures and captions."""

    find: Find
    """Returns the pictures by split; None if the source is laid out otherwise. Raises `Unfit` for
    what looks like this format but lacks something, ValueError for what is damaged."""
    needs: str
    """What a source must consist of, for messages."""
    has_columns: bool = True
    """Whether the options that name columns mean anything to it."""


FORMATS: dict[str, Format] = {
    "coco": Format(coco_layout.find, coco_layout.LAYOUT.format(split="train"), has_columns=False),
    "webdataset": Format(
        webdataset.find, "tars with KEY.jpg beside KEY.txt or KEY.json, as img2dataset writes them"
    ),
    "imagefolder": Format(
        imagefolder.find,
        "metadata.jsonl, .csv or .parquet with the columns file_name and text beside the pictures",
    ),
    "parquet": Format(
        hub_parquet.find, "Parquet files with a column of encoded pictures and one of captions"
    ),
    "karpathy": Format(
        karpathy.find,
        "dataset_NAME.json of Karpathy's splits, and the pictures in folders or zips",
        has_columns=False,
    ),
    "json": Format(
        annotation_json.find,
        "JSON of captions as of NoCaps, VizWiz or TextCaps, and the pictures in folders or zips",
        has_columns=False,
    ),
    "table": Format(
        tables.find,
        "CSV, TSV, JSON Lines or a token file as of Flickr8k, with a picture's name or address and "
        "a caption in each row",
    ),
}
"""The formats by name, in the order in which they are looked for. Another one needs its module and
a line here."""


def find_splits(
    source: str,
    *,
    splits: tuple[str, ...] | None = None,
    karpathy: str | None = None,
    options: SourceConfig | None = None,
) -> dict[str, Split]:
    """Every picture at `source` with its captions, by split.

    `source`: a folder, a bucket prefix, a file or a pattern like `{00000..00012}.tar`. `splits`:
    which ones; None means all there are, of which train and val must be. `karpathy`: the URI of
    Karpathy's `dataset_coco.json`, whose splits replace those of COCO. Raises ValueError naming
    what was found, and what is needed, if captions, pictures or a split are not there.
    """
    options = options or SourceConfig()
    wanted = shares.parse(options.split)
    for host in options.hosts or ():
        try:
            check_allow_list([host])
        except ValueError as error:
            raise ValueError(f"--hosts {host}: {error}") from None
    place = Source(source, splits and tuple(split for split in splits if split not in wanted))
    if karpathy is not None and splits is None:
        place.splits = coco_layout.WITH_CAPTIONS
    name, found = _recognised(place, options)
    if karpathy is not None:
        if name != "coco":
            raise ValueError(f"--karpathy {karpathy}: its splits are of COCO; {source} is {name}")
        if wanted:
            raise ValueError(
                f"--split {options.split}: --karpathy says the splits; give one of them"
            )
        return coco_layout.karpathy_splits(found, karpathy)
    if wanted:
        found = shares.share_out(found, wanted, source)
    return _asked_for(source, name, found, splits)


def _recognised(source: Source, options: SourceConfig) -> tuple[str, dict[str, Split]]:
    if options.format is not None and options.format not in FORMATS:
        raise ValueError(f"--format {options.format}: give one of {', '.join(FORMATS)}")
    asked = FORMATS if options.format is None else {options.format: FORMATS[options.format]}
    reasons = {}
    for name, format in asked.items():
        try:
            found = format.find(source, options)
        except Unfit as error:
            reasons[name] = f" ({error})"
            continue
        if found:
            _refuse_idle(options, name, format)
            return name, found
    needs = "\n".join(
        f"  {name}: {format.needs}{reasons.get(name, '')}" for name, format in asked.items()
    )
    raise ValueError(
        f"{source.uri}: no captions in a format that is known; {source.describe()}. Needed is one "
        f"of\n{needs}"
    )


def _refuse_idle(options: SourceConfig, name: str, format: Format) -> None:
    """Raise ValueError for an option that would do nothing."""
    for option in ("image_column", "caption_column", "split_column"):
        value = getattr(options, option)
        if value is not None and not format.has_columns:
            shown = value if isinstance(value, str) else " ".join(value)
            raise ValueError(
                f"--{option.replace('_', '-')} {shown}: the source is {name}, which has no "
                "columns; leave it out, or name another --format"
            )


def _asked_for(
    source: str, name: str, found: dict[str, Split], splits: tuple[str, ...] | None
) -> dict[str, Split]:
    """The splits that are wanted; ValueError if one is missing or empty."""
    there = {split: found[split] for split in dict.fromkeys((*SPLITS, *found)) if split in found}
    asked = splits or ("train", "val", *(split for split in there if split == "test"))
    for split in asked:
        if split not in there:
            has = ", ".join(f"{one} ({len(it.records)} pictures)" for one, it in there.items())
            needs = FORMATS[name].needs.replace("_train", f"_{split}")
            raise ValueError(
                f"{source}: no captions for split {split!r}; it has {has}. Take a share of the "
                f"training pictures with --split {split}=0.02, go without it (--splits "
                f"{' '.join(there)}), or add it ({name}: {needs})"
            )
        # a test split often has its captions withheld: then it is as good as not there
        if not there[split].records and (splits is not None or split != "test"):
            reasons = ", ".join(f"{one.name}: {one.reason}" for one in there[split].left_out[:3])
            raise ValueError(
                f"{source}: split {split!r} has no picture with a caption ({reasons or 'no rows'})"
            )
    return {split: there[split] for split in asked}
