"""Self-critical training: a captioner learns from how well its own captions score. Plain torch.

Captions are drawn from the captioner, scored by CIDEr-D against what people wrote, and become
likelier the more they score above the other captions of the same picture (REINFORCE, Williams 1992;
SCST, Rennie et al., 1612.00563; the mean of the others as baseline: Luo, 2003.09971).
B images, K captions drawn per image, T words, L = T + 1 tokens, M real words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from caption_ray.captioning.metrics import CiderD
from caption_ray.config import TrainConfig
from caption_ray.data.tokenizer import Tokenizer
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.model.search import sample
from caption_ray.training import loop

END_WORD = "<end>"
"""The last word of every caption that is scored, so that a caption that breaks off loses n-grams.
(Without it, captions learn to end in "with a" and the like.)"""

Captions: TypeAlias = Sequence[Sequence[str]]
"""The human captions of each picture."""

Score: TypeAlias = Callable[[NDArray[np.int64], Captions], Callable[[], NDArray[np.float32]]]
"""Starts to score captions, ids (B, K, T), and returns a function that waits for the scores, (B,
K). The device goes on working meanwhile."""


class Rewards:
    """Scores captions with `CiderD`, counting the end of a caption as a word."""

    def __init__(self, cider: CiderD, vocabulary: Vocabulary) -> None:
        """cider: with the training split's document frequencies (of `as_scored` captions)."""
        self.cider, self.vocabulary = cider, vocabulary

    def __call__(self, tokens: NDArray[np.int64], captions: Captions) -> NDArray[np.float32]:
        """Scores (B, K) of ids (B, K, T)."""
        rewards = np.zeros(tokens.shape[:2], np.float32)
        for image, (rows, written) in enumerate(zip(tokens.tolist(), captions, strict=True)):
            references = [
                self.cider.vector(as_scored(caption, self.vocabulary.tokenizer))
                for caption in written
            ]
            if not references:  # the picture could not be read, so nothing is learnt from it
                continue
            for k, row in enumerate(rows):
                told = [END_WORD if i == END else self.vocabulary.words[i] for i in row if i != PAD]
                rewards[image, k] = self.cider.compare(self.cider.vector(told), references)
        return rewards


def as_scored(caption: str, tokenizer: Tokenizer) -> list[str]:
    """The words of a human caption, and its end."""
    return [*tokenizer(caption), END_WORD]


def advantages(rewards: Tensor) -> Tensor:
    """How far each reward, of (B, K), lies above the mean of the other K - 1 of its image."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))


def as_policy(captioner: nn.Module) -> None:
    """Put a captioner into the mode in which it draws captions and learns from them: as it is
    served, without anything random and with fixed statistics. Only torch's recurrent kernels are in
    training mode, for they give gradients only there."""
    captioner.eval()
    for module in captioner.modules():
        if isinstance(module, nn.RNNBase):
            module.train()


def log_likelihood(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Log-probability (B, K) of captions under the distribution they are drawn from.

    logits (M, V) and targets int64 (M,) of the real words, mask bool (B, K, T).
    """
    # these two are never drawn, so the others share all of the probability
    logits = logits.float().index_fill(-1, torch.tensor([PAD, START], device=logits.device), -1e9)
    word = logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (M,)
    return torch.zeros_like(mask, dtype=word.dtype).masked_scatter(mask, word).sum(dim=-1)


def train_step(
    model: nn.Module,
    captioner: Captioner,
    batch: loop.DeviceBatch,
    score: Score,
    optimizer: Optimizer,
    settings: TrainConfig,
    max_length: int,
    generator: torch.Generator,
    autocast: torch.dtype | None = None,
) -> tuple[loop.Sums, Tensor, float]:
    """One optimizer step on this worker's share of the batch.

    model: `captioner`, plain or wrapped in DDP, in the mode of `as_policy`. generator: on the
    batch's device. Returns this worker's sums and the
    gradients' norm before clipping, both still on the device, and the seconds spent waiting for
    scores.
    """
    device = batch.inputs.device
    mixed = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with mixed, torch.no_grad():
        regions = captioner.encode(batch.inputs)
        drawn = draw(captioner, regions, settings.samples_per_image, max_length, generator)
    waiting = score(drawn.cpu().numpy(), batch.captions) if batch.weight else None
    start = torch.full((*drawn.shape[:2], 1), START, device=device)
    tokens = torch.cat([start, drawn], dim=-1)  # (B, K, L)
    frozen = not any(parameter.requires_grad for parameter in captioner.encoder.parameters())
    with mixed:
        output = model(regions if frozen else batch.inputs, tokens)
    likelihood = log_likelihood(output.logits, drawn[output.mask], output.mask)  # (B, K)

    asked = time.perf_counter()
    rewards = torch.zeros_like(likelihood)
    if waiting is not None:
        rewards = torch.from_numpy(waiting()).to(device)
    waited = time.perf_counter() - asked

    none = torch.zeros((), device=device)
    sums = loop.Sums(
        *torch.stack([
            -likelihood.detach().sum(), output.mask.sum(), none + likelihood.numel(),
            none + len(drawn), rewards.sum(),
        ]).double() * batch.weight
    )  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    loss = -(advantages(rewards) * likelihood).sum() / sums.reduced().captions.clamp(min=1)
    loop.backward(loss, batch)
    return sums, loop.take_step(optimizer, settings), waited


def draw(
    captioner: Captioner, regions: Tensor, k: int, max_length: int, generator: torch.Generator
) -> Tensor:
    """K captions of each image, int64 (B, K, T), drawn word by word from the model."""
    decoder = captioner.decoder
    memory = decoder.prepare(captioner.refine(regions))
    found = sample(
        lambda tokens, state: decoder.step(tokens, state, memory),
        decoder.initial_state(memory, k),
        max_length=max_length,
        generator=generator,
    )
    return found.tokens
