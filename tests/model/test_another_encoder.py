"""A backbone that the package does not have: its function and one line are all that it needs."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig, TrainConfig
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.model.encoder import BACKBONES, build_encoder, to_tensor
from caption_ray.model.search import generate
from caption_ray.training import loop

VOCABULARY = Vocabulary("a red circle above blue".split())
SIZE, PATCH, CHANNELS = 32, 8, 24
CPU = torch.device("cpu")


def patches(config: EncoderConfig) -> nn.Module:
    """Regions that know nothing of each other: patches, and a layer for each of them by itself."""
    return nn.Sequential(
        OrderedDict(
            patch=nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH),
            mix=nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()),
        )
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "patches", patches)  # the line


ENCODER = EncoderConfig(name="patches", weights="none", trainable_from="all", image_size=SIZE)

IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
IMAGES[1] //= 4
TOKENS = np.array(
    [[[START, 4, 5, 6, END]], [[START, 4, 8, END, PAD]]], np.int32
)  # "a red circle", "a blue"


def test_it_is_trained_saved_and_searched_like_the_others(tmp_path: Path) -> None:
    decoder = DecoderConfig(embedding_dim=16, hidden_dim=32, attention_dim=16, dropout=0.0)
    model = ModelConfig(ENCODER, decoder)
    torch.manual_seed(0)
    captioner = build_captioner(model, len(VOCABULARY), None, pretrained=True)
    assert captioner.grid == (SIZE // PATCH, SIZE // PATCH)
    before = captioner.encoder.backbone.patch.weight.detach().clone()
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=3e-3)
    for _ in range(100):
        loop.train_step(
            captioner, loop.to_device(IMAGES, TOKENS, SIZE, CPU), optimizer, TrainConfig()
        )
    assert not torch.equal(captioner.encoder.backbone.patch.weight, before)

    state = checkpoint.State(100, 1, 0, {}, None)
    search = SearchConfig(beam_size=3, max_length=6)
    checkpoint.save(
        tmp_path / "local", captioner, VOCABULARY, model, search, state,
        optimizer.state_dict(), Ledger([1]),
    )  # fmt: skip
    run = tmp_path / "run"
    run_folder.commit(tmp_path / "local", str(run), state, keep=1, is_best=True)
    predictor = Predictor.from_uri(str(run), CPU)
    said = [caption.text for (caption,) in predictor.predict(IMAGES)]
    assert said == ["a red circle", "a blue"], "two pictures are learnt by heart"
    found = generate(predictor.captioner, to_tensor(IMAGES), search, num_return=3)
    assert found.log_probs.isfinite().all()


def test_its_stages_can_be_frozen_and_its_regions_pooled() -> None:
    encoder = build_encoder(dataclasses.replace(ENCODER, trainable_from="mix", grid=2), None)
    trains = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert trains == {"backbone.mix.0.weight", "backbone.mix.0.bias"}
    assert encoder(to_tensor(IMAGES)).shape == (2, 4, CHANNELS)


def test_its_weights_come_from_a_file(tmp_path: Path) -> None:
    weights = patches(ENCODER).state_dict()
    torch.save(weights, tmp_path / "mine.pth")
    asked = dataclasses.replace(ENCODER, weights=str(tmp_path / "mine.pth"))
    encoder = build_encoder(asked, asked.weights)
    assert all(torch.equal(encoder.backbone.state_dict()[name], weights[name]) for name in weights)


def test_its_name_is_one_of_those_that_are_proposed() -> None:
    with pytest.raises(ValueError, match="give 'small', 'patches', one of torchvision's"):
        build_encoder(EncoderConfig(name="patch"), None)
    with pytest.raises(ValueError, match="for patches give none or the path"):
        build_encoder(dataclasses.replace(ENCODER, weights="DEFAULT"), None)
