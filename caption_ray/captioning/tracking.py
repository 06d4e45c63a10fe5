"""Following a run: Weights & Biases, TensorBoard, or nothing but the console.

If a tracker fails, the run says so once and goes on without it; an error here never stops training.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_ray.config import Config, to_dict

INIT_SECONDS = 30.0
"""How long Weights & Biases may take to answer before the run goes on offline."""
FINISH_SECONDS = 60.0
"""How long a tracker may take to send the rest of its data, which is in its files as well."""

Cell: TypeAlias = str | float | bytes | None
"""Of a table; bytes are an encoded picture."""


class Table(NamedTuple):
    """What is looked at row by row."""

    columns: list[str]
    rows: list[list[Cell]]


class Tracker(Protocol):
    """Where rank 0 sends what is to be looked at."""

    id: str | None
    """What a restarted run needs to continue on the same page."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers at an optimizer step."""

    def log_captions(
        self, images: NDArray[np.uint8], captions: list[str], references: list[str], step: int
    ) -> None:
        """Pictures uint8 (n, S, S, 3) with the model's captions and what people wrote."""

    def log_table(self, name: str, table: Table, step: int) -> None:
        """A table with all its pictures."""

    def finish(self) -> None:
        """Write out what is still held back."""


class _Nothing:
    id: str | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def log_captions(
        self, images: NDArray[np.uint8], captions: list[str], references: list[str], step: int
    ) -> None:
        pass

    def log_table(self, name: str, table: Table, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class _Guarded:
    """A tracker that is given up at its first error, with one line that says why and where its data
    is."""

    def __init__(
        self,
        make: Callable[[], _WandB | _TensorBoard],
        resume_id: str | None,
        tell: Callable[[str], None],
    ) -> None:
        self.id, self._tell, self._broken = resume_id, tell, False
        self._tracker: _WandB | _TensorBoard | None = None

        def open() -> None:
            self._tracker = make()
            self.id = self._tracker.id

        self._try(open)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: self._tracker and self._tracker.log(metrics, step))

    def log_captions(
        self, images: NDArray[np.uint8], captions: list[str], references: list[str], step: int
    ) -> None:
        self._try(
            lambda: self._tracker and self._tracker.log_captions(images, captions, references, step)
        )

    def log_table(self, name: str, table: Table, step: int) -> None:
        self._try(lambda: self._tracker and self._tracker.log_table(name, table, step))

    def finish(self) -> None:
        tracker = self._tracker
        if tracker is None:
            return
        # on a thread that may be abandoned: without a network this would wait for hours
        ended: list[Exception | None] = []

        def finish() -> None:
            try:
                tracker.finish()
                ended.append(None)
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        late = TimeoutError(f"it did not finish within {FINISH_SECONDS:.0f} s")
        error = ended[0] if ended else late
        if error is not None:
            self._give_up(error)

    def _try(self, act: Callable[[], object]) -> None:
        if not self._broken:
            try:
                act()
            except Exception as error:  # whatever comes out of the libraries
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            kept = f"; {self._tracker.kept}" if self._tracker else ""
            self._tell(f"Tracking stops, the run goes on: {_reason(error)}{kept}")


def _reason(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _WandB:
    """Online with a key (WANDB_API_KEY or `wandb login`), else, or if that fails, offline below
    `folder`."""

    def __init__(
        self, config: Config, folder: Path, resume_id: str | None, tell: Callable[[str], None]
    ) -> None:
        import wandb

        def init(mode: Any) -> Any:
            settings = wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS)
            return wandb.init(
                project=config.run.project,
                name=config.run.name,
                id=resume_id,
                resume="allow",
                config=to_dict(config),
                dir=str(folder),
                mode=mode,
                settings=settings,
            )

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            self.run = init(mode)
            offline_because = None
        except Exception as error:
            if mode == "offline":
                raise
            wandb.teardown()  # otherwise it remembers the bad key
            self.run = init("offline")
            offline_because = _reason(error)
        self.kept = f"to send what it has: wandb sync {Path(self.run.dir).parent}"
        if offline_because:
            tell(f"Weights & Biases goes on offline: {offline_because}; {self.kept}")
        self.id: str | None = self.run.id
        self.table = wandb.Table
        self.image = wandb.Image
        self.teardown = wandb.teardown
        # everything is drawn over the optimizer step, also after a restart from an earlier one
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def log_captions(
        self, images: NDArray[np.uint8], captions: list[str], references: list[str], step: int
    ) -> None:
        pictures = [
            self.image(image, caption=caption)
            for image, caption in zip(images, captions, strict=True)
        ]
        rows = [list(row) for row in zip(pictures, captions, references, strict=True)]
        table = self.table(columns=["picture", "caption", "reference"], data=rows)
        # also as plain pictures: offline, a table's are staged outside the run's own folder
        self.run.log({"captions": table, "samples": pictures, "step": step})

    def log_table(self, name: str, table: Table, step: int) -> None:
        rows = [
            [self.image(_open(cell)) if isinstance(cell, bytes) else cell for cell in row]
            for row in table.rows
        ]
        pictures = [cell for row in rows for cell in row if isinstance(cell, self.image)]
        whole = self.table(columns=list(table.columns), data=rows)
        # also as plain pictures, for the reason above
        self.run.log({name: whole, f"{name}/pictures": pictures, "step": step})

    def finish(self) -> None:
        self.run.finish()
        # its service writes the last records after `finish` has returned; this waits for that
        self.teardown()


def _open(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text()


class _TensorBoard:
    id: str | None = None

    def __init__(self, config: Config, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.kept = f"what it has is in {folder}"
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("config", f"```\n{to_dict(config)}\n```", 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_captions(
        self, images: NDArray[np.uint8], captions: list[str], references: list[str], step: int
    ) -> None:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self.writer.add_image(f"captions/{number}", image, step, dataformats="HWC")
            self.writer.add_text(f"captions/{number}", f"{caption} ({references[number]})", step)

    def log_table(self, name: str, table: Table, step: int) -> None:
        for number, row in enumerate(table.rows):
            cells = dict(zip(table.columns, row, strict=True))
            for column, cell in cells.items():
                if isinstance(cell, bytes):
                    pixels = np.asarray(_open(cell))
                    tag = f"{name}/{number}/{column}"
                    self.writer.add_image(tag, pixels, step, dataformats="HWC")
            text = [f"{c}: {cell}" for c, cell in cells.items() if not isinstance(cell, bytes)]
            self.writer.add_text(f"{name}/{number}", "  \n".join(text), step)

    def finish(self) -> None:
        self.writer.close()


def start(
    config: Config,
    folder: Path,
    resume_id: str | None,
    tell: Callable[[str], None] = print,
) -> Tracker:
    """The tracker that `run.tracker` names; its files go below the local `folder`.

    resume_id: the tracker id of the run to continue, None for a new one. tell: called with a line
    if tracking goes on offline or stops, and why. Raises nothing.
    """
    if config.run.tracker == "none":
        return _Nothing()

    def make() -> _WandB | _TensorBoard:
        folder.mkdir(parents=True, exist_ok=True)
        if config.run.tracker == "wandb":
            return _WandB(config, folder, resume_id, tell)
        return _TensorBoard(config, folder)

    return _Guarded(make, resume_id, tell)
