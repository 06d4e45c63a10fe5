"""Pictures of what a run learnt: its loss, its captions, and where it looked."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_ray import storage

LOSS_CURVE = "loss.png"

SHOWN = 6
"""Captions in each part of a report."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d1a17; --soft: #6b645c; --paper: #faf8f5; --card: #fff;
        --line: #e3ddd4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ece7e0; --soft: #a59d93; --paper: #171513; --card: #211e1b; --line: #38332d; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1100px; margin: 3rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 3rem; }
p.soft, small, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td { padding: .2rem 1.5rem .2rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid var(--line); }
img { max-width: 100%; border-radius: 6px; display: block; }
.cards { display: grid; gap: 1.25rem;
         grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: 1rem; }
.card b { display: block; margin: .6rem 0 .3rem; font-weight: 600; }
.words { display: flex; flex-wrap: wrap; gap: .75rem; } .words figure { margin: 0; width: 120px; }
"""


def write_loss_curve(history: Sequence[dict[str, float]], run: str) -> str:
    """Draw training and validation loss over the steps into the run's folder; returns the URI."""
    import matplotlib

    matplotlib.use("Agg")  # no display on a cluster
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (
        ("train/loss", "training", "-"),
        ("val/loss", "validation", "o-"),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per word)", title=storage.name(run))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    uri = storage.join(run, LOSS_CURVE)
    storage.write_bytes(uri, picture.getvalue())
    return uri


# The report -----------------------------------------------------------------------------------


def page(
    title: str,
    figures: Mapping[str, float],
    skipped: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    loss_curve: bytes | None,
) -> str:
    """A self-contained HTML page: metrics, loss curves, the best and the worst captions by CIDEr-D,
    and for some of them a heat map for each word.

    `records` are those of evaluate.caption_split with their `scores`; `loss_curve` is a PNG.
    """
    rows = [
        f"<tr><td>{html.escape(name)}<td class=number>{value:.4g}"
        for name, value in figures.items()
    ] + [
        f"<tr><td>{html.escape(name)}<td class=soft>{html.escape(why)}"
        for name, why in skipped.items()
    ]
    ranked = sorted(records, key=lambda record: -float(record["scores"]["CIDEr-D"]))
    worst = [record for record in ranked[SHOWN:]][::-1][:SHOWN]
    parts = [f"<h1>{html.escape(title)}</h1>", f"<table>{''.join(rows)}</table>"]
    if loss_curve is not None:
        parts += ["<h2>Loss</h2>", _image(loss_curve, "png", "Loss over the steps")]
    for heading, chosen in (("Best captions", ranked[:SHOWN]), ("Worst captions", worst)):
        if chosen:
            cards = "".join(map(_card, chosen))
            parts += [f"<h2>{heading}, by CIDEr-D</h2>", f"<div class=cards>{cards}</div>"]
    attended = [record for record in ranked if record.get("attention") is not None]
    if attended:
        parts.append("<h2>Where each word looked</h2>")
        places = np.linspace(0, len(attended) - 1, min(SHOWN, len(attended))).astype(int)
        parts += [_heat_maps(attended[place]) for place in places]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    viewport = '<meta name=viewport content="width=device-width">'
    return f"<!doctype html><html lang=en>{head}{viewport}<body>{''.join(parts)}</html>"


def _card(record: Mapping[str, Any]) -> str:
    picture = record.get("thumbnail")
    shown = _image(picture, "jpeg", record["caption"]) if picture else ""
    references = "<br>".join(map(html.escape, record["references"]))
    scores = ", ".join(
        f"{name} {record['scores'][name]:.2f}" for name in ("CIDEr-D", "BLEU-4", "ROUGE-L")
    )
    return (
        f"<div class=card>{shown}<b>{html.escape(record['caption'])}</b>"
        f"<small>{references}<br>{scores}<br>{html.escape(record['file'])}</small></div>"
    )


def _heat_maps(record: Mapping[str, Any]) -> str:
    picture = Image.open(io.BytesIO(record["thumbnail"]))
    maps = "".join(
        f"<figure>{_image(_overlaid(picture, weights, record['box']), 'jpeg', word)}"
        f"<figcaption>{html.escape(word)}</figcaption></figure>"
        for word, weights in zip(record["words"], record["attention"], strict=True)
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


def _image(data: bytes, kind: str, text: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{encoded}">'
