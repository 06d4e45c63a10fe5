"""One worker of Ray Train: the steps, and when to log, to validate and to save."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointUploadMode

from caption_ray import cluster
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError, Resumed, State
from caption_ray.captioning.ownership import Claim
from caption_ray.config import Config
from caption_ray.data.dataset import DataSet
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner
from caption_ray.model.encoder import to_tensor
from caption_ray.model.search import generate
from caption_ray.training import loop, permanence, self_critical, validation
from caption_ray.training.console import Console
from caption_ray.training.feed import Feed, cpus_for_decoding
from caption_ray.training.initial import initial_captioner
from caption_ray.training.interruption import Interruptions, Wish
from caption_ray.training.journal import Journal
from caption_ray.training.rewards import RemoteRewards
from caption_ray.training.upload import Upload

UPLOADS = 2
"""Uploads that may be pending at a time: the one in progress, and the next."""


@dataclass(frozen=True)
class Assignment:
    """What the driver hands to each worker."""

    config: Config
    claim: Claim
    """The claim on the run, with its URI."""
    dataset: ray.ObjectRef
    """DataSet, of pictures or of features."""
    vocabulary: Vocabulary
    console: Console
    start: ray.ObjectRef | None
    """The checkpoint.Loaded that the run starts from; its own run may have pruned it since."""
    cider: ray.ObjectRef | None
    """CIDEr-D with the document frequencies of the training split; only in the self-critical
    stage."""


def work(loop_config: dict[str, Any]) -> bool:
    """The training function that Ray Train runs on every worker; whether the run is complete."""
    assignment: Assignment = loop_config["assignment"]
    worker = None
    try:
        if _is_over(assignment):
            return False
        worker = _Worker(assignment)
        return _train(worker)
    except Exception as error:
        if not permanence.is_permanent(error):
            raise
        with contextlib.suppress(OSError):  # storage that cannot be read may be the very reason
            assignment.claim.require()
        permanence.note(assignment.claim.run, assignment.console, error)
        if ray.train.get_context().get_world_size() == 1:
            return False
        # raised so that Ray Train ends the other workers, which wait for this one. It would then
        # restart all of them, for which the driver does not wait; they find the reason, and end
        raise
    finally:
        if worker is not None:
            worker.journal.clean_up()


def _is_over(assignment: Assignment) -> bool:
    """Whether the run has ended for good: then a worker that starts has nothing to do."""
    try:
        return assignment.console.failure() is not None or assignment.claim.is_lost()
    except RayActorError:  # the driver has closed its console
        return True


def _train(worker: _Worker) -> bool:
    worker.resume()
    config = worker.config.train
    while worker.epoch < config.epochs and not worker.is_stale():
        worker.begin_epoch()
        for batch in worker.feed.training(worker.epoch):
            worker.step(batch)
            if (worker.step_in_epoch - 1) % config.log_every == 0:
                worker.log()
            wish = worker.interruptions.after_step()
            due = config.checkpoint_every and worker.total_steps % config.checkpoint_every == 0
            ended = worker.step_in_epoch == worker.steps_this_epoch  # then end_epoch saves
            if wish is Wish.STOP or ((wish is Wish.SAVE or due) and not ended):
                worker.checkpoint()
            if wish is Wish.STOP:
                worker.stop()
                return False
        worker.end_epoch()
    worker.finish()
    return True


class _Worker:
    """One training process: its model, its pictures and its place in the run."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment, self.config = assignment, assignment.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.is_chief = self.rank == 0
        without_gpu = self.config.train.backend == "gloo" and not torch.cuda.is_available()
        self.device: torch.device = (
            torch.device("cpu") if without_gpu else ray.train.torch.get_device()
        )
        # processes on one node share its cores evenly
        self.cores = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        if self.device.type == "cpu":
            # Ray limits each process to one
            torch.set_num_threads(self.config.train.threads or self.cores)
        cluster.configure_data()
        # one of Ray Train's loggers is named after a file, so that LoggingConfig misses it
        logging.getLogger().setLevel(logging.WARNING)
        dataset: DataSet = ray.get(assignment.dataset)
        self.feed = Feed(
            self.config,
            dataset,
            assignment.vocabulary,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            decode_cpus=(decode_cpus := self._decode_cpus()),
            decode_threads=self._decode_threads(decode_cpus),
        )
        self.steps_per_epoch = self.feed.num_steps()
        self.epoch = self.total_steps = self.step_in_epoch = self.pictures = 0
        self.saved_step = 0
        """Step of the newest checkpoint, or of the one that the run resumed from."""
        self.metrics: dict[str, float] = {}
        self.validated: set[str] = set()
        self.interruptions = Interruptions(assignment.console, self.config.train)
        self.uploads = threading.Semaphore(UPLOADS)
        self.journal = Journal(self.config, assignment.claim, assignment.console, self.device)
        self._build_model()

    def _build_model(self) -> None:
        """The captioner with its initial weights, the same on every rank, and what trains it."""
        train = self.config.train
        loop.set_determinism(train.seed, train.deterministic)
        words, start = len(self.assignment.vocabulary), self.assignment.start
        captioner = initial_captioner(self.config, words, start and ray.get(start))
        self.captioner = captioner.to(self.device)
        self.model = ray.train.torch.prepare_model(self.captioner, move_to_device=self.device)
        self.average = loop.averaged(self.captioner, train.ema_decay)
        if train.compile and self.device.type == "cuda":
            self.captioner.decoder.compile_training()
        self.optimizer = torch.optim.AdamW(
            self.captioner.parameter_groups(
                train.learning_rate,
                train.encoder_learning_rate,
                train.weight_decay,
                train.encoder_layer_decay,
            ),
            fused=True,
        )
        self.autocast = loop.autocast_dtype(train.precision, self.device)
        self.rewards = self.generator = None
        if self.assignment.cider is not None:
            self.rewards = RemoteRewards(self.assignment.cider, self.assignment.vocabulary)
            self.generator = torch.Generator(self.device)

    def _decode_cpus(self) -> float:
        try:
            return cpus_for_decoding(self.config, self.world_size)
        except ValueError as error:
            # in a resumed run the reason is a missing node, which may come back
            if run_folder.latest_step(self.assignment.claim.run) > 0:
                raise RuntimeError(str(error)) from None
            raise

    def _decode_threads(self, decode_cpus: float) -> int:
        """Threads for near decoding; 0: it is far."""
        data = self.config.data
        is_near = self.cores >= decode_cpus if data.decode == "auto" else data.decode != "far"
        return (data.decode_workers or self.cores) if is_near else 0

    @property
    def learnt(self) -> Captioner:
        """The captioner as it is validated, saved and served."""
        if self.average is None:
            return self.captioner
        averaged: Any = self.average.module
        return cast(Captioner, averaged)

    # Where the run stands ---------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the run's latest checkpoint if there is one."""
        tracker_id = None
        uri = self._find_latest()
        if uri:
            # an upload from a host that was cut off may still move the pointer and prune
            uri, resumed = run_folder.read(self._find_latest, self._load_for_resume)
            state, extra, self.feed.ledger = resumed
            self.optimizer.load_state_dict(extra["optimizer"])
            if self.average is not None:
                # the average is served; the weights that training continues with are beside the
                # optimizer
                self.average.load_state_dict(loop.as_average(self.captioner, extra["updates"]))
                self.captioner.load_state_dict(extra["weights"])
            self.epoch, self.total_steps = state.epoch, state.step
            self.saved_step = state.step
            self.step_in_epoch = state.epoch_step
            self.metrics, tracker_id = dict(state.metrics), state.tracker_id
            # a sum over all ranks
            self.pictures = state.pictures if self.is_chief else 0
        if self.is_chief:
            self.journal.open(self.total_steps, tracker_id)
            self.validated = set(run_folder.read_validations(self.assignment.claim.run))
        if uri:
            place = f"epoch {self.epoch + 1}, step {self.total_steps}"
            self.journal.say(f"Resumed from {uri} ({place}) with {self.world_size} worker(s)")

    def _find_latest(self) -> str:
        """The checkpoint to go on from, the same for all ranks, empty if there is none."""
        run = self.assignment.claim.run
        begun = self.is_chief and run_folder.has_begun(run)
        return "".join(loop.gathered([run_folder.find(run, "latest")] if begun else []))

    def _load_for_resume(self, uri: str) -> tuple[str, Resumed]:
        """The checkpoint at `uri`; CheckpointError on all ranks if one of them cannot load it."""
        resumed, errors = None, []
        try:
            sizes = self.feed.ledger.sizes
            resumed = checkpoint.load_for_resume(uri, self.captioner, self.device, sizes)
        except CheckpointError as error:
            errors = [str(error)]
        errors = loop.gathered(errors)
        if resumed is None or errors:
            raise CheckpointError(errors[0])
        return uri, resumed

    def begin_epoch(self) -> None:
        """Start an epoch, or what is left of it."""
        self.journal.begin_epoch()
        self.model.train()
        if self.rewards is not None:
            self_critical.as_policy(self.model)
        left = self.feed.num_steps(self.feed.ledger)
        self.steps_this_epoch = self.step_in_epoch + left
        # steps that would have led to this place with the present number of workers
        self.place = (self.epoch + 1) * self.steps_per_epoch - left

    def is_stale(self) -> bool:
        """Whether early stopping ends the run: too many validations without a better one (a
        collective: every rank must call it)."""
        patience = self.config.train.patience
        stale = patience is not None and validation.stale(self.journal.history) >= patience
        if loop.summed(float(stale and self.is_chief), self.device) == 0:
            return False
        criterion = validation.criterion(self.journal.history)
        self.journal.say(f"No better {criterion} in {patience} validations: stopping")
        return True

    # Steps ------------------------------------------------------------------------------------

    def step(self, batch: loop.DeviceBatch) -> None:
        """One optimizer step, noted in the ledger."""
        train = self.config.train
        total = self.steps_per_epoch * train.epochs
        factor = loop.learning_rate_factor(self.total_steps, train, total, self.place)
        self.learning_rate = loop.set_learning_rate(self.optimizer, factor)
        seed = loop.seed_step(train.seed, self.total_steps, self.rank)
        if self.rewards is None:
            own_words = loop.own_words(train, self.epoch)
            sums, norm = loop.train_step(
                self.model, batch, self.optimizer, train, self.autocast, own_words
            )
        else:
            assert self.generator is not None
            sums, norm, waited = self_critical.train_step(
                self.model, self.captioner, batch, self.rewards,
                self.optimizer, train, self.config.search.max_length,
                self.generator.manual_seed(seed), self.autocast,
            )  # fmt: skip
            self.journal.wait("reward", waited)
        if self.average is not None:
            self.average.update_parameters(self.captioner)
        self.journal.wait("data", self.feed.take_wait())
        self.journal.note(sums, norm)
        self.feed.seen(batch.numbers)
        self.pictures += len(batch.numbers)
        self.total_steps += 1
        self.step_in_epoch += 1
        self.place += 1
        if self.is_chief:
            title = f"epoch {self.epoch + 1}/{train.epochs}"
            self.assignment.console.progress(title, self.step_in_epoch, self.steps_this_epoch)

    def log(self) -> None:
        """Log a line on the console and a point in the tracker."""
        self.journal.log(
            self.total_steps,
            self.epoch,
            self.step_in_epoch,
            self.place / self.steps_per_epoch,
            self.learning_rate,
        )

    def end_epoch(self) -> None:
        """Compute the validation loss, show a few captions, save, and have the checkpoint's
        captions validated."""
        if self.journal.window:
            self.log()
        losses = self._validation_loss()
        self.metrics = {f"val/{name}": value for name, value in losses.items()}
        self.journal.log_epoch(self.total_steps, self.epoch, self.metrics, self.feed.errors)
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.feed.end_epoch()
        self._note_validations()
        self.checkpoint(to_validate=True)

    def _validation_loss(self) -> dict[str, float]:
        batches = (self.feed.to_device(batch) for batch in self.feed.validation())
        sums = loop.validate(self.learnt, batches, self.autocast)
        total = (sums or loop.Sums.zero(self.device)).reduced()
        if self.is_chief and self.config.train.sample_captions:
            self._show_captions(*self.feed.samples(self.config.train.sample_captions))
        return total.losses(self.config.data.caption_length)

    def _show_captions(self, images: NDArray[np.uint8], references: list[str]) -> None:
        search = replace(self.config.search, beam_size=1, temperature=0.0)
        self.learnt.eval()
        found = generate(self.learnt, to_tensor(images).to(self.device), search, 1)
        captions = [self.assignment.vocabulary.decode(line) for line in found.tokens[:, 0].tolist()]
        assert self.journal.tracker is not None
        self.journal.tracker.log_captions(images, captions, references, self.total_steps)

    def _note_validations(self) -> None:
        """Record the results of validations that ended since the last call."""
        if not self.is_chief:
            return
        for name, found in sorted(
            run_folder.read_validations(self.assignment.claim.run, self.validated).items()
        ):
            self.validated.add(name)
            step = run_folder.step_of(name)
            if "error" in found:
                self.journal.say(f"Validation of {name} failed: {found['error']}")
                continue
            # in the order of steps, like all that is recorded: it belongs to an earlier one, where
            # the loss stands already
            scores = {metric: found[metric] for metric in found if metric not in self.metrics}
            decided = validation.criterion(self.journal.history)
            self.journal.record({**scores, "val/step": float(step)}, self.total_steps)
            self.journal.say(
                f"Step {step} {run_folder.CRITERION} {found[run_folder.CRITERION]:.4f} "
                f"({found['val/seconds']:.0f} s)"
            )
            if (decides := validation.criterion(self.journal.history)) != decided:
                self.journal.say(validation.DECIDES[decides])

    # Checkpoints ------------------------------------------------------------------------------

    def checkpoint(self, to_validate: bool = False) -> None:
        """Save locally, upload in the background, and validate afterwards if asked to.

        Rank 0 writes; every rank reports, which is a barrier. If uploads are slower than
        checkpoints come, training waits, so that the cost of a failure stays bounded.
        """
        begun = time.perf_counter()
        self.journal.require_finite(self.total_steps, self.epoch)
        seen = self.feed.shared_ledger()
        state = State(
            step=self.total_steps,
            epoch=self.epoch,
            epoch_step=self.step_in_epoch,
            metrics=self.metrics,
            tracker_id=self.journal.tracker_id,
            pictures=int(loop.summed(self.pictures, self.device)),
        )
        saved = None
        if self.is_chief:
            self.uploads.acquire()
            folder = tempfile.mkdtemp(prefix=run_folder.PREFIX)
            extra: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.average is not None:
                extra["weights"] = self.captioner.state_dict()
                extra["updates"] = int(self.average.n_averaged)
            checkpoint.save(
                Path(folder),
                self.learnt,
                self.assignment.vocabulary,
                self.config.model,
                self.config.search,
                state,
                extra,
                seen,
            )
            saved = Checkpoint.from_directory(folder)
        name = run_folder.folder_name(self.total_steps)
        upload = Upload(
            self.assignment.claim, self.assignment.console, state, list(self.journal.history),
            self.uploads,
            keep=self.config.train.keep_checkpoints, after=self.saved_step, to_validate=to_validate,
        )  # fmt: skip
        self.saved_step = self.total_steps
        ray.train.report(
            {**self.metrics, "step": self.total_steps, "epoch": self.epoch},
            checkpoint=saved,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            validation=to_validate and saved is not None,
        )
        self.journal.wait("checkpoint", time.perf_counter() - begun)

    def finish(self) -> None:
        """Wait for uploads and validations in the background, and close the tracker."""
        ray.train.get_all_reported_checkpoints()
        self._note_validations()
        self.stop()

    def stop(self) -> None:
        """Close the tracker. Only uploads are waited for, which Ray Train does by itself."""
        self.interruptions.close()
        self.journal.close()
