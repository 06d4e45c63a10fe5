"""The captioner that a run begins with: pretrained, random, or from another run's checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from caption_ray import storage
from caption_ray.captioning.checkpoint import Loaded
from caption_ray.config import Config, EncoderConfig, ModelConfig, require
from caption_ray.data.vocabulary import SPECIAL
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.encoder import (
    BACKBONES,
    Encoder,
    build_backbone,
    build_encoder,
    check_weights,
    settled_interpolation,
)
from caption_ray.model.weights import is_weights_uri


def check_model(config: Config) -> None:
    """Raise ValueError, as `build_captioner` does, for a captioner that cannot be (unknown names,
    sizes that do not fit each other), and for a stage without the run that it begins with."""
    require(
        config.train.stage == "cross-entropy" or config.train.start_from is not None,
        "train.stage",
        config.train.stage,
        "it begins with a captioner that cross-entropy trained; name its run as --train.start-from",
    )
    _check_buildable(config.model, config.train.gradient_checkpointing)
    if config.train.start_from is None:  # else no weights are looked up
        check_weights(config.model.encoder)


def check_encoder(config: EncoderConfig) -> None:
    """The same for an encoder alone."""
    _check_buildable(ModelConfig(encoder=config), gradient_checkpointing=False)
    check_weights(config)


@functools.cache
def _check_buildable(config: ModelConfig, gradient_checkpointing: bool) -> None:
    """By building it without memory, which takes a second where weights would take ten."""
    # what computes when it is made cannot do so without memory: it is seen when it is built
    with torch.device("meta"), contextlib.suppress(RuntimeError):
        captioner = build_captioner(config, len(SPECIAL), None, pretrained=False)
        if gradient_checkpointing:
            captioner.encoder.checkpoint_gradients()


def initial_captioner(config: Config, vocab_size: int, start: Loaded | None = None) -> Captioner:
    """With the encoder's configured weights and a random decoder, or all that a checkpoint holds to
    `start` from. Raises ValueError as `build_captioner` does."""
    if start is not None:
        captioner = build_captioner(config.model, vocab_size, None, pretrained=False)
        captioner.load_state_dict(_fitting(config.model.encoder, start))
    else:
        with _local_weights(config.model.encoder) as file:
            captioner = build_captioner(config.model, vocab_size, file, pretrained=True)
    if config.train.gradient_checkpointing:
        captioner.encoder.checkpoint_gradients()
    return captioner


def _fitting(config: EncoderConfig, start: Loaded) -> dict[str, Tensor]:
    """The weights of a checkpoint for an encoder of, maybe, another image size, to which positions
    are interpolated as for weights from elsewhere."""
    state = start.captioner.state_dict()
    if config.image_size == start.model.encoder.image_size or config.name in BACKBONES:
        return state
    prefix = "encoder.backbone."
    own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    module = build_backbone(config, own).module
    loaded = {prefix + key: tensor for key, tensor in module.state_dict().items()}
    return {key: loaded.get(key, tensor) for key, tensor in state.items()}


def settled(config: EncoderConfig) -> EncoderConfig:
    """With what depends on the backbone made explicit. Raises ValueError for an unknown one."""
    return dataclasses.replace(config, interpolation=settled_interpolation(config))


def initial_encoder(config: EncoderConfig) -> Encoder:
    """With its configured weights. Raises ValueError as `build_encoder` does."""
    with _local_weights(config) as file:
        return build_encoder(config, file)


@contextmanager
def _local_weights(config: EncoderConfig) -> Iterator[str | None]:
    """A local copy, for the time it is needed, of weights that are named by URI; None for
    others."""
    if not is_weights_uri(config.weights):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        uri = storage.resolve(config.weights)
        yield str(storage.download(uri, Path(folder, storage.name(uri))))
