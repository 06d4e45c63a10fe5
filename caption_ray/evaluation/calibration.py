"""Does a captioner know when it is wrong? Its log-probability beside the scores of its captions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 10


class Calibration(NamedTuple):
    """Captions in groups of equal size, from the least to the most probable."""

    confidence: NDArray[np.float64]
    """Mean log-probability per word of each group, the end of the caption included, in nats."""
    score: NDArray[np.float64]
    """Mean CIDEr-D of each group."""
    error: NDArray[np.float64]
    """Standard error of that mean."""
    correlation: float
    """Spearman's rank correlation of both, over all captions: 1 if the more probable caption is
    always the better one, 0 if the probability says nothing."""


def calibration(records: Sequence[Mapping[str, Any]]) -> Calibration | None:
    """Of records of evaluate.caption_split with their `scores`; None for fewer than twenty, and
    where all have the same score or probability."""
    if len(records) < 2 * BINS:
        return None
    confidence = np.array([r["log_prob"] / (len(r["caption"].split()) + 1) for r in records])
    score = np.array([float(r["scores"]["CIDEr-D"]) for r in records])
    if np.ptp(confidence) == 0 or np.ptp(score) == 0:
        return None
    groups = np.array_split(confidence.argsort(), BINS)
    return Calibration(
        np.array([confidence[group].mean() for group in groups]),
        np.array([score[group].mean() for group in groups]),
        np.array([score[group].std(ddof=1) / len(group) ** 0.5 for group in groups]),
        float(np.corrcoef(_ranks(confidence), _ranks(score))[0, 1]),
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    means = last - (counts - 1) / 2
    ranks: NDArray[np.float64] = means[group]
    return ranks


def draw(found: Calibration) -> bytes:
    """A PNG of the groups."""
    import matplotlib

    matplotlib.use("Agg")  # no display on a cluster
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.errorbar(found.confidence, found.score, found.error, fmt="o-", capsize=3, markersize=4)
    axes.set(
        xlabel="log-probability per word (nats), mean of a tenth of the captions",
        ylabel="CIDEr-D, mean and standard error",
        title=f"rank correlation {found.correlation:.2f}",
    )
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    return picture.getvalue()
