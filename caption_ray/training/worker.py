"""One worker of Ray Train: its share of each epoch, the steps, and when to log and to save."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from caption_ray import cluster, storage
from caption_ray.config import Config
from caption_ray.data.pipeline import DataSet, Preparation, TooManyBadImages, batches
from caption_ray.data.plan import plan_epoch
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.encoder import is_weights_uri
from caption_ray.model.search import generate
from caption_ray.training import checkpoint, loop, tracking
from caption_ray.training.checkpoint import State
from caption_ray.training.console import Console

HISTORY_FILE, FAILURE_FILE = "history.json", "failure.txt"

_NO_PICTURES = np.empty(0, np.int64)
PERMANENT = (ValueError, TooManyBadImages, loop.NonFiniteLoss)
"""Errors that starting the workers again would not mend."""


@dataclass(frozen=True)
class Job:
    """All that a worker is told."""

    config: Config
    run: str
    """URI of the run's folder."""
    dataset: ray.ObjectRef
    vocabulary: Vocabulary
    console: Console


def work(loop_config: dict[str, Any]) -> None:
    """The training function that Ray Train runs on every worker."""
    job: Job = loop_config["job"]
    if storage.exists(storage.join(job.run, FAILURE_FILE)):
        return
    try:
        _train(_Worker(job))
    except PERMANENT as error:
        # Ray Train starts workers anew after any error; these find the reason and end at once
        message = f"{type(error).__name__}: {error}"
        storage.write_bytes(storage.join(job.run, FAILURE_FILE), message.encode())
        raise


def _train(worker: _Worker) -> None:
    worker.resume()
    config = worker.config.train
    for epoch in range(worker.epoch, config.epochs):
        worker.begin_epoch(epoch)
        for example, numbers in worker.training_examples():
            worker.step(example, numbers)
            if (worker.step_in_epoch - 1) % config.log_every == 0:
                worker.log()
            if config.checkpoint_every and worker.total_steps % config.checkpoint_every == 0:
                worker.checkpoint()
        worker.end_epoch()
    worker.finish()


def read_history(run: str) -> list[dict[str, float]]:
    """The logged points of a run: step, epoch and metrics; empty for a new run."""
    try:
        history: list[dict[str, float]] = json.loads(
            storage.read_bytes(storage.join(run, HISTORY_FILE))
        )
        return history
    except FileNotFoundError:
        return []


class _Worker:
    """One training process: its share of the data, the model and where it stands."""

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.is_chief = self.rank == 0
        self.device: torch.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            # Ray gives a process one thread; processes on one node share its cores evenly
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // context.get_local_world_size()))
        cluster.configure_data()
        # one of Ray Train's loggers is named after a file, so that LoggingConfig misses it
        logging.getLogger().setLevel(logging.WARNING)
        self.dataset: DataSet = ray.get(job.dataset)
        self.decode_cpus = self._decode_cpus()
        loop.set_determinism(self.config.train.seed, self.config.train.deterministic)
        self.captioner = self._build().to(self.device)
        self.model = ray.train.torch.prepare_model(self.captioner, move_to_device=self.device)
        train = self.config.train
        self.optimizer = torch.optim.AdamW(
            self.captioner.parameter_groups(
                train.learning_rate, train.encoder_learning_rate, train.weight_decay
            ),
            fused=True,
        )
        self.autocast = loop.autocast_dtype(train.precision, self.device)
        self.ledger: NDArray[np.bool_] = np.zeros(sum(self.dataset.rows("train")), bool)
        self.steps_per_epoch = self._num_steps(None)
        self.epoch = self.total_steps = self.step_in_epoch = 0
        self.metrics: dict[str, float] = {}
        self.best_loss: float | None = None
        self.history: list[dict[str, float]] = []
        self.tracker: tracking.Tracker | None = None
        self.tracking_folder = Path()

    def _build(self) -> Captioner:
        """The captioner with its initial weights, the same on every rank."""
        encoder = self.config.model.encoder
        local: str | None = None
        with tempfile.TemporaryDirectory() as folder:
            if is_weights_uri(encoder.weights):
                uri = storage.resolve(encoder.weights)
                local = str(storage.download(uri, Path(folder, storage.name(uri))))
            return build_captioner(
                self.config.model, len(self.job.vocabulary), local, pretrained=True
            )

    def _decode_cpus(self) -> float:
        if self.config.data.decode_workers is not None:
            return self.config.data.decode_workers
        reserved = self.world_size * self.config.train.cpus_per_worker
        free = cluster.num_cpus() - reserved
        if free < 1:
            raise ValueError(
                f"--train.num-workers {self.world_size} x --train.cpus-per-worker "
                f"{self.config.train.cpus_per_worker} leave {free:g} of the cluster's CPUs for "
                "decoding, which needs 1: lower --train.cpus-per-worker (0.5, say)"
            )
        return max(1, free / self.world_size)

    # Where the run stands ---------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the run's latest checkpoint if there is one."""
        tracker_id = None
        if storage.exists(storage.join(self.job.run, "latest.json")):
            uri = checkpoint.find(self.job.run)
            state, optimizer, ledger = checkpoint.load_for_resume(uri, self.captioner, self.device)
            self.optimizer.load_state_dict(optimizer)
            self.epoch, self.total_steps = state.epoch, state.step
            self.step_in_epoch = state.epoch_step
            self.metrics, self.best_loss = dict(state.metrics), state.best_loss
            self.ledger, tracker_id = ledger, state.tracker_id
            self.history = [p for p in read_history(self.job.run) if p["step"] <= state.step]
            self._say(f"Resumed from {uri} (epoch {self.epoch + 1}, step {self.total_steps})")
        if self.is_chief:
            local = storage.is_local(self.job.run)
            self.tracking_folder = Path(self.job.run if local else tempfile.mkdtemp())
            self.tracker = tracking.start(self.config, self.tracking_folder, tracker_id)

    def _say(self, line: str) -> None:
        if self.is_chief:
            self.job.console.say(line)

    def _num_steps(self, consumed: NDArray[np.bool_] | None) -> int:
        """Steps of an epoch: as many as the largest share needs, so that all ranks take equally
        many without asking each other."""
        share = math.ceil(self._num_pictures(consumed) / self.world_size)
        return math.ceil(share / self.config.train.batch_size)

    def _num_pictures(self, consumed: NDArray[np.bool_] | None) -> int:
        """Pictures of an epoch, or of what is left of it, over all ranks."""
        wanted = np.ones_like(self.ledger) if consumed is None else ~consumed
        return int(wanted[: self.config.data.max_images].sum())

    # Batches ----------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Start the clock and the sums of an epoch (or of what is left of it)."""
        self.epoch = epoch
        self.epoch_sums = loop.Sums.zero(self.device)
        self.window_sums = loop.Sums.zero(self.device)
        self.window: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.errors: list[str] = []
        self.epoch_start = self.window_start = time.perf_counter()
        self.waited = 0.0
        self.model.train()
        self.steps_this_epoch = self.step_in_epoch + self._num_steps(self.ledger)

    def _batches(self, split: str, epoch: int | None) -> Iterator[Any]:
        """This rank's share of a split: shuffled, augmented and without what the ledger holds for
        training (epoch given), as stored for validation."""
        train, data = self.config.train, self.config.data
        training = epoch is not None
        pieces = plan_epoch(
            self.dataset.rows(split),
            rank=self.rank,
            world_size=self.world_size,
            shuffle=(train.seed, epoch) if epoch is not None else None,
            limit=data.max_images if training else train.validation_images,
            consumed=self.ledger if training else None,
        )
        prepare = Preparation(
            self.config.model.encoder,
            data,
            self.job.vocabulary,
            (train.seed, epoch) if epoch is not None else None,
        )
        return batches(
            self.dataset.splits[split],
            pieces,
            prepare,
            batch_size=train.batch_size,
            cpus=self.decode_cpus,
            keep_order=train.deterministic or not training,
        )

    def training_examples(self) -> Iterator[tuple[loop.Example, NDArray[np.int64]]]:
        """Equally many on every rank, each with the numbers of its pictures; times the wait."""
        stream = self._batches("train", self.epoch)
        size = self.config.model.encoder.image_size
        for _ in range(self.steps_this_epoch - self.step_in_epoch):
            asked = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                example, numbers = loop.to_example(None, None, size, self.device), _NO_PICTURES
            else:
                self._note_errors(batch.errors)
                example = loop.to_example(batch.images, batch.tokens, size, self.device)
                numbers = batch.numbers
            self.waited += time.perf_counter() - asked
            yield example, numbers
        assert next(stream, None) is None

    def _note_errors(self, errors: list[str]) -> None:
        self.errors += errors
        share = self._num_pictures(None) / self.world_size
        if len(self.errors) > self.config.data.max_bad_images * share:
            listed = "\n  ".join(self.errors[:20])
            raise TooManyBadImages(
                f"{len(self.errors)} of about {share:.0f} pictures of epoch {self.epoch + 1} are "
                f"unreadable, more than --data.max-bad-images {self.config.data.max_bad_images}:"
                f"\n  {listed}"
            )

    # Steps ------------------------------------------------------------------------------------

    def step(self, example: loop.Example, numbers: NDArray[np.int64]) -> None:
        """One optimizer step, noted in the ledger."""
        train = self.config.train
        total = self.steps_per_epoch * train.epochs
        factor = loop.learning_rate_factor(self.total_steps, train, total)
        self.learning_rate = loop.set_learning_rate(self.optimizer, factor)
        loop.seed_step(train.seed, self.total_steps, self.rank)
        sums, norm = loop.train_step(self.model, example, self.optimizer, train, self.autocast)
        self.window_sums.add(sums)
        self.window.append(sums.nll + norm)
        self.norms.append(norm)
        self.ledger[numbers] = True
        self.total_steps += 1
        self.step_in_epoch += 1
        if self.is_chief:
            title = f"epoch {self.epoch + 1}/{train.epochs}"
            self.job.console.progress(title, self.step_in_epoch, self.steps_this_epoch)

    def log(self) -> None:
        """Close the window of steps since the last call: a line, and a point in the tracker."""
        loop.require_finite(self.window, self.total_steps - len(self.window), self.epoch + 1)
        sums = self.window_sums.reduced()
        now = time.perf_counter()
        seconds = max(now - self.window_start, 1e-9)
        losses = sums.losses(self.config.data.caption_length)
        self._record(
            {
                **{f"train/{name}": value for name, value in losses.items()},
                "train/learning_rate": self.learning_rate,
                "train/grad_norm": float(torch.stack(self.norms).mean()) if self.norms else 0.0,
                "train/images_per_second": float(sums.images) / seconds,
                "train/data_wait_share": self.waited / seconds,
                "epoch": self.epoch + self.step_in_epoch / self.steps_per_epoch,
            }
        )
        self._say(
            f"Epoch {self.epoch + 1} Batch {self.step_in_epoch - 1} Loss {losses['loss']:.4f} "
            f"(padded {losses['loss_padded']:.4f}) {float(sums.images) / seconds:.0f} images/s, "
            f"waiting {100 * self.waited / seconds:.1f} %"
        )
        self.epoch_sums.add(self.window_sums)
        self.window_sums = loop.Sums.zero(self.device)
        self.window, self.norms, self.waited, self.window_start = [], [], 0.0, now

    def _record(self, metrics: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(metrics, self.total_steps)
            self.history.append({"step": self.total_steps, **metrics})

    def end_epoch(self) -> None:
        """Validate, show a few captions, save."""
        if self.window:
            self.log()
        seconds = time.perf_counter() - self.epoch_start
        trained = self.epoch_sums.reduced().losses(self.config.data.caption_length)
        validated = self._validate()
        self.metrics = {f"val/{name}": value for name, value in validated.items()}
        bad = torch.tensor(float(len(self.errors)))
        if dist.is_initialized():
            bad = bad.to(self.device)
            dist.all_reduce(bad)
        self._record(
            {
                **self.metrics,
                "train/epoch_loss": trained["loss"],
                "train/epoch_seconds": seconds,
                "train/bad_images": float(bad),
                "epoch": self.epoch + 1,
            }
        )
        self._say(
            f"Epoch {self.epoch + 1} Loss {trained['loss']:.4f} "
            f"(padded {trained['loss_padded']:.4f}) validation {validated['loss']:.4f}"
        )
        self._say(f"Time taken for 1 epoch {seconds:.2f} sec")
        if float(bad):
            self._say(f"{float(bad):.0f} unreadable pictures were skipped, e.g. {self.errors[:3]}")
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.ledger[:] = False
        self.checkpoint(validated["loss"])

    def _validate(self) -> dict[str, float]:
        shown: list[Any] = []
        size = self.config.model.encoder.image_size

        def examples() -> Iterator[loop.Example]:
            for batch in self._batches("val", None):
                if not shown:
                    shown.append(batch)
                yield loop.to_example(batch.images, batch.tokens, size, self.device)

        sums = loop.validate(self.captioner, examples(), self.autocast)
        total = (sums or loop.Sums.zero(self.device)).reduced()
        if self.tracker is not None and shown:
            self._show_captions(shown[0])
        return total.losses(self.config.data.caption_length)

    def _show_captions(self, batch: Any) -> None:
        count = self.config.train.sample_captions
        images, tokens = batch.images[:count], batch.tokens[:count]
        if not len(images):
            return
        self.captioner.eval()
        search = replace(self.config.search, beam_size=1)
        found = generate(self.captioner, torch.tensor(images, device=self.device), search, 1)
        self.captioner.train()
        decode = self.job.vocabulary.decode
        captions = [decode(line) for line in found.tokens[:, 0].tolist()]
        references = [decode(lines[0].tolist()) for lines in tokens]
        assert self.tracker is not None
        self.tracker.log_captions(images, captions, references, self.total_steps)

    # Checkpoints ------------------------------------------------------------------------------

    def checkpoint(self, loss: float | None = None) -> None:
        """Save here, upload in the background; `loss`: of a validation just done.

        Rank 0 writes; every rank reports, which is a barrier.
        """
        loop.require_finite(self.window, self.total_steps - len(self.window), self.epoch + 1)
        ledger = torch.from_numpy(self.ledger).to(self.device, torch.uint8)
        if dist.is_initialized():
            dist.all_reduce(ledger, op=dist.ReduceOp.MAX)
        seen = ledger.bool().cpu().numpy()
        is_best = loss is not None and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss = loss
        state = State(
            step=self.total_steps,
            epoch=self.epoch,
            epoch_step=self.step_in_epoch,
            metrics=self.metrics,
            tracker_id=self.tracker.id if self.tracker else None,
            best_loss=self.best_loss,
        )
        saved = None
        if self.is_chief:
            folder = tempfile.mkdtemp(prefix=checkpoint.PREFIX)
            checkpoint.save(
                Path(folder),
                self.captioner,
                self.job.vocabulary,
                self.config.model,
                self.config.search,
                state,
                self.optimizer.state_dict(),
                seen,
            )
            saved = Checkpoint.from_directory(folder)
        history = json.dumps(self.history).encode()
        ray.train.report(
            {**self.metrics, "step": self.total_steps, "epoch": self.epoch},
            checkpoint=saved,
            checkpoint_dir_name=checkpoint.folder_name(self.total_steps),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_Upload(
                self.job.run, state, self.config.train.keep_checkpoints, is_best, history
            ),
        )

    def finish(self) -> None:
        """Close the tracker and put its files beside the checkpoints."""
        if self.tracker is not None:
            self.tracker.finish()
            if not storage.is_local(self.job.run):
                storage.upload(self.tracking_folder, self.job.run)


@dataclass(frozen=True)
class _Upload:
    """What Ray calls on its upload thread with the saved folder."""

    run: str
    state: State
    keep: int
    is_best: bool
    history: bytes

    def __call__(self, saved: Checkpoint, name: str) -> Checkpoint:
        storage.write_bytes(storage.join(self.run, HISTORY_FILE), self.history)
        uri = checkpoint.commit(
            Path(saved.path), self.run, self.state, keep=self.keep, is_best=self.is_best
        )
        return Checkpoint(uri)
