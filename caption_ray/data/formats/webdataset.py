"""WebDataset: tars in which the files of one picture share a name, as img2dataset writes them.

`000000012.jpg` is the picture of `000000012.txt` (a caption a line) and `000000012.json` (whose
fields may be the captions). A tar is never unpacked: its headers are read once, and each picture is
then one range read. What img2dataset writes beside the tars (Parquet files, `_stats.json`) only
repeats what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import archives, json_entries
from caption_ray.data.formats.collecting import Collector
from caption_ray.data.formats.columns import CAPTION_NAMES, SPLIT_NAME, texts_in
from caption_ray.data.formats.source import Source, Unfit
from caption_ray.data.formats.splits import split_named, splits_of_paths
from caption_ray.data.listing import MACOS
from caption_ray.data.sources import Split

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "avif")
"""Endings of pictures."""

TEXT, FIELDS = "txt", "json"
"""Endings of the captions, and of an object with more about the picture."""

TARS_AT_A_TIME = 8
"""Remote tars whose headers are read at a time; of local ones, threads would only slow it down."""

_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
"""As the WebDataset library has it: the ending is all behind the first dot of the name."""

Sample = dict[str, archives.TarMember]
"""The members of one picture by their endings."""


def find(source: Source, options: SourceConfig) -> dict[str, Split] | None:
    """The pictures in the tars, by split; tars whose names say nothing are for training."""
    tars = source.names(r".*\.tar")
    if not tars:
        packed = source.names(r".*\.(tar\.\w+|tgz)")
        if packed:
            raise Unfit(f"{next(iter(packed))} is compressed: pictures in it cannot be read one by "
                        "one; unpack it to a .tar")  # fmt: skip
        return None
    chosen = options.caption_column or ()
    texts = {ending.lower() for ending in chosen} | {TEXT, FIELDS}

    def is_text(name: str) -> bool:
        return _ending(name) in texts

    def read(uri: str) -> dict[str, Sample]:
        return _samples(archives.tar_members(uri, is_text))

    collector, splits_of = Collector(), splits_of_paths(tars)
    collector.expect(splits_of.values())
    captions_seen = False
    is_local = all(map(storage.is_local, tars.values()))
    with ThreadPoolExecutor(1 if is_local else TARS_AT_A_TIME) as threads:
        for path, samples in zip(tars, threads.map(read, tars.values()), strict=True):
            captions_seen |= any(_has_text(sample, texts) for sample in samples.values())
            for key, sample in samples.items():
                _add(collector, splits_of[path], f"{path}: {key}", sample, options)
    if not captions_seen:
        raise Unfit(f"{next(iter(tars))} has no member KEY.txt or KEY.json with captions")
    found = collector.splits()
    if not any(content.records for content in found.values()):
        _refuse_names(options, samples)
    return found


def _refuse_names(options: SourceConfig, samples: Mapping[str, Sample]) -> None:
    """Raise ValueError if it is for a name that an option gives that nothing could be used."""
    for key, sample in samples.items():
        endings, fields = sorted(sample), _fields(sample, key)
        has = f"{key} has the endings {', '.join(endings)}"
        if options.image_column is not None and _picture(sample, options.image_column) is None:
            raise ValueError(f"--image-column {options.image_column}: {has}; name one of them")
        named = options.caption_column or ()
        if named and not any(c in sample or c.partition(".")[0] in fields for c in named):
            keys = f", and its .json the keys {', '.join(fields)}" if fields else ""
            raise ValueError(f"--caption-column {' '.join(named)}: {has}{keys}; name one of them")


def _samples(members: Sequence[archives.TarMember]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for member in members:
        parts = _KEY.fullmatch(member.name.removeprefix("./"))
        if parts is None or MACOS in member.name.split("/"):
            continue
        sample = samples.setdefault(parts[1], {})
        ending = parts[2].lower()
        while ending in sample:  # to be counted, and never taken for the first of this name
            ending += " again"
        sample[ending] = member
    return samples


def _add(
    collector: Collector, split: str | None, where: str, sample: Sample, options: SourceConfig
) -> None:
    fields = _fields(sample, where)
    column = options.split_column or SPLIT_NAME
    named = split_named(fields.get(column))
    if named is None and options.split_column is not None:
        shown = f"{where}: {column} is {fields.get(column)!r:.80}"
        collector.odd("train", shown, "split of no known name")
        return
    split = named or split
    if split is None:
        collector.odd("train", where, "tar that names no split, beside others that do")
        return
    for ending in sample:
        if ending.endswith(" again"):
            collector.odd(split, f"{where}.{ending}", "member of the tar that is there again")
    picture = _picture(sample, options.image_column)
    if options.image_column is None:
        for ending in [ending for ending in PICTURES if ending in sample][1:]:
            collector.odd(split, f"{where}.{ending}", "second picture of the same name")
    if picture is None:
        collector.odd(split, where, "captions but no picture")
        return
    collector.add(split, picture.name, _captions(sample, fields, options), where,
                  picture.location, key=picture.location)  # fmt: skip


def _picture(sample: Sample, ending: str | None) -> archives.TarMember | None:
    if ending is not None:
        return sample.get(ending.lower().removeprefix("."))
    return next((sample[ending] for ending in PICTURES if ending in sample), None)


def _fields(sample: Sample, where: str) -> dict[str, Any]:
    member = sample.get(FIELDS)
    if member is None or not member.text:
        return {}
    found = json_entries.parse_text(f"{where}.{FIELDS}", member.text)
    return found if isinstance(found, dict) else {}


def _captions(sample: Sample, fields: dict[str, Any], options: SourceConfig) -> Iterator[Any]:
    if options.caption_column is not None:
        for column in options.caption_column:
            if column.lower() in sample:
                yield from _lines(sample[column.lower()])
            else:
                name, _, rest = column.partition(".")
                if name in fields:
                    yield from texts_in(fields[name], rest)
    elif TEXT in sample:
        yield from _lines(sample[TEXT])
    else:
        usual = [name for name in CAPTION_NAMES if name in fields]
        yield from texts_in(fields[usual[0]]) if usual else ()


def _lines(member: archives.TarMember) -> Iterator[Any]:
    """The captions in a text, a line each; the bytes themselves if they are no text."""
    assert member.text is not None  # it was asked for
    try:
        lines = member.text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        yield member.text
    else:
        yield from [line for line in lines if line.strip()] or [""]


def _ending(name: str) -> str:
    parts = _KEY.fullmatch(name.removeprefix("./"))
    return parts[2].lower() if parts is not None else ""


def _has_text(sample: Sample, texts: set[str]) -> bool:
    return any(ending in texts for ending in sample)
