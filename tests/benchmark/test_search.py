"""The plain beam searches that ours is compared to find the same captions."""

from dataclasses import replace

import pytest
import torch

from caption_ray import config
from caption_ray.benchmark import search
from caption_ray.model.captioner import build_decoder
from caption_ray.model.search import beam_search


@pytest.mark.parametrize("plain", [search.one_hypothesis_at_a_time, search.one_image_at_a_time])
@pytest.mark.parametrize("name", ["soft", "adaptive"])
@torch.inference_mode()
def test_plain_beam_search_finds_the_same_captions(plain, name):
    torch.manual_seed(0)
    settings = replace(
        config.coco().model.decoder, name=name, hidden_dim=32, attention_dim=16, embedding_dim=24
    )
    decoder = build_decoder(settings, 20, 30).eval()
    for parameter in decoder.parameters():
        parameter.mul_(3)  # so that captions differ, and most of them end
    regions = torch.randn(6, 5, 20)
    memory = decoder.prepare(regions)
    found = beam_search(
        lambda tokens, state: decoder.step(tokens, state, memory),
        decoder.initial_state(memory, 3), max_length=12, length_penalty=0.0, num_return=1,
    )  # fmt: skip
    ours = [words[: length] for words, length in zip(
        found.tokens[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)]  # fmt: skip
    assert ours == [plain(decoder, image[None], 3, 12) for image in regions]
    assert len({tuple(words) for words in ours}) > 1
