"""From a row of a shard to arrays: captions become tokens, pictures become squares.

Read tasks, decoding threads and the feature cache call it; it reads no files itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_ray.config import DataConfig, EncoderConfig
from caption_ray.data import transforms
from caption_ray.data.transforms import Window
from caption_ray.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Preparation:
    """How rows become arrays; the same for every worker of a run."""

    encoder: EncoderConfig
    data: DataConfig
    vocabulary: Vocabulary
    augment: tuple[int, int] | None
    """(seed, epoch) that the random crops, flips and choice of captions are drawn from; None
    outside training, where nothing is random."""
    with_captions: bool = False
    """Whether the captions also come along as text, uncut (for self-critical training)."""

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """One row of a shard as arrays: `inputs` uint8 (S, S, 3), or regions float16 (N, E) of a
        feature shard; `tokens` int32 (K, L).

        A picture that cannot be decoded becomes a black one without tokens, which adds nothing to
        any loss; `error` says why.
        """
        prepared = self.without_inputs(row, number)
        if "regions" in row:
            prepared["inputs"] = row["regions"]
            if row["error"]:
                _blank(prepared, row["error"])
        else:
            size = self.encoder.image_size
            prepared["inputs"] = np.empty((size, size, 3), np.uint8)
            self.square(row["image"], prepared, prepared["inputs"])
        return prepared

    def without_inputs(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """All that a call gives except `inputs`, which is left to `square`."""
        captions: list[str] = row["captions"]
        prepared = {
            "tokens": np.zeros((self.data.captions_per_image, self.data.caption_length), np.int32),
            "number": number,
            "image_id": row["image_id"],
            "file_name": row.get("file_name", ""),
            "flip": self.data.flip and not transforms.mentions_side(captions),
            "captions_json": json.dumps(captions) if self.with_captions else "",
            "error": row["error"] or "",
        }
        if self.augment is not None and len(captions) > self.data.captions_per_image:
            rng = np.random.default_rng([*self.augment, 2, number])
            captions = [captions[i] for i in rng.permutation(len(captions))]
        for line, caption in zip(prepared["tokens"], captions, strict=False):
            line[:] = self.vocabulary.encode(caption, self.data.caption_length)
        return prepared

    def square(self, data: bytes | None, prepared: dict[str, Any], out: NDArray[np.uint8]) -> None:
        """Decode the picture of a row prepared by `without_inputs` into `out`, uint8 (S, S, 3)."""
        error = prepared["error"]
        if not error:
            try:
                assert data is not None
                out[:] = self._decode(data, prepared)
                return
            except transforms.ImageError as problem:
                error = str(problem)
        out[:] = 0
        _blank(prepared, f"{prepared['file_name']}: {error}")

    def _decode(self, data: bytes, prepared: dict[str, Any]) -> NDArray[np.uint8]:
        picture = transforms.Picture(data)
        window = self.window(*picture.shape, prepared["number"], prepared["flip"])
        return picture.squeeze(window, self.encoder.image_size, self.encoder.interpolation)

    def window(self, height: int, width: int, number: int, flip: bool) -> Window:
        """The part of a picture of `height` x `width` that is shown; every call gives the same.

        number: of the picture in its split. flip: whether it may be mirrored.
        """
        if self.augment is None or (self.data.min_crop == 1 and not self.data.flip):
            return transforms.fitting(height, width, self.encoder.image_fit)
        rng = np.random.default_rng([*self.augment, 3, number])
        return transforms.random_window(height, width, self.data.min_crop, flip, rng)


def _blank(prepared: dict[str, Any], error: str) -> None:
    """Make the row weigh nothing in any loss, and note the reason."""
    prepared["tokens"][:] = 0
    prepared["captions_json"], prepared["error"] = "", error
