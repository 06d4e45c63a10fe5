"""Real ImageNet weights and real photographs: the encoder sees what is on them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

from caption_ray.captioning.predictor import prepare
from caption_ray.config import EncoderConfig
from caption_ray.model.encoder import build_encoder, to_tensor
from caption_ray.training import initial

SHOWN = {
    "000000011813": "tripod", "000000062554": "broccoli", "000000073326": "refrigerator",
    "000000160012": "pizza", "000000217285": "ballplayer", "000000244592": "zebra",
    "000000406129": "racket", "000000407574": "banana", "000000519208": "Indian elephant",
    "000000519611": "ice bear",
}  # fmt: skip
"""What photographs of COCO's validation split show, by their ids."""


def test_photographs_are_recognised(coco_mini: Path, pretrained_weights: Path) -> None:
    file = str(pretrained_weights)
    config = initial.settled(
        EncoderConfig(name="timm/tf_efficientnet_lite0", weights=file, image_size=224)
    )
    encoder = build_encoder(config, file).eval()
    with zipfile.ZipFile(coco_mini / "val2017.zip") as pictures:
        squares = [prepare(pictures.read(f"val2017/{each}.jpg"), config) for each in SHOWN]
    # the classifier pools the regions, and its own weights name what it sees
    weights = load_file(file)
    with torch.inference_mode():
        pooled = encoder(to_tensor(np.stack(squares))).mean(dim=1)
    logits = pooled @ weights["classifier.weight"].T + weights["classifier.bias"]
    about = timm.data.ImageNetInfo()
    for shown, best in zip(SHOWN.values(), logits.argmax(dim=1).tolist(), strict=True):
        assert shown in about.index_to_description(best)
