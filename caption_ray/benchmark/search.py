"""Batched beam search and greedy search, compared to one image or hypothesis at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from caption_ray import config
from caption_ray.benchmark import measuring
from caption_ray.config import Count, Length, Name
from caption_ray.model.captioner import build_decoder
from caption_ray.model.decoder import END, PAD, START, Decoder
from caption_ray.model.search import beam_search, greedy

VOCABULARY = 9000
REGIONS = 196


@dataclass
class Search:
    """Captions from regions, with the `coco` preset's decoder, without an encoder."""

    decoder: Name = "soft"
    """Name of the decoder."""
    images: Count = 32
    """Images per batch."""
    beam_size: Length = 5
    """Beams per image."""
    max_length: Length = 20
    """Most words in a caption; with random weights, few end before."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds, eight images."""


@torch.inference_mode()
def run(options: Search) -> None:
    rounds, images = (2, 8) if options.quick else (options.rounds, options.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    settings = replace(config.coco().model.decoder, name=options.decoder)
    decoder = build_decoder(settings, 2048, VOCABULARY).to(device).eval()
    regions = torch.rand(images, REGIONS, 2048, device=device)
    beams, length = options.beam_size, options.max_length

    def batched(k: int) -> float:
        memory = decoder.prepare(regions)
        state = decoder.initial_state(memory, k)
        step = lambda tokens, state: decoder.step(tokens, state, memory)  # noqa: E731
        if k == 1:
            greedy(step, state, max_length=length)
        else:
            beam_search(step, state, max_length=length, length_penalty=0.0, num_return=1)
        return images

    def one_by_one(search: Callable[[Decoder, Tensor, int, int], list[int]]) -> float:
        for image in regions:
            search(decoder, image[None], beams, length)
        return images

    rates = measuring.in_turn(
        {
            "one hypothesis at a time": lambda: one_by_one(one_hypothesis_at_a_time),
            "one image at a time": lambda: one_by_one(one_image_at_a_time),
            f"caption_ray, beam {beams}": lambda: batched(beams),
            "caption_ray, greedy": lambda: batched(1),
        },
        rounds,
    )
    title = (
        f"search: {options.decoder}, {images} images of {REGIONS} regions, {length} words, "
        f"{torch.get_num_threads()} threads"
    )
    found = measuring.report("search", title, "captions", rates, "one hypothesis at a time")
    rows = measuring.ratios(rates["caption_ray, greedy"], rates[f"caption_ray, beam {beams}"])
    cost = [ratio / beams for ratio in rows]
    print(f"one beam's row costs {measuring.spread(cost, '.2f')} of a greedy row")
    measuring.record({**found, "row_of_greedy": round(sorted(cost)[len(cost) // 2], 3)})


# Baselines --------------------------------------------------------------------------------------


def one_hypothesis_at_a_time(
    decoder: Decoder, regions: Tensor, beams: int, max_length: int
) -> list[int]:
    """Beam search as usually first written: a list of hypotheses, each extended on its own, and a
    full sort of all continuations. regions (1, N, E); returns the words, END included."""
    memory = decoder.prepare(regions)
    live = [(0.0, [START], decoder.initial_state(memory, 1))]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(max_length):
        continued = []
        for log_prob, said, state in live:
            last = torch.tensor([[said[-1]]], device=regions.device)
            logits, state, _ = decoder.step(last, state, memory)
            log_probs = _log_probs(logits)[0, 0]
            values, words = log_probs.sort(descending=True)
            for value, word in zip(values[:beams].tolist(), words[:beams].tolist(), strict=True):
                continued.append((log_prob + value, [*said, word], state))
        continued.sort(key=lambda one: -one[0])
        live = []
        for log_prob, said, state in continued[:beams]:
            if said[-1] == END:
                ended.append((log_prob, said))
            else:
                live.append((log_prob, said, state))
        if not live or (ended and max(ended)[0] >= live[0][0]):
            break
    return max(ended + [(log_prob, said) for log_prob, said, _ in live])[1][1:]


def one_image_at_a_time(
    decoder: Decoder, regions: Tensor, beams: int, max_length: int
) -> list[int]:
    """The same, with an image's hypotheses in one batch; still a full sort of continuations."""
    memory = decoder.prepare(regions)
    live, said = [0.0], [[START]]
    state = decoder.initial_state(memory, 1)
    ended: list[tuple[float, list[int]]] = []
    for _ in range(max_length):
        last = torch.tensor([[words[-1] for words in said]], device=regions.device)
        logits, state, _ = decoder.step(last, state, memory)
        total = _log_probs(logits)[0] + torch.tensor(live, device=regions.device)[:, None]
        values, index = total.flatten().sort(descending=True)
        chosen, parents, words_of, scores = index[:beams].tolist(), [], [], []
        for value, place in zip(values[:beams].tolist(), chosen, strict=True):
            parent, word = divmod(place, logits.shape[-1])
            if word == END:
                ended.append((value, [*said[parent], word]))
            else:
                parents.append(parent)
                words_of.append([*said[parent], word])
                scores.append(value)
        live, said = scores, words_of
        if not live or (ended and max(ended)[0] >= live[0]):
            break
        state = tuple(part[:, parents] for part in state)
    return max(ended + list(zip(live, said, strict=True)))[1][1:]


def _log_probs(logits: Tensor) -> Tensor:
    log_probs = logits.float().log_softmax(dim=-1)
    log_probs[..., [PAD, START]] = -torch.inf
    return log_probs
