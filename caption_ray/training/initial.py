"""The captioner that a run begins with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caption_ray import storage
from caption_ray.captioning import checkpoint
from caption_ray.config import Config, EncoderConfig
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.encoder import Encoder, build_encoder, is_weights_uri


def initial_captioner(config: Config, vocab_size: int) -> Captioner:
    """With the encoder's configured weights and a random decoder, or all that `train.start_from`
    holds. Raises ValueError as `build_captioner` and `checkpoint.load_weights` do."""
    start = config.train.start_from
    if start is not None:
        captioner = build_captioner(config.model, vocab_size, None, pretrained=False)
        checkpoint.load_weights(start, captioner)
        return captioner
    with _local_weights(config.model.encoder) as file:
        return build_captioner(config.model, vocab_size, file, pretrained=True)


def initial_encoder(config: EncoderConfig) -> Encoder:
    """With its configured weights. Raises ValueError as `build_encoder` does."""
    with _local_weights(config) as file:
        return build_encoder(config, file)


@contextmanager
def _local_weights(config: EncoderConfig) -> Iterator[str | None]:
    """The local file of weights that are named by URI, as long as it is needed; else None."""
    if not is_weights_uri(config.weights):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        uri = storage.resolve(config.weights)
        yield str(storage.download(uri, Path(folder, storage.name(uri))))
