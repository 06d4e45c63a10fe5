"""What a run reports: lines for the console, points for the tracker, and its history."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caption_ray import storage
from caption_ray.captioning import run_folder, tracking
from caption_ray.captioning.ownership import Claim
from caption_ray.config import Config
from caption_ray.training import loop

if TYPE_CHECKING:
    from caption_ray.training.console import Console


class Journal:
    """Sums what steps report and logs it once in a while. Only rank 0 logs; the others just sum."""

    def __init__(
        self, config: Config, claim: Claim, console: Console, device: torch.device
    ) -> None:
        self.config, self.console, self.device = config, console, device
        self.claim, self.run = claim, claim.run
        self.self_critical = config.train.stage == "self-critical"
        self.tracker: tracking.Tracker | None = None
        self.history: list[dict[str, float]] = []
        self._folder = Path()
        self._scratch = ExitStack()
        self.begin_epoch()

    def open(self, step: int, tracker_id: str | None) -> None:
        """Continue the run's history from `step`, on the tracker's page of that id. Only for the
        rank that logs."""
        self.history = [
            point for point in run_folder.read_history(self.run) if point["step"] <= step
        ]
        if storage.is_local(self.run):
            self._folder = Path(self.run)
        else:
            self._folder = Path(self._scratch.enter_context(tempfile.TemporaryDirectory()))
        self.tracker = tracking.start(self.config, self._folder, tracker_id, self.console.say)

    @property
    def tracker_id(self) -> str | None:
        return self.tracker.id if self.tracker else None

    def say(self, line: str) -> None:
        if self.tracker is not None:
            self.console.say(line)

    def record(self, metrics: dict[str, float], step: int) -> None:
        """A point in the history and in the tracker."""
        if self.tracker is not None:
            self.tracker.log(metrics, step)
            self.history.append({"step": step, **metrics})

    def begin_epoch(self) -> None:
        """Start the clock and the sums of an epoch (or of what is left of it)."""
        self.epoch_sums = loop.Sums.zero(self.device)
        self.epoch_start = time.perf_counter()
        self._begin_window()

    def _begin_window(self) -> None:
        self.sums = loop.Sums.zero(self.device)
        self.window: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.waits: dict[str, float] = {}
        self.window_start = time.perf_counter()

    def note(self, sums: loop.Sums, norm: Tensor) -> None:
        """Add one step, whose values are still on the device."""
        self.sums.add(sums)
        self.window.append(sums.nll + norm)
        self.norms.append(norm)

    def wait(self, what: str, seconds: float) -> None:
        """Add time that steps spent waiting for `data`, `reward`s or a `checkpoint`."""
        self.waits[what] = self.waits.get(what, 0.0) + seconds

    def require_finite(self, step: int, epoch: int) -> None:
        """Raise NonFiniteLoss if any of the steps since the last line, up to `step`, was not."""
        loop.require_finite(self.window, step - len(self.window), epoch + 1)

    def losses(self, sums: loop.Sums) -> dict[str, float]:
        """What the stage minimises or maximises."""
        if self.self_critical:
            return sums.rewards()
        return sums.losses(self.config.data.caption_length)

    def _told(self, losses: dict[str, float]) -> str:
        if self.self_critical:
            return f"Reward {losses['reward']:.4f} (entropy {losses['entropy']:.4f})"
        return f"Loss {losses['loss']:.4f} (padded {losses['loss_padded']:.4f})"

    def log(self, step: int, epoch: int, step_in_epoch: int, progress: float, rate: float) -> None:
        """Close the window of steps since the last call: a line, and a point in the tracker.

        progress: epochs done, with a fraction; rate: the learning rate. A collective.
        """
        self.require_finite(step, epoch)
        sums = self.sums.reduced()
        seconds = max(time.perf_counter() - self.window_start, 1e-9)
        losses = self.losses(sums)
        images_per_second = float(sums.images) / seconds
        shares = {what: waited / seconds for what, waited in self.waits.items()}
        self.record(
            {
                **{f"train/{name}": value for name, value in losses.items()},
                "train/learning_rate": rate,
                "train/grad_norm": float(torch.stack(self.norms).mean()) if self.norms else 0.0,
                "train/images_per_second": images_per_second,
                **{f"train/{what}_wait_share": share for what, share in shares.items()},
                "epoch": progress,
            },
            step,
        )
        waiting = ", ".join(f"{100 * share:.1f} % for {what}" for what, share in shares.items())
        self.say(
            f"Epoch {epoch + 1} Batch {step_in_epoch - 1} {self._told(losses)} "
            f"{images_per_second:.0f} images/s, waiting {waiting}"
        )
        self.epoch_sums.add(self.sums)
        self._begin_window()

    def log_epoch(
        self, step: int, epoch: int, validation: dict[str, float], errors: list[str]
    ) -> None:
        """A line and a point for a finished epoch; `errors`: this rank's unreadable pictures.

        A collective: every rank must call it.
        """
        seconds = time.perf_counter() - self.epoch_start
        bad = loop.summed(float(len(errors)), self.device)
        trained = self.losses(self.epoch_sums.reduced())
        self.record(
            {
                **validation,
                f"train/epoch_{next(iter(trained))}": next(iter(trained.values())),
                "train/epoch_seconds": seconds,
                "train/bad_images": bad,
                "epoch": epoch + 1.0,
            },
            step,
        )
        self.say(f"Epoch {epoch + 1} {self._told(trained)} validation {validation['val/loss']:.4f}")
        self.say(f"Time taken for 1 epoch {seconds:.2f} sec")
        if bad:  # on every rank or on none
            errors = loop.gathered(errors)
            self.say(f"{bad:.0f} unreadable pictures were skipped, e.g. {errors[:3]}")
            if self.tracker is not None:
                rows: list[list[tracking.Cell]] = [list(e.partition(": ")[::2]) for e in errors]
                table = tracking.Table(["file", "reason"], rows)
                self.tracker.log_table("bad_images", table, step)

    def close(self) -> None:
        """Close the tracker, and store its files and the history beside the checkpoints, unless the
        run belongs to another start by now."""
        if self.tracker is None:
            return
        self.tracker.finish()
        if not self.claim.is_lost():
            run_folder.write_history(self.run, self.history)
            if not storage.is_local(self.run):
                storage.upload(self._folder, self.run)

    def clean_up(self) -> None:
        """Remove temporary files, however the run ended."""
        self._scratch.close()
