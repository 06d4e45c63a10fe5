"""Draws what a run has learnt: its loss curves, its captions, and its attention."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_ray import storage
from caption_ray.captioning.tracking import Cell, Table
from caption_ray.report_page import document, image

LOSS_CURVE = "loss.png"

SHOWN = 6
"""Number of captions in each part of a report."""

SCORES = ("CIDEr-D", "BLEU-4", "ROUGE-L")
"""The scores that are shown for each caption."""

Record: TypeAlias = Mapping[str, Any]
"""A record of evaluate.caption_split, with its `scores`."""


class Curve(NamedTuple):
    """A chart over the training steps."""

    axis: str
    lines: dict[str, tuple[str, str]]
    """Label and line style for each key of the run's history."""


CURVES = {
    "Loss": Curve(
        "loss (nats per word)",
        {"train/loss": ("training", "-"), "val/loss": ("validation", "o-")},
    ),
    "CIDEr-D": Curve(
        "CIDEr-D",
        {"train/reward": ("training, drawn", "-"), "val/CIDEr-D": ("validation", "o-")},
    ),
}
"""The charts of a report, by their headings."""


def write_loss_curve(history: Sequence[dict[str, float]], run: str) -> str:
    """Draw training and validation loss over the steps and save the chart in the run's folder.
    Returns its URI."""
    uri = storage.join(run, LOSS_CURVE)
    storage.write_bytes(uri, _draw(history, CURVES["Loss"], storage.name(run)))
    return uri


def curves(history: Sequence[dict[str, float]], run: str) -> dict[str, bytes]:
    """Those of `CURVES` for which the run's history has points, as PNGs by their headings."""
    return {
        heading: _draw(history, curve, run)
        for heading, curve in CURVES.items()
        if any(key in record for key in curve.lines for record in history)
    }


def _draw(history: Sequence[dict[str, float]], curve: Curve, title: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")  # no display on a cluster
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, (label, style) in curve.lines.items():
        points = [
            (record.get("val/step", record["step"]), record[key])
            for record in history
            if key in record
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel=curve.axis, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    return picture.getvalue()


# What is shown of many captions ---------------------------------------------------------------


def best_and_worst(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The captions with the highest and with the lowest CIDEr-D, the most extreme first."""
    ranked = _ranked(records)
    return {"best": ranked[:SHOWN], "worst": ranked[SHOWN:][::-1][:SHOWN]}


def attended(records: Sequence[Record]) -> list[Record]:
    """A sample of the captions with attention, evenly spaced from the highest to the lowest
    CIDEr-D."""
    ranked = [record for record in _ranked(records) if record.get("attention") is not None]
    places = np.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).astype(int)
    return [ranked[place] for place in places]


def _ranked(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: -float(record["scores"]["CIDEr-D"]))


def looked_at(records: Sequence[Record], failures: Mapping[str, Sequence[Record]]) -> list[Record]:
    """All captions that a report shows, each once."""
    chosen = [*best_and_worst(records).values(), attended(records), *failures.values()]
    return list({id(record): record for part in chosen for record in part}.values())


def heat_maps(record: Record) -> list[tuple[str, bytes]]:
    """The words of a caption, each with a JPEG of the picture under that word's attention map."""
    picture = Image.open(io.BytesIO(record["thumbnail"]))
    return [
        (word, _overlaid(picture, weights, record["box"]))
        for word, weights in zip(record["words"], record["attention"], strict=True)
    ]


def tables(records: Sequence[Record]) -> dict[str, Table]:
    """What `page` shows, as tables and images for a tracker."""
    captions: list[list[Cell]] = [
        [which, record.get("thumbnail"), record["caption"], "\n".join(record["references"]),
         record.get("nearest", ("", 0.0))[0],
         *(float(record["scores"][name]) for name in SCORES), record["file"]]
        for which, chosen in best_and_worst(records).items()
        for record in chosen
    ]  # fmt: skip
    attention: list[list[Cell]] = [
        [picture, word, record["caption"], record["file"]]
        for record in attended(records)
        for word, picture in heat_maps(record)
    ]
    return {
        "captions": Table(
            [
                "which",
                "picture",
                "caption",
                "references",
                "nearest in training",
                *SCORES,
                "file",
            ],
            captions,
        ),
        "attention": Table(["looked at", "word", "caption", "file"], attention),
    }


# The report -----------------------------------------------------------------------------------


def page(
    title: str,
    figures: Mapping[str, float],
    skipped: Mapping[str, str],
    records: Sequence[Record],
    curves: Mapping[str, bytes],
    failures: Mapping[str, Sequence[Record]],
) -> str:
    """A self-contained HTML page: metrics, charts, the best and the worst captions by CIDEr-D,
    those that fail in a certain way, and for some captions an attention map of each word.

    `records` are those of evaluate.caption_split with their `scores`, and maybe `nearest` (see
    failures.nearest); `curves` are PNGs, `failures` captions, by heading.
    """
    rows = [
        f"<tr><td>{html.escape(name)}<td class=number>{value:.4g}"
        for name, value in figures.items()
    ] + [
        f"<tr><td>{html.escape(name)}<td class=soft>{html.escape(why)}"
        for name, why in skipped.items()
    ]
    parts = [f"<table>{''.join(rows)}</table>"]
    for heading, picture in curves.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append(image(picture, "png", f"{heading} over the steps"))
    ranked = best_and_worst(records).items()
    galleries = {f"{which.capitalize()} captions, by CIDEr-D": chosen for which, chosen in ranked}
    for heading, chosen in {**galleries, **failures}.items():
        if chosen:
            cards = "".join(map(_card, chosen))
            parts += [f"<h2>{html.escape(heading)}</h2>", f"<div class=cards>{cards}</div>"]
    looked = attended(records)
    if looked:
        parts += ["<h2>Where each word looked</h2>", *map(_words, looked)]
    return document(title, parts)


def _card(record: Record) -> str:
    picture = record.get("thumbnail")
    shown = image(picture, "jpeg", record["caption"]) if picture else ""
    references = "<br>".join(map(html.escape, record["references"]))
    scores = ", ".join(f"{name} {record['scores'][name]:.2f}" for name in SCORES)
    nearest, share = record.get("nearest", ("", 0.0))
    learnt = f"<br>Nearest in training ({share:.0%}): <i>{html.escape(nearest)}</i>"
    return (
        f"<div class=card>{shown}<b>{html.escape(record['caption'])}</b>"
        f"<small>{references}{learnt if nearest else ''}<br>{scores}<br>"
        f"{html.escape(record['file'])}</small></div>"
    )


def _words(record: Record) -> str:
    maps = "".join(
        f"<figure>{image(picture, 'jpeg', word)}"
        f"<figcaption>{html.escape(word)}</figcaption></figure>"
        for word, picture in heat_maps(record)
    )
    return f"<p><b>{html.escape(record['caption'])}</b></p><div class=words>{maps}</div>"


def _overlaid(picture: Image.Image, weights: NDArray[np.float32], box: Sequence[float]) -> bytes:
    """The picture in grey with the weights (rows, columns) over `box`, coloured, as JPEG."""
    from matplotlib import colormaps

    width, height = picture.size
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, (width, height) * 2, strict=True)
    )
    relative = Image.fromarray(weights / max(float(weights.max()), 1e-9))
    smooth = relative.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    strength = np.zeros((height, width), np.float32)
    strength[top:bottom, left:right] = np.clip(np.asarray(smooth), 0, 1)
    heat = colormaps["inferno"](strength)[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    share = 0.75 * strength[..., None]
    mixed = (1 - share) * 0.6 * grey + share * heat
    buffer = io.BytesIO()
    Image.fromarray(mixed.astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
