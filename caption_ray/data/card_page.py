"""Shows a data card to people: one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from caption_ray.data.card import Sample
from caption_ray.report_page import document, image

WIDTH, HEIGHT = 360, 140
"""Of a chart, in pixels."""

MOST_BARS = 60
"""Bars of a chart; the last one stands for all that follow."""


def page(card: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]]) -> str:
    """The page of a card (see `card.card`), with some pictures of each split."""
    parts = [f"<p class=soft>From {html.escape(card['source'])}</p>", _counts(card)]
    parts += _left_out(card["left_out"]) + _duplicates(card["duplicates"])
    parts.append("<h2>Words of a caption</h2><div class=cards>")
    for split, one in card["splits"].items():
        drawn = _bars(one["words_per_caption"]["captions"], "words", "captions")
        parts.append(f"<div><p>{split}</p>{drawn}</div>")
    parts.append("</div>")
    parts += _vocabulary(card["vocabulary"])
    for split, pictures in samples.items():
        parts += [f"<h2>Some pictures: {split}</h2>", "<div class=cards>"]
        parts += [*map(_picture, pictures), "</div>"]
    return document("Data card", parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    titles = "".join(f"<td class=soft>{html.escape(title)}" for title in head)
    lines = "".join("<tr>" + "".join(_cell(value) for value in row) for row in rows)
    return f"<table><tr>{titles}{lines}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"<td class=number>{value:,}"
    return f"<td>{html.escape(str(value))}"


def _counts(card: Mapping[str, Any]) -> str:
    size = card["image_size"]
    head = (
        "split",
        "pictures",
        "captions",
        "words of a caption",
        "shorter side, pixels",
        "stored as",
    )
    rows = [
        (
            split,
            one["pictures"],
            one["captions"],
            _spread(one["words_per_caption"]),
            _spread(one["shorter_side"]),
            f"{one['bytes'] / 1e6:,.1f} MB, "
            + ", ".join(f"{count:,} {kind}" for kind, count in one["kinds"].items()),
        )
        for split, one in card["splits"].items()
    ]
    shrunk = "as they came" if size is None else f"shrunk to a shorter side of {size} pixels"
    return _table(head, rows) + f"<p class=soft>Pictures are stored {shrunk}.</p>"


def _spread(one: Mapping[str, float]) -> str:
    return f"{one['least']:,} to {one['most']:,}, half have {one['median']:g} or more"


def _left_out(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return ["<h2>Left out</h2><p>Nothing.</p>"]
    rows = [(one["split"], one["entries"], one["reason"], one["first"]) for one in entries]
    return ["<h2>Left out</h2>", _table(("split", "how many", "why", "the first"), rows)]


def _duplicates(found: Mapping[str, Any]) -> list[str]:
    parts = ["<h2>Pictures that look the same</h2>"]
    if not found["groups"]:
        return [*parts, "<p>None.</p>"]
    parts.append(
        f"<p>{found['pictures']:,} pictures in {found['groups']:,} groups; "
        f"<b>{found['groups_across_splits']:,}</b> of the groups are in more than one split.</p>"
    )
    return [
        *parts,
        *(f"<p><small>{html.escape(' = '.join(g))}</small></p>" for g in found["first"]),
    ]


def _vocabulary(found: Mapping[str, Any]) -> list[str]:
    kept = [("all" if least == "1" else f"{least} times or more", n) for least, n in
            found["words_that_stand_at_least"].items()]  # fmt: skip
    shares = [(f"{int(size):,}", f"{share:.1%}") for size, share in
              found["share_of_the_text_by_words"].items()]  # fmt: skip
    return [
        "<h2>Words of the training captions</h2>",
        f"<p>{found['words']:,} different ones among {found['text']:,}. The most frequent: "
        f"{html.escape(', '.join(found['most_frequent']))}.</p>",
        _curve(found["share_of_the_text_by_words"]),
        '<div class=words style="align-items:start;gap:3rem">',
        _table(("words that stand", "how many"), kept),
        _table(("so many frequent words", "share of the text"), shares),
        "</div>",
    ]


def _picture(one: Sample) -> str:
    first, *others = map(html.escape, one.captions)
    shown = image(one.thumbnail, "jpeg", one.captions[0])
    small = "<br>".join([*others, html.escape(one.file_name)])
    return f"<div class=card>{shown}<b>{first}</b><small>{small}</small></div>"


# Charts ---------------------------------------------------------------------------------------


def _bars(counts: Mapping[str, int], across: str, upwards: str) -> str:
    numbers = {int(number): count for number, count in counts.items()}
    first = min(numbers)
    bars = [0] * min(MOST_BARS, max(numbers) - first + 1)
    for number, count in numbers.items():
        bars[min(number - first, len(bars) - 1)] += count
    wide, high = WIDTH / len(bars), HEIGHT / max(bars)
    drawn = "".join(
        f'<rect x="{at * wide:.1f}" y="{HEIGHT - count * high:.1f}" width="{wide * 0.85:.1f}" '
        f'height="{count * high:.1f}"><title>{first + at} {across}: {count:,} {upwards}</title>'
        "</rect>"
        for at, count in enumerate(bars)
    )
    last = first + len(bars) - 1
    more = " or more" if max(numbers) > last else ""
    return _chart(drawn, f"{first} {across}", f"{last}{more}", f"{max(bars):,} {upwards}")


def _curve(shares: Mapping[str, float]) -> str:
    sizes = [0, *map(int, shares)]
    heights = [0.0, *shares.values()]
    largest = max(max(sizes), 1)
    points = " ".join(
        f"{WIDTH * (size / largest) ** 0.5:.1f},{HEIGHT * (1 - share):.1f}"
        for size, share in zip(sizes, heights, strict=True)
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2"/>'
    return _chart(line, "0", f"{largest:,} most frequent words", "all of the text")


def _chart(drawn: str, left: str, right: str, top: str) -> str:
    base = HEIGHT + 20
    frame = f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}" stroke="currentColor"/>'
    texts = (
        f'<text x="0" y="{base}">{left}</text><text x="0" y="-8">{top}</text>'
        f'<text x="{WIDTH}" y="{base}" text-anchor="end">{right}</text>'
    )
    box = f"0 -24 {WIDTH} {HEIGHT + 52}"
    style = "max-width:100%;font-size:13px;fill:currentColor;color:var(--soft)"
    return f'<svg viewBox="{box}" width="{WIDTH}" style="{style}">{drawn}{frame}{texts}</svg>'
