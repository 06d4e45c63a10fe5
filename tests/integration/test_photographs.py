"""Real photographs and real ImageNet weights: ingest, cached features, a second stage that
fine-tunes at another image size, captions."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import latest_of, losses_of, tiny_config

from caption_ray import config
from caption_ray.captioning import checkpoint
from caption_ray.captioning.predictor import Predictor
from caption_ray.data.ingest import ingest
from caption_ray.training import trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def photographs(coco_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("shards"))
    ingest(
        str(coco_mini), out, image_size=256, images_per_shard=40, seed=0, splits=("train", "val"),
        progress=False,
    )  # fmt: skip
    return out


def settings(
    shards: str, runs: Path, name: str, encoder: config.EncoderConfig, **train: Any
) -> config.Config:
    tiny = tiny_config(shards, runs, name, learning_rate=5e-3)
    model = dataclasses.replace(
        tiny.model, encoder=encoder, decoder=dataclasses.replace(tiny.model.decoder, region_dim=8)
    )
    return dataclasses.replace(tiny, model=model, train=dataclasses.replace(tiny.train, **train))


def test_two_stages_from_real_weights(
    photographs: str, pretrained_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = config.EncoderConfig(
        name="timm/tf_efficientnet_lite0", weights=str(pretrained_weights), image_size=128
    )
    first = trainer.train(settings(photographs, tmp_path, "first", encoder, epochs=3))
    assert list(Path(photographs, "features").iterdir()), "the frozen encoder ran once"
    losses = losses_of(first)
    assert losses[-1] < losses[0]
    assert checkpoint.load(latest_of(first)).model.encoder.interpolation == "bicubic"

    tuned = dataclasses.replace(
        encoder, image_size=160, trainable_from="blocks.5", drop_path=0.1, weights="none"
    )
    second = trainer.train(
        settings(
            photographs, tmp_path, "second", tuned, epochs=1, start_from=first.run,
            encoder_layer_decay=0.8, gradient_checkpointing=True,
        )
    )  # fmt: skip
    assert losses_of(second)[0] < losses[0], "it goes on from what the first stage has learnt"
    before, after = (
        checkpoint.load(latest_of(run)).captioner.state_dict() for run in (first, second)
    )
    for key in before:
        moved = not np.array_equal(before[key], after[key])
        if key.startswith("encoder.backbone.blocks.") and key.endswith("conv_dw.weight"):
            assert moved == (int(key.split(".")[3]) >= 5), key

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    predictor = Predictor.from_uri(second.run, torch.device("cpu"))
    blank = np.full((1, 160, 160, 3), 90, np.uint8)
    ((caption,),) = predictor.predict(blank)
    assert caption.attention.shape[1:] == (5, 5)
