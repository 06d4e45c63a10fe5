"""The Ray Serve deployment that owns a device: it captions pictures in batches, and switches to
another checkpoint between two batches without losing a request. ingress.py calls it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from pydantic import BaseModel, ConfigDict
from ray.serve import metrics

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError
from caption_ray.captioning.predictor import Caption, Images, Predictor
from caption_ray.config import RULES, EncoderConfig, Positive, SearchConfig, Uri, from_dict
from caption_ray.data.tokenizer import Tokenizer
from caption_ray.data.transforms import mode_of
from caption_ray.serving.batching import Batcher, QueueFullError
from caption_ray.serving.contract import Answer, NextWords, Options

DEPLOYMENT = "Captioner"
"""Name of the deployment, in serve_config.yaml and in Ray's dashboard."""

HANG_S = 60.0
"""A batch that runs for longer than this many seconds means that the device hangs."""

MAX_CPU_LANES = 2
"""Batches that run at a time without a GPU; those that do share the cores evenly."""

logger = logging.getLogger("ray.serve")


class Serving(BaseModel):
    """`user_config` of `Captioner` in serve_config.yaml, which may change while it serves."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, str_strip_whitespace=True, **RULES
    )

    checkpoint: Uri
    """`best` or `latest` of the run in `storage` that was written to last, or the URI of a
    checkpoint or run (see `run_folder.find`); several URIs, separated by commas, caption
    together."""

    storage: Uri
    """URI of the folder that holds all runs, or of one run."""

    follow_interval_s: Positive | None
    """Seconds between looks for a newer checkpoint, which then takes the place of the one that is
    served; null: only when this setting changes. A checkpoint's own URI never gets newer; of runs
    that caption together, a newer checkpoint of any is enough."""

    def find(self) -> str:
        """The checkpoint that is meant now. Raises CheckpointError if there is none."""
        if self.checkpoint in run_folder.POINTERS:
            return run_folder.find(self.storage, self.checkpoint)
        return run_folder.find(self.checkpoint)


@dataclass(frozen=True)
class Outdated:
    """The picture was prepared for another model: prepare it for this encoder and retry."""

    encoder: EncoderConfig


@dataclass(frozen=True)
class Full:
    """The queue is full."""

    retry_after: int
    """Seconds."""


Reply = Answer | Outdated | Full
"""All are returned, not raised, as Ray logs every exception of a replica with its stack trace."""


class _Key(NamedTuple):
    """Only pictures with equal keys are captioned together."""

    search: SearchConfig
    num_return: int


class _Item:
    """A picture in the queue."""

    def __init__(
        self, image: Images, options: Options, on_words: Callable[[NextWords], None] | None
    ) -> None:
        self.image, self.options, self.on_words = image, options, on_words
        self.told = 0

    def tell(self, start: int, words: list[str], tokenizer: Tokenizer) -> None:
        """Pass on `words`, which are the caption's from index `start` on, except those passed on
        before: a batch that failed is run again."""
        assert self.on_words is not None
        new = words[max(0, self.told - start) :]
        if new:
            before = tokenizer.separator if self.told else ""
            self.told = start + len(words)
            self.on_words(NextWords(new, before + tokenizer.join(new)))


class CaptionerReplica:
    """Captions prepared pictures on one device, all that are waiting at once."""

    def __init__(
        self,
        fallback: str,
        cpu_threads: int | None,
        cuda_graphs: bool,
        max_batch_size: int,
        batch_wait_timeout_s: float,
        max_queue_s: float,
        max_queue: int,
    ) -> None:
        """`fallback` is the URI of the checkpoint to serve if the one that `user_config` names
        cannot be, at the start; `Arguments` explains the rest. Ray calls `reconfigure` next, which
        loads a checkpoint."""
        self.fallback = fallback
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids()["GPU"])
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self.cpu_threads = cpu_threads or os.cpu_count() or 1
        self.cuda_graphs = cuda_graphs
        self.max_batch_size = max_batch_size
        self.batcher: Batcher[_Key, _Item, Answer | Outdated] = Batcher(
            self._run,
            max_batch_size=max_batch_size,
            wait_s=batch_wait_timeout_s,
            max_queue_s=max_queue_s,
            max_queue=max_queue,
            # Cores working on separate batches get more done than all of them on one batch, where
            # they wait for each other.
            num_lanes=1 if has_gpu else min(MAX_CPU_LANES, self.cpu_threads),
        )
        self.predictor: Predictor | None = None
        self.serving: Serving | None = None
        self.refused: dict[str, str] | None = None
        self.refused_config: dict[str, str] | None = None
        """Kept until the next configuration, whatever checkpoints come meanwhile."""
        self.loader = ThreadPoolExecutor(1)  # loads one checkpoint at a time, beside the batches
        self.follower: asyncio.Task[None] | None = None
        self.batch_sizes = metrics.Histogram(
            "caption_ray_batch_size",
            description="Pictures captioned together.",
            boundaries=[1, 2, 4, 8, 16, 32, 64],
        )
        self.batch_seconds = metrics.Histogram(
            "caption_ray_batch_seconds",
            description="Time on the device for a batch.",
            boundaries=[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10],
        )
        self.waiting = metrics.Gauge(
            "caption_ray_waiting_pictures", description="Pictures waiting for the device."
        )
        self.changes = metrics.Counter(
            "caption_ray_checkpoint_changes",
            description="Checkpoints put into service or refused.",
            tag_keys=("result",),
        )

    # Captions -----------------------------------------------------------------------------------

    async def __call__(self, image: Images, encoder: EncoderConfig, options: Options) -> Reply:
        """The captions of one picture that was prepared for `encoder`."""
        return await self._submit(image, encoder, options, None)

    async def stream(
        self, image: Images, encoder: EncoderConfig, options: Options
    ) -> AsyncIterator[NextWords | Reply]:
        """Yields words as soon as they are certain, then what `__call__` returns."""
        loop = asyncio.get_running_loop()
        words: asyncio.Queue[NextWords | None] = asyncio.Queue()

        def on_words(new: NextWords) -> None:  # called on the lane's thread
            loop.call_soon_threadsafe(words.put_nowait, new)

        task = loop.create_task(self._submit(image, encoder, options, on_words))
        task.add_done_callback(lambda _: words.put_nowait(None))
        try:
            while (new := await words.get()) is not None:
                yield new
            yield await task
        finally:
            task.cancel()

    async def _submit(
        self,
        image: Images,
        encoder: EncoderConfig,
        options: Options,
        on_words: Callable[[NextWords], None] | None,
    ) -> Reply:
        assert self.predictor is not None
        if not _same_input(encoder, self.predictor.encoder_config):
            return Outdated(self.predictor.encoder_config)
        key = _Key(options.search(self.predictor.search), options.num_return)
        try:
            reply, batch_size = await self.batcher.submit(key, _Item(image, options, on_words))
        except QueueFullError as error:
            return Full(error.retry_after)
        if isinstance(reply, Answer):
            reply = dataclasses.replace(reply, batch_size=batch_size)
        return reply

    def _run(self, key: _Key, items: Sequence[_Item]) -> list[Answer | Outdated]:
        """Caption a batch, on a lane's thread."""
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, self.cpu_threads // self.batcher.num_running))
        predictor = self.predictor  # one for the whole batch, even if it is replaced meanwhile
        assert predictor is not None
        size = predictor.encoder_config.image_size
        if any(item.image.shape != (size, size, 3) for item in items):
            return [Outdated(predictor.encoder_config) for _ in items]
        start = time.perf_counter()
        found = predictor.predict(
            np.stack([item.image for item in items]),
            key.search,
            key.num_return,
            [item.options.seed for item in items],
            _teller(items, predictor.vocabulary.tokenizer)
            if any(item.on_words for item in items)
            else None,
        )
        self.batch_seconds.observe(time.perf_counter() - start)
        self.batch_sizes.observe(len(items))
        self.waiting.set(self.batcher.num_waiting)
        rows, columns = predictor.captioner.grid
        return [
            Answer(
                captions if item.options.attention else [_without_attention(c) for c in captions],
                predictor.uri,
                batch_size=len(items),
                box=(0.0, 0.0, 1.0, 1.0),
                regions=rows * columns,
            )
            for item, captions in zip(items, found, strict=True)
        ]

    # The checkpoint -----------------------------------------------------------------------------

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve what `user_config` (see `Serving`) says; Ray calls it at the start and on changes.

        A new checkpoint is loaded beside the current one, captions a picture, and then replaces it
        between two batches. One that cannot is refused: the current one stays, and `info` says why.
        Raises CheckpointError only if there is no current one, and the fallback fails, too.
        """
        if self.follower is not None:
            self.follower.cancel()
        try:
            self.serving = from_dict(Serving, user_config, "user_config of the Captioner")
        except ValueError as error:
            self._refuse(str(user_config), str(error))
            self.refused_config = self.refused
        else:
            self.refused_config = None
            await self._serve(self.serving)
        if self.predictor is None:
            assert self.refused is not None
            try:
                await self._load(lambda: run_folder.find(self.fallback))
            except (ValueError, OSError) as error:
                raise CheckpointError(
                    f"{self.refused['checkpoint']} cannot be served: {self.refused['error']}; "
                    f"nor can {self.fallback}: {error}"
                ) from error
        if self.serving is not None and self.serving.follow_interval_s is not None:
            self.follower = asyncio.get_running_loop().create_task(self._follow(self.serving))

    async def _follow(self, serving: Serving) -> None:
        while True:
            await asyncio.sleep(serving.follow_interval_s or 0)
            await self._serve(serving, again=False)

    async def _serve(self, serving: Serving, again: bool = True) -> None:
        """Serve the checkpoint that `serving` refers to now, unless it is served already. One that
        was refused before is only retried with `again`."""
        loop = asyncio.get_running_loop()
        uri = serving.checkpoint
        try:
            uri = await loop.run_in_executor(self.loader, serving.find)
            if self.refused is not None and self.refused["checkpoint"] == uri and not again:
                return
            if self.predictor is None or self.predictor.uri != uri:
                await self._load(serving.find)
            self.refused = None
        except Exception as error:  # no error may stop serving, or the checks for newer ones
            self._refuse(uri, str(error) or repr(error))

    async def _load(self, find: Callable[[], str]) -> None:
        def load(uri: str) -> Predictor:
            loaded = checkpoint.load(uri)
            predictor = Predictor(loaded, self.device, cuda_graphs=self.cuda_graphs)
            predictor.warm_up(self.max_batch_size)
            return predictor

        self.predictor = await asyncio.get_running_loop().run_in_executor(
            self.loader, run_folder.read, find, load
        )
        self.changes.inc(tags={"result": "served"})
        logger.info(f"Captioning with {self.predictor.uri} on {self.device}")

    def _refuse(self, uri: str, error: str) -> None:
        if self.refused is None or self.refused["error"] != error:  # report each error once
            logger.error(f"Checkpoint {uri} is refused, the previous one stays: {error}")
            self.changes.inc(tags={"result": "refused"})
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.refused = {"checkpoint": uri, "error": error, "time": now}

    # State --------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Facts about the model and the checkpoint that this captioner serves."""
        assert self.predictor is not None
        return describe(self.predictor, self.refused_config or self.refused)

    def check_health(self) -> None:
        """Raises RuntimeError if the device hangs, so that Ray replaces the captioner."""
        if self.batcher.busy_s > HANG_S:
            raise RuntimeError(f"a batch has been running for {self.batcher.busy_s:.0f} s")


def describe(predictor: Predictor, refused: dict[str, str] | None) -> dict[str, Any]:
    """The content of `/info` for a predictor; `refused` is the checkpoint that was last refused."""
    models = [member.model for member in predictor.members]
    checkpoints: list[dict[str, Any]] = [
        {
            "uri": member.uri,
            "step": member.state.step,
            "epoch": member.state.epoch,
            "metrics": member.state.metrics,
        }
        for member in predictor.members
    ]
    if len(checkpoints) == 1:
        (served,) = checkpoints
    else:
        served = {"uri": predictor.uri, "step": None, "epoch": None, "metrics": {}}
        served["members"] = checkpoints
    return {
        "model": {
            "encoder": ", ".join(model.encoder.name for model in models),
            "decoder": ", ".join(model.decoder.name for model in models),
            "image_size": predictor.encoder_config.image_size,
            "vocabulary": len(predictor.vocabulary),
            "tokenizer": predictor.vocabulary.tokenizer.name,
            "parameters": sum(p.numel() for p in predictor.captioner.parameters()),
            "device": str(predictor.device),
        },
        "checkpoint": {**served, "refused": refused},
        "search": dataclasses.asdict(predictor.search),
    }


def _same_input(one: EncoderConfig, other: EncoderConfig) -> bool:
    """Whether both expect pictures to be prepared in the same way."""
    first, second = (
        (encoder.image_size, encoder.image_fit, mode_of(encoder.interpolation))
        for encoder in (one, other)
    )
    return first == second


def _without_attention(caption: Caption) -> Caption:
    return dataclasses.replace(caption, attention=None)


def _teller(items: Sequence[_Item], tokenizer: Tokenizer) -> Callable[[int, list[str]], None]:
    told = [0] * len(items)

    def on_words(image: int, words: list[str]) -> None:
        if items[image].on_words is not None:
            items[image].tell(told[image], words, tokenizer)
        told[image] += len(words)

    return on_words
