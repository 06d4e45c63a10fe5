"""The captioner: an encoder and a decoder, built from the configuration.

Shapes: B images, S height and width in pixels, K captions per image, L caption length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from caption_ray.config import DecoderConfig, ModelConfig
from caption_ray.model import timm_backbones
from caption_ray.model.adaptive import AdaptiveAttentionDecoder
from caption_ray.model.decoder import (
    END,
    PAD,
    START,
    BoundStep,
    Decoder,
    DecoderOutput,
    State,
    StepFn,
    places_of,
)
from caption_ray.model.encoder import Encoder, build_encoder
from caption_ray.model.refiner import Refiner, build_refiner
from caption_ray.model.soft import SoftAttentionDecoder
from caption_ray.model.transformer import TransformerDecoder
from caption_ray.model.updown import TopDownDecoder

DECODERS: dict[str, Callable[[DecoderConfig, int, int], Decoder]] = {
    "soft": SoftAttentionDecoder,
    "adaptive": AdaptiveAttentionDecoder,
    "updown": TopDownDecoder,
    "transformer": TransformerDecoder,
}
"""The decoders by name. To add one, write its module and a line here: training and search know only
the interface `Decoder`."""


class Captioner(nn.Module):
    """From pictures to words."""

    def __init__(self, encoder: Encoder, decoder: Decoder, refiner: Refiner | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.refiner = refiner
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """Regions (B, N, E) of images, uint8 (B, 3, S, S). Floats (B, N, E) pass through: regions
        that an encoder which does not train has computed before."""
        if images.is_floating_point():
            kind = images.device.type
            is_mixed = torch.is_autocast_enabled(kind)  # the decoder casts them anyway
            return images.to(torch.get_autocast_dtype(kind) if is_mixed else torch.float32)
        regions: Tensor = self.encoder(images)
        return regions

    def refine(self, regions: Tensor) -> Tensor:
        """What the decoder attends to, (B, N, D), of regions (B, N, E)."""
        return regions if self.refiner is None else self.refiner(regions)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        own_words: float = 0.0,
        num_words: int | None = None,
    ) -> DecoderOutput:
        """Predict each word of tokens, int64 (B, K, L), from images, as `encode` takes them, and
        the words before it; an image is encoded once for its K captions.

        own_words: share of those words that are replaced by samples of the model's predictions
        (scheduled sampling). num_words: as for Decoder.forward.
        """
        regions = self.refine(self.encode(images))
        if own_words > 0:
            tokens = self._with_own_words(regions, tokens, own_words, num_words)
        output: DecoderOutput = self.decoder(regions, tokens, num_words)
        return output

    @torch.no_grad()
    def _with_own_words(
        self, regions: Tensor, tokens: Tensor, share: float, num_words: int | None = None
    ) -> Tensor:
        """`tokens` with a share of the words replaced by samples of the model's predictions.

        One pass with teacher forcing gives all of them, so that every decoder stays as parallel as
        it is (parallel scheduled sampling with one pass: Duckworth et al., 1906.04331).
        """
        output: DecoderOutput = self.decoder(regions.detach(), tokens, num_words)
        output.logits[:, [PAD, START]] = -torch.inf
        drawn = output.logits.float().softmax(dim=-1).multinomial(1).squeeze(-1)  # (M,)
        given = output.targets(tokens)
        # END is never replaced, as nothing after it is predicted
        replace = (torch.rand(given.shape, device=given.device) < share) & (given != END)
        mixed = tokens.clone()
        places = places_of(output.mask, num_words) if output.places is None else output.places
        words = mixed[..., 1:].flatten().index_copy(0, places, torch.where(replace, drawn, given))
        mixed[..., 1:] = words.view_as(output.mask)
        return mixed

    def begin(self, images: Tensor, k: int) -> tuple[StepFn, State]:
        """What a search starts from: the step function for images, as `encode` takes them, and the
        initial state of K sequences per image."""
        memory = self.decoder.prepare(self.refine(self.encode(images)))
        return BoundStep(self.decoder.step, memory), self.decoder.initial_state(memory, k)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of regions."""
        return self.encoder.grid

    def parameter_groups(
        self,
        learning_rate: float,
        encoder_learning_rate: float,
        weight_decay: float,
        encoder_layer_decay: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: each part has its learning rate, which in the
        encoder falls by the factor `encoder_layer_decay` from layer to layer, if that is less than
        1; weight decay is on matrices only (no biases, norms and scales); frozen parameters are
        left out."""
        groups = []
        parts: list[tuple[nn.Module, float]] = [(self.decoder, learning_rate)]
        if self.refiner is not None:
            parts.append((self.refiner, learning_rate))
        if encoder_layer_decay == 1:
            parts.append((self.encoder, encoder_learning_rate))
        else:
            for group in timm_backbones.layer_decay_groups(
                self.encoder.backbone, weight_decay, encoder_layer_decay
            ):
                rate = encoder_learning_rate * group["lr_scale"]
                decay = group["weight_decay"]
                groups.append({"params": group["params"], "lr": rate, "weight_decay": decay})
        for part, rate in parts:
            trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
            matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
            vectors = [parameter for parameter in trainable if parameter.ndim < 2]
            groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
            groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]


def build_captioner(
    config: ModelConfig, vocab_size: int, encoder_weights: str | None, pretrained: bool
) -> Captioner:
    """The captioner that `config` asks for.

    With `pretrained`, the encoder starts from `config.encoder.weights`; if these are a URI,
    `encoder_weights` is its local copy. Without, the encoder stays random and no weights are looked
    up: for a captioner whose weights come from a checkpoint.

    Raises ValueError as `build_encoder` and `build_decoder` do.
    """
    encoder_config = config.encoder
    if not pretrained:
        encoder_config = dataclasses.replace(encoder_config, weights="none")
    encoder = build_encoder(encoder_config, encoder_weights)
    refiner = build_refiner(config.decoder, encoder.region_dim, encoder.grid)
    region_dim = encoder.region_dim if refiner is None else refiner.region_dim
    return Captioner(encoder, build_decoder(config.decoder, region_dim, vocab_size), refiner)


def build_decoder(config: DecoderConfig, region_dim: int, vocab_size: int) -> Decoder:
    """The decoder that `config` asks for, with random weights.

    Raises ValueError for an unknown name.
    """
    if config.name not in DECODERS:
        raise ValueError(
            f"--model.decoder.name is {config.name!r}: give one of {', '.join(DECODERS)}"
        )
    return DECODERS[config.name](config, region_dim, vocab_size)
