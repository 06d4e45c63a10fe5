"""From the bytes of pictures to captions: a plain class that serving, evaluation and jobs share.

Shapes: B images, S their height and width in pixels, T words, N regions in rows x columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from caption_ray.config import EncoderConfig, SearchConfig
from caption_ray.data import transforms
from caption_ray.data.vocabulary import END, PAD
from caption_ray.model.search import generate
from caption_ray.training import checkpoint
from caption_ray.training.checkpoint import CheckpointError, Loaded

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Caption:
    """What the captioner says of one picture."""

    text: str
    log_prob: float
    """Natural logarithm of the caption's probability, its end included."""
    words: list[str]
    """The T words of the text, one by one."""
    attention: NDArray[np.float32] | None
    """(T, rows, columns): how much each word looked at each region; a word's shares sum to one.
    None where the decoder does not attend to a grid."""


class Predictor:
    """A checkpoint's captioner on one device."""

    def __init__(
        self, loaded: Loaded, device: torch.device, search: SearchConfig | None = None
    ) -> None:
        self.uri = loaded.uri
        self.device = device
        self.search = search or loaded.search
        """How captions are searched for; the checkpoint's own way unless another is given."""
        self.encoder_config = loaded.model.encoder
        self.vocabulary = loaded.vocabulary
        self.captioner = loaded.captioner.to(device).eval()
        # T4s and older GPUs only emulate bfloat16, which is slower than float32.
        self._bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )

    @classmethod
    def from_uri(
        cls, uri: str, device: torch.device, search: SearchConfig | None = None
    ) -> Predictor:
        """The predictor of the checkpoint that `uri` means (see `checkpoint.find`).

        Raises CheckpointError if there is none or it cannot be loaded.
        """
        return cls(checkpoint.load(checkpoint.find(uri)), device, search)

    def prepare(self, data: bytes) -> Images:
        """uint8 (3, S, S) as the captioner wants it, from an encoded picture.

        Raises transforms.ImageError if that cannot be decoded.
        """
        return prepare(data, self.encoder_config)

    def predict(self, images: Images) -> list[Caption]:
        """The best caption of each image, uint8 (B, 3, S, S).

        Raises ValueError for any other shape or type.
        """
        size = self.encoder_config.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {images.shape}: give uint8 (B, 3, {size}, {size}), "
                "which is what prepare() makes"
            )
        if len(images) == 0:
            return []
        pixels = torch.tensor(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16),
        ):
            found = generate(
                self.captioner,
                pixels.to(self.device, non_blocking=True),
                self.search,
                num_return=1,
            )
        tokens = found.tokens[:, 0].tolist()  # (B, T)
        log_probs = found.log_probs[:, 0].tolist()  # (B,)
        attention = found.attention[:, 0].float().cpu().numpy()  # (B, T, N)
        return [self._caption(*result) for result in zip(tokens, log_probs, attention, strict=True)]

    def warm_up(self) -> None:
        """Caption a blank picture, so that what is slow or broken shows before the first request.

        Raises CheckpointError if the captioner cannot caption it.
        """
        size = self.encoder_config.image_size
        try:
            caption = self.predict(np.full((1, 3, size, size), 128, np.uint8))[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.uri}: cannot caption a blank picture: {error}") from error
        if not math.isfinite(caption.log_prob):
            raise CheckpointError(
                f"{self.uri}: cannot caption a blank picture: its log-probability is "
                f"{caption.log_prob}, so there are weights that are not finite; use another "
                "checkpoint"
            )

    def _caption(
        self, tokens: list[int], log_prob: float, attention: NDArray[np.float32]
    ) -> Caption:
        ids = [token for token in tokens if token not in (PAD, END)]
        rows, columns = self.captioner.encoder.grid
        grid = attention[: len(ids)].reshape(len(ids), rows, columns)
        words = [self.vocabulary.words[token] for token in ids]
        return Caption(self.vocabulary.decode(tokens), log_prob, words, grid)


def prepare(data: bytes, encoder: EncoderConfig) -> Images:
    """uint8 (3, S, S) as an encoder of this configuration wants it; needs no captioner.

    Raises transforms.ImageError if `data` is not a picture that can be decoded.
    """
    pixels: NDArray[Any] = transforms.decode(data)
    return transforms.to_chw(transforms.fit(pixels, encoder.image_size, encoder.image_fit))
