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
from caption_ray.model.soft import SoftAttentionDecoder
from caption_ray.model.transformer import TransformerDecoder

DECODERS: dict[str, Callable[[DecoderConfig, int, int], Decoder]] = {
    "soft": SoftAttentionDecoder,
    "adaptive": AdaptiveAttentionDecoder,
    "transformer": TransformerDecoder,
}
"""The decoders by name. To add one, write its module and a line here: training and search know only
the interface `Decoder`."""


class Captioner(nn.Module):
    """From pictures to words."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
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
        regions = self.encode(images)
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
        memory = self.decoder.prepare(self.encode(images))
        return BoundStep(self.decoder.step, memory), self.decoder.initial_state(memory, k)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of regions."""
        return self.encoder.grid

    def parameter_groups(
        self, learning_rate: float, encoder_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: each part has its learning rate; weight decay is
        on matrices only (no biases, norms and scales); frozen parameters are left out."""
        groups = []
        parts = ((self.decoder, learning_rate), (self.encoder, encoder_learning_rate))
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
    return Captioner(encoder, build_decoder(config.decoder, encoder.region_dim, vocab_size))


def build_decoder(config: DecoderConfig, region_dim: int, vocab_size: int) -> Decoder:
    """The decoder that `config` asks for, with random weights.

    Raises ValueError for an unknown name.
    """
    if config.name not in DECODERS:
        raise ValueError(
            f"--model.decoder.name is {config.name!r}: give one of {', '.join(DECODERS)}"
        )
    return DECODERS[config.name](config, region_dim, vocab_size)
