"""Presets: complete configurations by name, each holding only what it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from caption_ray.config.model import DecoderConfig, EncoderConfig, ModelConfig
from caption_ray.config.search import SearchConfig
from caption_ray.config.settings import (
    Config,
    DataConfig,
    TrainConfig,
)


def shapes() -> Config:
    """The embedded data set of drawn scenes: a small captioner from scratch, minutes on 2 cores."""
    return Config(
        data=DataConfig(
            captions_per_image=3, caption_length=40, min_word_count=1, min_crop=1.0, flip=False
        ),
        model=ModelConfig(
            encoder=EncoderConfig(
                name="small",
                weights="none",
                trainable_from="all",
                batch_norm="train",
                image_size=96,
            ),
            decoder=DecoderConfig(
                embedding_dim=128, hidden_dim=256, attention_dim=128, dropout=0.1
            ),
        ),
        search=SearchConfig(beam_size=1, max_length=38, length_penalty=0.0),
        train=TrainConfig(
            epochs=8,
            batch_size=32,
            learning_rate=2e-3,
            encoder_learning_rate=2e-3,
            warmup_steps=200,
            attention_regularization=0.0,
            cpus_per_worker=1.0,
        ),
    )


def photos() -> Config:
    """Our recommendation for hundreds to tens of thousands of your own photographs, anywhere.

    `python jobs/train.py photos --data.source FOLDER` ingests them once, computes what a frozen
    EfficientNet-Lite0 makes of each, and trains soft attention over that; it stops once captions no
    longer become better. Its settings are a beginning: the few runs that chose them, with one seed
    each, are in caption_ray/model/README.md.
    """
    return Config(
        data=DataConfig(ingest=True, min_crop=1.0, flip=False),
        model=ModelConfig(
            encoder=EncoderConfig(name="timm/tf_efficientnet_lite0", image_size=224),
            decoder=DecoderConfig(region_dim=512),
        ),
        search=SearchConfig(beam_size=5),
        train=TrainConfig(
            epochs=10,
            batch_size=16,
            learning_rate=1e-3,
            warmup_steps=50,
            scheduled_sampling=0.25,
            patience=3,
            log_every=25,
        ),
    )


def coco() -> Config:
    """Our recommendation for COCO 2017 on GPUs: soft attention over a fine-tuned ResNet-101.

    `python jobs/train.py coco --data.shards URI`, on shards of the Karpathy split. It follows
    Show, Attend and Tell with what was found since (fine-tuning, scheduled sampling), for which
    33.3 BLEU-4 (beam 5) and, over bottom-up regions, 108.9 CIDEr are published. We have not
    measured it on COCO.
    """
    return Config(
        model=ModelConfig(encoder=EncoderConfig(trainable_from="layer3")),
        search=SearchConfig(beam_size=5),
        train=TrainConfig(epochs=20, scheduled_sampling=0.25, patience=5),
    )


def coco_self_critical() -> Config:
    """Second stage of `coco`: CIDEr-D itself is optimised.

    `python jobs/train.py coco-self-critical --data.shards URI --train.start-from RUN`, with RUN a
    finished `coco` run. The gain published for such a decoder is from 108.9 to 119.5 CIDEr (over
    bottom-up regions). We have not measured it on COCO.
    """
    return _self_critical(coco(), learning_rate=5e-5)


def coco_transformer() -> Config:
    """A transformer decoder of 6 layers over ResNet-101, for COCO 2017 on GPUs.

    `python jobs/train.py coco-transformer --data.shards URI`, on shards of the Karpathy split.
    Published for such a decoder over bottom-up regions: 112.6 CIDEr. We have not measured it on
    COCO.
    """
    return Config(
        model=ModelConfig(
            encoder=EncoderConfig(trainable_from="layer3"),
            decoder=DecoderConfig(name="transformer", num_layers=6, dropout=0.1),
        ),
        search=SearchConfig(beam_size=5),
        train=TrainConfig(
            epochs=15,
            learning_rate=3e-4,
            encoder_learning_rate=3e-5,
            warmup_steps=5000,
            attention_regularization=0.0,
            label_smoothing=0.1,
            ema_decay=0.999,
            patience=5,
        ),
    )


def coco_transformer_self_critical() -> Config:
    """Second stage of `coco-transformer`: CIDEr-D itself is optimised.

    `python jobs/train.py coco-transformer-self-critical --data.shards URI --train.start-from RUN`,
    with RUN a finished `coco-transformer` run. The gain published over bottom-up regions is from
    112.6 to 130.3 CIDEr. We have not measured it on COCO.
    """
    return _self_critical(coco_transformer(), learning_rate=5e-6)


def _self_critical(first: Config, learning_rate: float) -> Config:
    """The stage after `first`: its captioner, without what cross-entropy needed."""
    encoder = dataclasses.replace(first.model.encoder, trainable_from="none")
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, flip=False, min_crop=1.0),
        model=dataclasses.replace(first.model, encoder=encoder),
        train=dataclasses.replace(
            first.train,
            stage="self-critical",
            learning_rate=learning_rate,
            schedule="constant",
            warmup_steps=0,
            attention_regularization=0.0,
            label_smoothing=0.0,
            scheduled_sampling=0.0,
        ),
    )


def seed() -> Config:
    """The original single-GPU system: GRU with Bahdanau attention over frozen InceptionV3."""
    return Config(
        data=DataConfig(
            captions_per_image=1,
            caption_length=49,
            min_word_count=1,
            max_words=5000,
            max_images=30_000,
            min_crop=1.0,
            flip=False,
        ),
        model=ModelConfig(
            encoder=EncoderConfig(name="inception_v3", image_size=299),
            decoder=DecoderConfig(
                cell="gru",
                embedding_dim=256,
                hidden_dim=512,
                attention_dim=512,
                region_dim=256,
                initial_state="zeros",
                gate=False,
                output="mlp",
                dropout=0.0,
            ),
        ),
        search=SearchConfig(beam_size=1, max_length=48),
        train=TrainConfig(
            epochs=40,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule="constant",
            attention_regularization=0.0,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "shapes": shapes,
    "photos": photos,
    "coco": coco,
    "coco-self-critical": coco_self_critical,
    "coco-transformer": coco_transformer,
    "coco-transformer-self-critical": coco_transformer_self_critical,
    "seed": seed,
}
DEFAULT_PRESET = "shapes"
