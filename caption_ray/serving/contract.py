"""What the HTTP application asks of what stands behind it; it knows nothing else of Ray."""

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
"""Of the captioners: `asleep` is scaled to zero; the next picture wakes one."""


class UnavailableError(Exception):
    """No captioner can be reached, or it died; another attempt may succeed."""


@dataclass(frozen=True)
class Options(SearchOverrides):
    """How one request wants its captions."""

    num_return: int = 1
    seed: int = 0
    attention: bool = False
    """Whether the captions should come with their attention."""

    def search(self, default: SearchConfig) -> SearchConfig:
        """The checkpoint's search, changed as asked for; wide enough for `num_return`."""
        search = self.apply(default)
        return dataclasses.replace(search, beam_size=max(search.beam_size, self.num_return))


@dataclass(frozen=True)
class Answer:
    """The captions of one picture, the best first."""

    captions: list[Caption]
    checkpoint: str
    """URI of the checkpoint that they come from."""
    batch_size: int
    """Pictures that were captioned together with it, itself included."""
    box: tuple[float, float, float, float]
    """What the captioner saw of the upright picture: left, top, right and bottom as fractions."""
    regions: int
    """Regions that the picture was encoded to."""


class Backend(Protocol):
    """Captions pictures.

    Both `caption` and `stream` raise transforms.ImageError for what is no picture,
    batching.QueueFullError, UnavailableError, or asyncio.TimeoutError.
    """

    async def caption(self, picture: bytes, options: Options) -> Answer: ...

    def stream(self, picture: bytes, options: Options) -> AsyncIterator[list[str] | Answer]:
        """Words as they become certain, then the answer."""
        ...

    async def status(self) -> Status: ...

    async def info(self) -> dict[str, Any]:
        """Of the model and its checkpoint."""
        ...
