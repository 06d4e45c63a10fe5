"""One training step and one validation pass: plain torch, with or without torch.distributed.

Losses are ratios of global sums: the negative log-likelihood of all words in the step, over all
workers, divided once by their number. So N workers with batch B take the same step as one worker
with batch N * B, however their captions differ in length.
B images, K captions per image, L caption length, M real words, V vocabulary, N regions.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from caption_ray.config import TrainConfig
from caption_ray.model.decoder import END, PAD, START, DecoderOutput
from caption_ray.model.encoder import to_inputs
from caption_ray.model.loss import doubly_stochastic, token_loss


class NonFiniteLoss(RuntimeError):
    """The loss, or its gradient, became infinite or not a number; the message names the step."""


@dataclass
class DeviceBatch:
    """What one step of one worker learns from, on its device."""

    inputs: Tensor
    """Pictures uint8 (B, 3, S, S), or a frozen encoder's features of them, float16 (B, N, E)"""
    tokens: Tensor
    """int64 (B, K, L), cut at the longest caption"""
    weight: float
    """1; 0 for a stand-in batch of a worker that has run out of pictures before the others"""
    num_words: int | None = None
    """Real words, the ends of captions included, ..."""
    num_captions: int | None = None
    """... and captions; None where the host does not know them."""
    numbers: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Numbers of the pictures in the training split; none for a stand-in."""
    captions: list[list[str]] = field(default_factory=list)
    """What people wrote about each picture, where the stage needs it."""


@dataclass
class Sums:
    """Sums over pictures. They are added over steps and workers, and divided only once."""

    nll: Tensor
    """Negative log-likelihood of all real words, in nats."""
    words: Tensor
    """Real words, the end of each caption included."""
    captions: Tensor
    images: Tensor
    reward: Tensor
    """Scores of the captions, where these are the model's own (self-critical stage)."""

    @staticmethod
    def zero(device: torch.device) -> Sums:
        return Sums(*torch.zeros(5, dtype=torch.float64, device=device))

    def add(self, other: Sums) -> None:
        for name, value in vars(other).items():
            getattr(self, name).add_(value)

    def reduced(self) -> Sums:
        """The sums over all workers."""
        if not dist.is_initialized():
            return self
        total = torch.stack(list(vars(self).values()))
        dist.all_reduce(total)
        return Sums(*total)

    def losses(self, padded_length: int) -> dict[str, float]:
        """Nats per word; and `loss_padded`, per caption and divided by the padded length, which is
        how the original system (and TensorFlow's tutorial) reported its loss."""
        nll, words, captions = float(self.nll), float(self.words), float(self.captions)
        return {
            "loss": nll / max(words, 1),
            "loss_padded": nll / max(captions, 1) / padded_length,
        }

    def rewards(self) -> dict[str, float]:
        """Of the model's own captions: the mean score, and the entropy in nats per word, which
        falls to zero when it draws the same captions again and again."""
        return {
            "reward": float(self.reward) / max(float(self.captions), 1),
            "entropy": float(self.nll) / max(float(self.words), 1),
        }


def summed(value: float, device: torch.device) -> float:
    """The sum over all workers (a collective: every worker must call it)."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def gathered(items: list[str]) -> list[str]:
    """The items of all workers (a collective: every worker must call it)."""
    if not dist.is_initialized():
        return items
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]


def to_device(
    inputs: NDArray[np.uint8] | NDArray[np.float16] | Tensor | None,
    tokens: NDArray[np.int32] | None,
    image_size: int,
    device: torch.device,
) -> DeviceBatch:
    """The arrays of a `Batch` as tensors on the device; None gives a stand-in without weight."""
    weight = 1.0
    if inputs is None or tokens is None or not (tokens[..., 1:] != PAD).any():
        # every parameter must take part, or DDP's all-reduce would wait for ever
        inputs = np.zeros((1, image_size, image_size, 3), np.uint8)
        tokens = np.array([[[START, END]]], np.int32)
        weight = 0.0
    longest = int((tokens != PAD).any((0, 1)).nonzero()[0].max()) + 1
    on_host = [to_inputs(inputs), torch.tensor(tokens[..., :longest])]
    if device.type == "cuda":
        on_host = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in on_host]
    on_device = [tensor.to(device, non_blocking=True) for tensor in on_host]
    real = tokens[..., 1:] != PAD
    counts = int(real.sum()), int(real.any(-1).sum())
    return DeviceBatch(on_device[0], on_device[1].long(), weight, *counts)


def learning_rate_factor(
    step: int, settings: TrainConfig, total_steps: int, place: int | None = None
) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then cosine to zero.

    place: where the run stands among `total_steps`, if that is not `step`. After a change of the
    number of workers it is not, because an epoch then has another number of steps.
    """
    place = step if place is None else place
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (place - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's peak learning rate (`peak_lr`); returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
    return float(optimizer.param_groups[0]["lr"])


def seed_step(seed: int, step: int, rank: int) -> int:
    """Seed the randomness of a step (dropout) with nothing but the run's seed, the step and the
    rank, so that a resumed run draws what an uninterrupted one would have drawn. Returns the
    seed."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(mixed)
    return mixed


def set_determinism(seed: int, strict: bool) -> None:
    """Seed all generators. strict: allow deterministic kernels only; torch raises where there is
    none."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(strict)
    torch.backends.cudnn.benchmark = not strict


def averaged(captioner: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of the weights, to be updated after each step; None if `decay`
    is 0.

    Each update keeps the share `decay` of the average. The first updates keep less, so that the
    initial weights are soon forgotten.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def update(average: Any, current: Any, updates: Tensor | int) -> None:
        share = min(decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(share)(average, current, updates)  # type: ignore[no-untyped-call]

    return AveragedModel(captioner, multi_avg_fn=update, use_buffers=True)


def as_average(captioner: nn.Module, updates: int) -> dict[str, Tensor]:
    """The state of an AveragedModel whose average is the captioner's weights."""
    weights = {f"module.{name}": value for name, value in captioner.state_dict().items()}
    return {**weights, "n_averaged": torch.tensor(updates)}


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that `train.precision` means on this device; None: float32 throughout."""
    if precision == "auto":
        precision = "bfloat16" if _has_bfloat16_units(device) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def _has_bfloat16_units(device: torch.device) -> bool:
    """Whether matrix products are much faster in bfloat16. On a CPU that has bfloat16 instructions
    but no AMX they are slower than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def train_step(
    model: nn.Module,
    batch: DeviceBatch,
    optimizer: Optimizer,
    settings: TrainConfig,
    autocast: torch.dtype | None = None,
    own_words: float = 0.0,
) -> tuple[Sums, Tensor]:
    """One optimizer step on this worker's share of the batch.

    model: a Captioner, plain or wrapped in DDP. own_words: share of the previous words that are the
    model's own (scheduled sampling; see Captioner.forward and `own_words`). Returns this worker's
    sums and the global gradient norm before clipping, both still on the device.
    """
    parts = list(
        zip(
            batch.inputs.chunk(settings.accumulation),
            batch.tokens.chunk(settings.accumulation),
            strict=True,
        )
    )
    counts = _counts(batch)
    shared = counts.reduced()
    nll = torch.zeros_like(counts.nll)
    per_word = 1 / shared.words.clamp(min=1)
    per_caption = settings.attention_regularization / shared.captions.clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    for number, (images, tokens) in enumerate(parts):
        last = number == len(parts) - 1
        wait = isinstance(model, DistributedDataParallel) and not last
        num_words = batch.num_words if len(parts) == 1 else None
        with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with _autocast(images, autocast):
                output: DecoderOutput = model(images, tokens, own_words, num_words)
            loss, part_nll = token_loss(
                output.logits, output.targets(tokens), settings.label_smoothing
            )
            loss = per_word * loss
            if settings.attention_regularization > 0:
                spread, _ = doubly_stochastic(output.attention, output.mask)
                loss = loss + per_caption * spread
            backward(loss, batch)
        nll += batch.weight * part_nll.detach()
    norm = take_step(optimizer, settings)
    counts.nll.copy_(nll)
    return counts, norm


def backward(loss: Tensor, batch: DeviceBatch) -> None:
    """Backpropagate this worker's part of a loss that is a sum over all workers."""
    # DDP averages gradients over the workers, but the loss is a sum
    workers = dist.get_world_size() if dist.is_initialized() else 1
    (loss * (batch.weight * workers)).backward()  # type: ignore[no-untyped-call]


def take_step(optimizer: Optimizer, settings: TrainConfig) -> Tensor:
    """Clip the gradients and take the step; returns their global norm before clipping."""
    norm = nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], settings.max_grad_norm
    )
    optimizer.step()
    return norm


def own_words(settings: TrainConfig, epoch: int) -> float:
    """Share of the previous words that are the model's own in `epoch` (counted from 0)."""
    return settings.scheduled_sampling * min(1.0, epoch / settings.scheduled_sampling_epochs)


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[DeviceBatch], autocast: torch.dtype | None = None
) -> Sums | None:
    """Sums over this worker's share of the validation split; None if it is empty."""
    model.eval()
    total: Sums | None = None
    for batch in batches:
        counts = _counts(batch)
        with _autocast(batch.inputs, autocast):
            output = model(batch.inputs, batch.tokens, 0.0, batch.num_words)
        _, nll = token_loss(output.logits, output.targets(batch.tokens))
        counts.nll.copy_(batch.weight * nll)
        total = total or Sums.zero(nll.device)
        total.add(counts)
    model.train()
    return total


def require_finite(losses: list[Tensor], first_step: int, epoch: int) -> None:
    """Raise NonFiniteLoss naming the first bad step; `losses` are those from `first_step` on.

    Called only once in a while, because each look makes the host wait for the device.
    """
    finite = torch.isfinite(torch.stack(losses)).tolist() if losses else []
    if not all(finite):
        step = first_step + finite.index(False)
        raise NonFiniteLoss(
            f"the loss or its gradient is not finite at step {step} (epoch {epoch}): lower "
            "--train.learning-rate, lengthen --train.warmup-steps or set --train.precision float32"
        )


def _autocast(images: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)


def _counts(batch: DeviceBatch) -> Sums:
    """The sums that are known before the forward pass."""
    device, images = batch.tokens.device, batch.inputs.shape[0]
    if batch.num_words is None or batch.num_captions is None:
        real = batch.tokens[..., 1:] != PAD
        words, captions = int(real.sum()), int(real.any(-1).sum())
    else:
        words, captions = batch.num_words, batch.num_captions
    counts = torch.tensor([0, words, captions, images, 0], dtype=torch.float64) * batch.weight
    if device.type == "cuda":
        counts = counts.pin_memory()
    return Sums(*counts.to(device, non_blocking=True))
