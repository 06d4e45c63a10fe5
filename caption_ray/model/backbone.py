"""What a backbone is: all that an encoder needs to know of one, whoever made it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from caption_ray.config import EncoderConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Features: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""Maps a module and normalised pixels (B, 3, S, S) to the module's last feature map
(B, E, h, w)."""


def own_features(module: nn.Module, pixels: Tensor) -> Tensor:
    """What the module returns: a feature map, or (B, 1 + h * w, E), a class token and patches."""
    features: Tensor = module(pixels)
    return grid_of(features, prefix=1) if features.ndim == 3 else features


@dataclass(frozen=True)
class Backbone:
    """A module that makes feature maps, and what its weights expect."""

    module: nn.Module
    features: Features = own_features
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Of the pixels, from 0 to 1, that the weights were made with."""
    native_size: int = 224
    """An image size, in pixels, that the module takes."""
    missing: frozenset[str] = frozenset()
    """Names of parameters and buffers that the weights lacked, which is an error if the feature map
    depends on them."""


def grid_of(tokens: Tensor, prefix: int) -> Tensor:
    """Tokens (B, prefix + h * h, E) as a feature map (B, E, h, h), without the class token and
    others that stand before the patches. Raises ValueError if the patches make no square."""
    patches = tokens[:, prefix:]
    side = math.isqrt(patches.shape[1])
    if side == 0 or side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches make no square")
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)


def wrong_image_size(config: EncoderConfig, native_size: int, error: Exception) -> ValueError:
    """The error for an image size that a backbone cannot take."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"--model.encoder.image-size is {config.image_size}: {config.name} takes other sizes, "
        f"such as {native_size} ({reason})"
    )


def wrong_weights(config: EncoderConfig, reason: str) -> ValueError:
    """The error for weights of another model."""
    return ValueError(
        f"--model.encoder.weights is {config.weights!r}: these are not the weights of "
        f"{config.name}: {' '.join(reason.split())[:300]}"
    )


def cannot_download(config: EncoderConfig, what: str, error: Exception) -> ConnectionError:
    """The error for weights that cannot be had from where they are published."""
    reason = " ".join(str(error).split())[:300]
    return ConnectionError(
        f"--model.encoder.weights is {config.weights!r}: cannot download {what} "
        f"({reason or type(error).__name__}); give the path or URI of a state dict, or none"
    )


def did_you_mean(name: str, valid: Collection[str], prefix: str = "") -> str:
    """The end of a sentence that refuses a name. prefix: what all valid names begin with."""
    close = difflib.get_close_matches(name, valid, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f", such as {prefix}resnet50"
