"""Errors that starting the workers again would not mend: which they are, and who hears of them."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from caption_ray import storage
from caption_ray.captioning import run_folder
from caption_ray.data.pipeline import TooManyBadImages
from caption_ray.training import loop

if TYPE_CHECKING:
    from caption_ray.training.console import Console

PERMANENT = (ValueError, TooManyBadImages, loop.NonFiniteLoss)


def is_permanent(error: Exception) -> bool:
    return isinstance(error, PERMANENT) or storage.lasts(error)


def note(run: str, console: Console, error: Exception) -> None:
    """Tell why the run cannot go on: the driver, workers that start, and readers of its folder; and
    keep Ray Train from showing stacks of it."""
    for logger in ("ray.train", None):  # one of its loggers is named after a file
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    reason = f"{type(error).__name__}: {error}"
    console.fail(reason)
    with contextlib.suppress(OSError):  # that nothing can be written may be the reason
        run_folder.write_failure(run, reason)
