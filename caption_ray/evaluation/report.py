"""Pictures of what a run learnt."""

from __future__ import annotations

import io
from collections.abc import Sequence

from caption_ray import storage

LOSS_CURVE = "loss.png"


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
