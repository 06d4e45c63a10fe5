"""From the bytes of pictures to captions: a plain class that serving, evaluation and jobs share.

Shapes: B images, S their height and width in pixels, T words, N regions in rows x columns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caption_ray.captioning import run_folder
from caption_ray.captioning.checkpoint import CheckpointError, Loaded
from caption_ray.config import EncoderConfig, SearchConfig
from caption_ray.data import transforms
from caption_ray.data.vocabulary import END, PAD
from caption_ray.model.backtrack import Hypotheses
from caption_ray.model.encoder import to_tensor
from caption_ray.model.graphed_search import GraphedSearch
from caption_ray.model.search import OnStep, generate

Images = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as fractions of a picture's width and height."""


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
    is_whole: bool = True
    """Whether it came to its end; False if it was cut at the maximal length."""


@dataclass(frozen=True)
class Captioned:
    """What became of one encoded picture: a caption, or the reason why there is none."""

    caption: Caption | None
    box: Box | None
    """The part of the picture that the captioner saw (see `Box`)."""
    error: str | None = None


class Predictor:
    """A checkpoint's captioner, or the ensemble of several, on one device."""

    def __init__(
        self,
        loaded: Loaded,
        device: torch.device,
        search: SearchConfig | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.uri = loaded.uri
        self.device = device
        self.search = search or loaded.search
        """How captions are searched for; the checkpoint's own way unless another is given."""
        self.members = loaded.members or (loaded,)
        """The checkpoints that caption together; mostly one."""
        self.encoder_config = loaded.model.encoder
        """How pictures are prepared."""
        self.vocabulary = loaded.vocabulary
        self.captioner = loaded.captioner.to(device).eval()
        # T4s and older GPUs only emulate bfloat16, which is slower than float32.
        self._bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        self._cuda_graphs = cuda_graphs and device.type == "cuda" and self.search.temperature == 0
        self._pool = torch.cuda.graph_pool_handle() if self._cuda_graphs else None
        self._graphed: dict[int, GraphedSearch] = {}
        self._turn = threading.Lock()  # graphs share their memory

    @classmethod
    def from_uri(
        cls,
        uri: str,
        device: torch.device,
        search: SearchConfig | None = None,
        cuda_graphs: bool = False,
    ) -> Predictor:
        """The predictor of the checkpoint or ensemble that `uri` means (see `run_folder.find`).

        `cuda_graphs`: on a GPU, run the search above as CUDA graphs, for batches of 1, 2, 4, ...
        pictures, to which others are padded; other searches, and those that draw words, run as they
        are. The first batch of each size takes longer: see `warm_up`.

        Raises CheckpointError if there is none or it cannot be loaded.
        """
        return cls(run_folder.load(uri), device, search, cuda_graphs)

    def prepare(self, data: bytes) -> Images:
        """uint8 (S, S, 3) as the captioner wants it, from an encoded picture.

        Raises transforms.ImageError if that cannot be decoded.
        """
        return prepare(data, self.encoder_config)

    def predict(
        self,
        images: Images,
        search: SearchConfig | None = None,
        num_return: int = 1,
        seeds: Sequence[int] | None = None,
        on_words: Callable[[int, list[str]], None] | None = None,
    ) -> list[list[Caption]]:
        """The `num_return` captions of each image, uint8 (B, S, S, 3), the best first.

        `search` is how they are searched for (default: `self.search`), `seeds` has a number for
        each image from which captions are drawn if `search` has a temperature. There may be fewer
        captions than asked for where a short maximal length allows no more.

        `on_words(image, words)` is called during the search, with words as soon as they are certain
        to be part of the best caption (or, of several that are drawn, of all of them).

        Raises ValueError for images of any other shape or type.
        """
        size = self.encoder_config.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images are {images.dtype} {images.shape}: give uint8 (B, {size}, {size}, 3), "
                "which is what prepare() makes"
            )
        if len(images) == 0:
            return []
        search = search or self.search
        count = len(images)
        on_step = None if on_words is None else self._tell(count, on_words)
        if self._cuda_graphs and (search, num_return) == (self.search, 1):
            found = self._find_graphed(images, on_step)
        else:
            found = self._find(images, search, num_return, seeds, on_step)
        tokens = found.tokens.tolist()  # (B, R, T)
        log_probs = found.log_probs.tolist()  # (B, R)
        attention = found.attention.float().cpu().numpy()  # (B, R, T, N)
        return [
            [
                self._caption(*one)
                for one in zip(tokens[image], log_probs[image], attention[image], strict=True)
                if one[1] != -math.inf  # nan is kept, so that it is noticed
            ]
            for image in range(count)
        ]

    def caption_pictures(
        self,
        pictures: Sequence[bytes | None],
        threads: Executor,
        search: SearchConfig | None = None,
    ) -> list[Captioned]:
        """The best caption of each encoded picture (decoded by `threads`), or the reason why it has
        none: it is None or cannot be decoded. `search` as in `predict`."""

        def decode(data: bytes | None) -> tuple[Images, Box] | str:
            try:
                if data is None:
                    return "there are no bytes"
                return prepare_with_box(data, self.encoder_config)
            except transforms.ImageError as error:
                return str(error)

        decoded = list(threads.map(decode, pictures))
        images = [one[0] for one in decoded if not isinstance(one, str)]
        found = iter(self.predict(np.stack(images), search) if images else [])
        return [
            Captioned(None, None, one)
            if isinstance(one, str)
            else Captioned(next(found)[0], one[1])
            for one in decoded
        ]

    def _find(
        self,
        images: Images,
        search: SearchConfig,
        num_return: int,
        seeds: Sequence[int] | None,
        on_step: OnStep | None,
    ) -> Hypotheses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            return generate(
                self.captioner, self._on_device(images), search, num_return, seeds, on_step
            )

    def _find_graphed(self, images: Images, on_step: OnStep | None) -> Hypotheses:
        padding = np.zeros((_padded(len(images)) - len(images), *images.shape[1:]), np.uint8)
        pixels = self._on_device(np.concatenate([images, padding]))
        with self._turn:
            if len(pixels) not in self._graphed:
                self._graphed[len(pixels)] = GraphedSearch(
                    self.captioner,
                    pixels,
                    self.search,
                    torch.bfloat16 if self._bfloat16 else None,
                    self._pool,
                )
            return self._graphed[len(pixels)](pixels, on_step)

    def _on_device(self, images: Images) -> Tensor:
        pixels = to_tensor(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)

    def _tell(self, images: int, on_words: Callable[[int, list[str]], None]) -> OnStep:
        """A callback that turns the search's tokens into the words that are new."""
        told = [0] * images

        def on_step(tokens: Tensor, decided: Tensor) -> None:
            rows, counts = tokens.tolist(), decided.tolist()
            for image, (row, count) in enumerate(zip(rows[:images], counts, strict=False)):
                words = self._words(row[told[image] : count])
                if words:
                    on_words(image, words)
                told[image] = max(told[image], count)

        return on_step

    def warm_up(self, max_batch_size: int = 1) -> None:
        """Caption blank pictures, alone and up to `max_batch_size` at once, so that what is slow,
        broken or too large for the device shows before the first request.

        Raises CheckpointError if the captioner cannot caption them.
        """
        size = self.encoder_config.image_size
        try:
            sizes = {1, max_batch_size}
            if self._cuda_graphs:
                sizes |= {_padded(size) for size in range(1, max_batch_size)}
            for batch_size in sorted(sizes):
                blank = np.full((batch_size, size, size, 3), 128, np.uint8)
                found = self.predict(blank)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.uri}: cannot caption a blank picture: {error}") from error
        if not all(captions and math.isfinite(captions[0].log_prob) for captions in found):
            raise CheckpointError(
                f"{self.uri}: cannot caption a blank picture: no caption has a finite "
                "log-probability, so there are weights that are not finite; use another checkpoint"
            )

    def _caption(
        self, tokens: list[int], log_prob: float, attention: NDArray[np.float32]
    ) -> Caption:
        words = self._words(tokens)
        rows, columns = self.captioner.grid
        grid = attention[: len(words)].reshape(len(words), rows, columns)
        text = self.vocabulary.decode(tokens)
        return Caption(text, log_prob, words, grid, is_whole=END in tokens)

    def _words(self, tokens: list[int]) -> list[str]:
        return [self.vocabulary.words[token] for token in tokens if token not in (PAD, END)]


def _padded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def prepare(data: bytes, encoder: EncoderConfig) -> Images:
    """uint8 (S, S, 3) as an encoder of this configuration wants it; needs no captioner.

    Raises transforms.ImageError if `data` is not a picture that can be decoded.
    """
    return prepare_with_box(data, encoder)[0]


def prepare_with_box(data: bytes, encoder: EncoderConfig) -> tuple[Images, Box]:
    """`prepare`, and the part of the upright picture that the encoder sees."""
    picture = transforms.Picture(data)
    box = transforms.visible(*picture.shape, encoder.image_fit)
    window = transforms.fitting(*picture.shape, encoder.image_fit)
    square = picture.squeeze(window, encoder.image_size, encoder.interpolation)
    return np.ascontiguousarray(square), box
