"""The upload of a saved checkpoint, which goes on in the background while training continues."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from ray.train import Checkpoint

from caption_ray import storage
from caption_ray.captioning import run_folder
from caption_ray.captioning.checkpoint import State
from caption_ray.captioning.ownership import Claim
from caption_ray.training import permanence
from caption_ray.training.console import Console


@dataclass(frozen=True)
class Upload:
    """What Ray Train calls on its upload thread with the folder of the saved checkpoint."""

    claim: Claim
    console: Console
    state: State
    history: list[dict[str, float]]
    slot: threading.Semaphore
    """Released at the end: training waits where uploads are slower than checkpoints come."""
    keep: int
    after: int
    to_validate: bool
    """These three as in `run_folder.commit`."""

    def __call__(self, saved: Checkpoint, name: str) -> Checkpoint:
        try:
            self.claim.require()
            run_folder.write_history(self.claim.run, self.history)
            uri = run_folder.commit(
                Path(saved.path), self.claim.run, self.state, keep=self.keep, after=self.after,
                to_validate=self.to_validate, claim=self.claim,
            )  # fmt: skip
        except Exception as error:
            # only here: after a successful upload Ray Train removes the folder, and complains
            # with a stack if somebody else did
            shutil.rmtree(saved.path, ignore_errors=True)
            if permanence.is_permanent(error):
                permanence.note(self.claim.run, self.console, error)
            raise
        finally:
            self.slot.release()
        return Checkpoint(storage.arrow_uri(uri))
