"""The settings of the captioner: all that a checkpoint needs to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from caption_ray.config.bounds import Name, Section, ShareBelowOne, Size, Weights


@dataclass(frozen=True)
class EncoderConfig(Section):
    """From pixels to a grid of regions."""

    name: Name = "resnet101"
    """`timm/` and the name of any model of timm that makes a feature map or patches, with the tag
    of its weights if not the default ones (`timm/vit_base_patch16_224.augreg_in21k`); any
    torchvision classification backbone; or `small`: a compact one to train from scratch."""

    weights: Weights = "DEFAULT"
    """torchvision's or timm's name of the backbone's weights (`DEFAULT`, `IMAGENET1K_V1`, ...), the
    URI of a state dict (.pth or .safetensors), or `none` for random weights. A backbone with random
    weights that trains at all trains as a whole, including its batch-norm statistics."""

    trainable_from: Name = "none"
    """Fine-tune the backbone from this stage on (`layer3`, `features.5`, `blocks.8`, ...); `none`
    freezes the whole backbone, `all` trains it."""

    drop_path: ShareBelowOne = 0.0
    """Leave out residual branches of the stages that train with up to this probability, more often
    the deeper they are (timm's models; stochastic depth, Huang et al. 2016)."""

    batch_norm: Literal["frozen", "train"] = "frozen"
    """Batch-norm statistics of the trainable stages: keep those of the weights, or learn them.
    Frozen stages always keep theirs."""

    image_size: Size = 256
    """Height and width, in pixels, of the backbone's input."""

    image_fit: Literal["stretch", "crop"] = "stretch"
    """How a picture becomes square outside training: stretched, or cropped to its centre."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How pictures are resized to that; `auto` means as for the backbone's weights: bilinear for
    torchvision's, mostly bicubic for timm's."""

    grid: Size | None = None
    """Pool the feature map to grid x grid regions; None keeps the backbone's own grid."""


@dataclass(frozen=True)
class DecoderConfig(Section):
    """From regions to words."""

    name: Name = "soft"
    """Which decoder: `soft` (Show, Attend and Tell), `adaptive` (soft attention with a sentinel, so
    that a word may rely on the words before it alone; Lu et al. 2017), `updown` (top-down attention
    with two LSTMs; Anderson et al. 2018) or `transformer`. The settings below name the decoders
    that they are for."""

    cell: Literal["lstm", "gru"] = "lstm"
    """Recurrent cell (soft)."""

    embedding_dim: Size = 512
    """Size of the word embeddings (all but transformer)."""

    hidden_dim: Size = 512
    """Size of the recurrent state, or the width of the transformer."""

    attention_dim: Size = 512
    """Size of the space in which attention compares regions with the state (all but transformer).
    """

    num_layers: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of layers (transformer)."""

    num_heads: Size = 8
    """Attention heads in each layer; must divide `hidden_dim` (transformer, encoder layers)."""

    feedforward_dim: Size = 2048
    """Inner size of the feed-forward part of each layer (transformer, encoder layers)."""

    num_encoder_layers: Annotated[int, Field(ge=0, le=1000)] = 0
    """Layers of self-attention among a picture's regions, of width `hidden_dim`, before any
    decoder; regions then also know their place."""

    encoder_dropout: ShareBelowOne = 0.1
    """Dropout in these layers."""

    region_positions: bool = False
    """Tell regions their place in the picture, also without such layers."""

    region_dim: Size | None = None
    """Project regions to this size, followed by a ReLU, before attention; None leaves them as the
    encoder gives them (soft, updown; the others project to `hidden_dim`)."""

    initial_state: Literal["mean", "zeros"] = "mean"
    """First recurrent state: computed from the mean region, or zeros (soft)."""

    gate: bool = True
    """Scale the attended region by a learnt gate (soft; Show, Attend and Tell, section 4.2.1)."""

    output: Literal["deep", "mlp"] = "deep"
    """Compute logits from embedding, state and attended region (deep output), or from the state
    alone through one hidden layer (soft)."""

    dropout: ShareBelowOne = 0.5
    """Dropout on embeddings and before the logits."""

    tie_embeddings: bool = False
    """Share the weights of the word embeddings with the output layer (soft)."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """The captioner: all that a checkpoint needs to be rebuilt."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """From pixels to regions."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """From regions to words."""
