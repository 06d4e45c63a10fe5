"""The interface between the HTTP application and the captioners behind it. It imports no Ray, so
that the HTTP application runs, and is tested, without."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from caption_ray.captioning.predictor import Caption
from caption_ray.config import SearchConfig, SearchOverrides

MAX_BEAMS = 10
MAX_RETURN = 10
MAX_LENGTH = 50
"""Most beams, captions and words that a request may ask for."""

Status = Literal["ready", "asleep", "starting"]
"""State of the captioners. `asleep`: scaled to zero, the next picture starts one."""


class UnavailableError(Exception):
    """No captioner can be reached, or the one asked died; a retry may succeed."""


@dataclass(frozen=True)
class Options(SearchOverrides):
    """A request's settings for the search: None is as in the checkpoint."""

    num_return: int = 1
    seed: int = 0
    attention: bool = False
    """Whether to return the captions' attention."""

    def search(self, default: SearchConfig) -> SearchConfig:
        """The checkpoint's search, changed as requested, with beams enough for `num_return`."""
        search = self.apply(default)
        return dataclasses.replace(search, beam_size=max(search.beam_size, self.num_return))


@dataclass(frozen=True)
class Answer:
    """The captions of one picture, the best first."""

    captions: list[Caption]
    checkpoint: str
    """URI of the checkpoint that generated them."""
    batch_size: int
    """Number of pictures in its batch, itself included."""
    box: tuple[float, float, float, float]
    """The part of the upright picture that the model saw: left, top, right, bottom as fractions."""
    regions: int
    """Number of regions that the picture was encoded to."""


@dataclass(frozen=True)
class NextWords:
    """Words that are certain to be the next ones of the best caption."""

    words: list[str]
    text: str
    """The same as the caption's text goes on with them: with the space before them, if any."""


class Backend(Protocol):
    """Captions pictures.

    Both `caption` and `stream` raise transforms.ImageError for bytes that are not a picture,
    batching.QueueFullError, UnavailableError, or asyncio.TimeoutError.
    """

    async def caption(self, picture: bytes, options: Options) -> Answer: ...

    def stream(self, picture: bytes, options: Options) -> AsyncIterator[NextWords | Answer]:
        """Yields words as soon as they are certain, then the answer."""
        ...

    async def status(self) -> Status: ...

    async def info(self) -> dict[str, Any]:
        """Facts about the model and its checkpoint."""
        ...
