"""Training steps of the decoders, compared to step loops as they are usually written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from caption_ray import config
from caption_ray.benchmark import measuring
from caption_ray.config import Count
from caption_ray.model.captioner import build_decoder
from caption_ray.model.decoder import END, PAD, START, Decoder, DecoderOutput
from caption_ray.model.loss import token_loss

VOCABULARY = 5000

CAPTIONS = 65
"""Captions per step: 13 pictures with 5 each (the original took 64)."""

COCO_WORDS, COCO_SPREAD = 10.5, 2.2
"""Mean and standard deviation of the number of words in COCO's captions; the longest in a batch has
about 20."""

PADDED = 49
"""Steps of the original system, whatever the batch: START and the longest of all captions."""


@dataclass
class Model:
    """A decoder's training step: forward, backward, optimizer, without an encoder."""

    rounds: Count = 5
    """Rounds of measurement."""
    steps: Count = 4
    """Steps per round."""
    bfloat16: bool = False
    """Autocast to bfloat16; False: float32."""
    quick: bool = False
    """Two rounds of one step."""


def run(options: Model) -> None:
    rounds, steps = (2, 1) if options.quick else (options.rounds, options.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if options.bfloat16 else None

    def measure(title: str, ways: dict[str, Callable[[], float]], baseline: str) -> None:
        def many(way: Callable[[], float]) -> Callable[[], float]:
            return lambda: sum(way() for _ in range(steps))

        rates = measuring.in_turn({name: many(way) for name, way in ways.items()}, rounds)
        measuring.record(measuring.report("model", title, "captions", rates, baseline))

    seed = replace(config.seed().model.decoder, dropout=0.0)
    soft = replace(config.coco().model.decoder, dropout=0.0)
    adaptive = replace(soft, name="adaptive")
    threads = torch.get_num_threads()
    own = ("step loop, regions per caption", per_caption_output)
    shared = ("step loop, regions per picture", reprojecting_output)
    for name, settings, regions, loops in (
        ("seed", seed, 64, (("original step loop", original_output),)),
        ("soft", soft, 196, (own, shared)),
    ):
        decoder = build_decoder(settings, 2048, VOCABULARY).to(device)
        batch = Batch.random(regions, device)
        measure(
            f"{name}: {regions} regions of 2048, {CAPTIONS} captions, {threads} threads",
            {
                **{way: training(decoder, batch, baseline, dtype) for way, baseline in loops},
                **ours(decoder, batch, dtype),
            },
            loops[0][0],
        )
    batch = Batch.random(196, device)
    measure(
        f"soft and adaptive: 196 regions of 2048, {CAPTIONS} captions, {threads} threads",
        {
            f"{kind.name}{way.removeprefix('caption_ray')}": step
            for kind in (soft, adaptive)
            for way, step in ours(
                build_decoder(kind, 2048, VOCABULARY).to(device), batch, dtype
            ).items()
        },
        "soft",
    )


@dataclass
class Batch:
    regions: Tensor
    """(B, N, E)"""
    tokens: Tensor
    """int64 (B, K, L), padded to the original's length"""

    @classmethod
    def random(cls, regions: int, device: torch.device) -> Batch:
        rng = np.random.default_rng(0)
        tokens = np.full((CAPTIONS // 5, 5, PADDED), PAD)
        for caption in tokens.reshape(CAPTIONS, PADDED):
            words = int(np.clip(rng.normal(COCO_WORDS, COCO_SPREAD), 6, 30))
            caption[0], caption[words + 1] = START, END
            caption[1 : words + 1] = rng.integers(3, VOCABULARY, words)
        values = rng.random((CAPTIONS // 5, regions, 2048), np.float32)
        return cls(torch.from_numpy(values).to(device), torch.from_numpy(tokens).to(device))


def ours(
    decoder: Decoder, batch: Batch, dtype: torch.dtype | None
) -> dict[str, Callable[[], float]]:
    """As the trainer does it; on a GPU also without compilation."""
    ways = {"caption_ray": training(decoder, batch, None, dtype, compiled=True)}
    if batch.tokens.is_cuda:
        ways["caption_ray, not compiled"] = training(decoder, batch, None, dtype)
    return ways


Forward = Callable[[Decoder, Tensor, Tensor], DecoderOutput]


def training(
    decoder: Decoder,
    batch: Batch,
    forward: Forward | None,
    dtype: torch.dtype | None,
    compiled: bool = False,
) -> Callable[[], float]:
    """A function that trains a copy of the decoder for a step. forward: None for its own."""
    decoder = copy.deepcopy(decoder).train()
    if compiled and batch.tokens.is_cuda:
        decoder.compile_training()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
    tokens = batch.tokens
    if forward is None:
        longest = int((tokens != PAD).any((0, 1)).nonzero().max()) + 1
        tokens = tokens[..., :longest]  # as training/loop.py does

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not None):
            output = (forward or _own)(decoder, batch.regions, tokens)
        loss(output, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(tokens.shape[0] * tokens.shape[1])

    return step


def _own(decoder: Decoder, regions: Tensor, tokens: Tensor) -> DecoderOutput:
    output: DecoderOutput = decoder(regions, tokens)
    return output


def loss(output: DecoderOutput, tokens: Tensor) -> Tensor:
    """Nats per real word."""
    targets = output.targets(tokens)
    return token_loss(output.logits, targets)[0] / len(targets)


# Baselines --------------------------------------------------------------------------------------


def original_output(decoder: Decoder, regions: Tensor, tokens: Tensor) -> DecoderOutput:
    """As the original system does: every caption has its own copy of the regions, each step
    projects them again, and all padded steps predict the whole vocabulary."""
    pictures, k, _ = tokens.shape
    return _step_loop(
        decoder, regions.repeat_interleave(k, dim=0), tokens.flatten(0, 1)[:, None], pictures
    )


def per_caption_output(decoder: Decoder, regions: Tensor, tokens: Tensor) -> DecoderOutput:
    """A loop up to the batch's longest caption, as usually written: every caption has its own copy
    of the regions, and each step projects them again."""
    longest = int((tokens != PAD).any((0, 1)).nonzero().max()) + 1
    output = original_output(decoder, regions, tokens[..., :longest])
    return output._replace(mask=F.pad(output.mask, (0, tokens.shape[-1] - longest)))


def reprojecting_output(decoder: Decoder, regions: Tensor, tokens: Tensor) -> DecoderOutput:
    """A loop up to the batch's longest caption, in which each step projects the regions again and
    predicts the vocabulary for every caption; captions of a picture share its regions."""
    longest = int((tokens != PAD).any((0, 1)).nonzero().max()) + 1
    output = _step_loop(decoder, regions, tokens[..., :longest], len(regions))
    rest = tokens.shape[-1] - longest
    return output._replace(mask=F.pad(output.mask, (0, rest)))


def _step_loop(decoder: Decoder, regions: Tensor, tokens: Tensor, pictures: int) -> DecoderOutput:
    state = decoder.initial_state(decoder.prepare(regions), tokens.shape[1])
    logits, attentions = [], []
    for words in tokens[..., :-1].unbind(-1):
        output, state, attention = decoder.step(words, state, decoder.prepare(regions))
        logits.append(output)
        attentions.append(attention)
    mask = tokens[..., 1:] != PAD
    shape = (pictures, -1, mask.shape[-1])
    return DecoderOutput(
        torch.stack(logits, dim=2)[mask],
        torch.stack(attentions, dim=2).reshape(*shape, regions.shape[1]),
        mask.reshape(shape),
    )
