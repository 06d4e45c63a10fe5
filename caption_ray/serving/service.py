"""What both APIs share: reading bodies within limits, captioning, turning errors into answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Scope

from caption_ray.data import transforms
from caption_ray.fetch import FetchError, fetch
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.budget import Allowance, AllowanceExceededError, Share
from caption_ray.serving.contract import (
    MAX_BEAMS,
    MAX_LENGTH,
    MAX_RETURN,
    Answer,
    Backend,
    NextWords,
    Options,
    UnavailableError,
)
from caption_ray.serving.errors import Refusal

MAX_PICTURES = 16
"""Most pictures in one request."""

MAX_FETCHES = 32
"""Most pictures that are fetched from URLs at a time; servers that answer slowly hold no more."""

MAX_REQUEST_ID = 128
"""Characters of a request id that are logged and told."""

PARSE_THREADS = 4
"""Bodies that are unpacked and parsed at a time."""

ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Content-Encodings of a body, with zlib's number for them."""

Part = TypeVar("Part")

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Settings:
    """The HTTP application's settings; `Arguments` in app.py explains them and has the defaults."""

    max_body_bytes: int
    max_buffered_bytes: int
    max_decoding_bytes: int
    body_timeout_s: float
    request_timeout_s: float
    tokens_file: str | None
    cors_origins: tuple[str, ...]
    url_allow_list: tuple[str, ...]
    model_name: str
    examples: str | None


@dataclass(frozen=True)
class Body:
    """A request's body."""

    data: bytes
    share: Share
    """What the request uses of the memory for bodies and fetched pictures."""


class Service:
    """A backend behind the limits of the settings."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend = backend
        self.settings = settings
        self._buffer = Allowance(settings.max_buffered_bytes)
        self._fetches = 0
        # Each kind of work has threads of its own, or servers that trickle would keep bodies from
        # being parsed, and these the probes from being answered.
        self._fetchers = ThreadPoolExecutor(MAX_FETCHES, "fetch")
        self._parsers = ThreadPoolExecutor(PARSE_THREADS, "parse")

    async def parse(self, function: Callable[..., Part], *arguments: Any) -> Part:
        """What the function returns, called on a thread for parsing."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parsers, function, *arguments)

    async def fetch(self, url: str, field: str, share: Share) -> bytes:
        """The bytes at a URL that the field of that name holds; they count as buffered, as the
        request's body does. Raises Refusal."""
        settings = self.settings
        if not settings.url_allow_list:
            why = "URLs are not fetched; send the picture as data:image/...;base64,..."
            raise Refusal(400, "validation", f"{field}: {why}", field=field)
        if self._fetches >= MAX_FETCHES:
            why = f"{MAX_FETCHES} pictures are being fetched already; try again"
            raise Refusal(429, "overloaded", f"{field}: {why}", field=field, retry_after=1)
        loop = asyncio.get_running_loop()
        limits = (settings.url_allow_list, settings.max_body_bytes, settings.body_timeout_s)
        fetching = self._fetchers.submit(fetch, url, *limits, count=share.add)
        self._fetches += 1

        def end() -> None:
            self._fetches -= 1

        # not when the request ends: its thread goes on until the time of a fetch is up
        fetching.add_done_callback(lambda _: loop.call_soon_threadsafe(end))
        try:
            return await asyncio.wrap_future(fetching)
        except FetchError as error:
            status = 413 if error.kind == "too_large" else 400
            raise Refusal(status, "fetch", f"{field}: {error}", field=field) from error
        except AllowanceExceededError:
            raise _too_much_at_a_time() from None

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Body]:
        """The request's body, which counts as buffered until the context is left.

        Raises Refusal if it is empty, too large or too slow, or if too much is buffered already.
        """
        with self._buffer.share() as share:
            try:
                reading = self._read(request, share)
                data = await asyncio.wait_for(reading, self.settings.body_timeout_s)
                encoding = request.headers.get("content-encoding", "identity").strip().lower()
                if encoding not in ("", "identity"):
                    data = await self.parse(unzipped, data, encoding, self.settings)
                    share.add(len(data))
            except asyncio.TimeoutError:
                seconds = self.settings.body_timeout_s
                raise Refusal(
                    408, "timeout", f"the body was not complete after {seconds:g} s"
                ) from None
            except AllowanceExceededError:
                raise _too_much_at_a_time() from None
            if not data:
                raise Refusal(400, "validation", "the body is empty: send the bytes of a picture")
            yield Body(data, share)

    async def _read(self, request: Request, share: Share) -> bytes:
        limit = self.settings.max_body_bytes
        too_large = Refusal(413, "validation", f"the body has more than {limit} bytes")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
            raise too_large  # otherwise, or if it is not a number, the bytes are counted below
        chunks: list[bytes] = []
        held = 0
        async for chunk in request.stream():
            held += len(chunk)
            if held > limit:
                raise too_large
            share.add(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    async def caption(self, picture: bytes, options: Options, name: str = "the picture") -> Answer:
        """Caption one picture. Raises Refusal, in which the picture is called `name`."""
        with self._refusing(name):
            return await asyncio.wait_for(
                self.backend.caption(picture, options), self.settings.request_timeout_s
            )

    async def caption_all(self, pictures: Mapping[str, bytes], options: Options) -> list[Answer]:
        """Caption pictures, by the names that a Refusal calls them, all at once."""
        tasks = [
            asyncio.create_task(self.caption(picture, options, name))
            for name, picture in pictures.items()
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # if one is refused, or the client has gone, stop them all
                task.cancel()

    async def stream(self, picture: bytes, options: Options) -> AsyncIterator[NextWords | Answer]:
        """Yields words as soon as they are certain, then the answer. Raises Refusal."""
        with self._refusing("the picture"):
            deadline = asyncio.get_running_loop().time() + self.settings.request_timeout_s
            parts = self.backend.stream(picture, options)
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    left = deadline - asyncio.get_running_loop().time()
                    yield await asyncio.wait_for(anext(parts), left)

    @contextlib.contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        try:
            yield
        except transforms.UnknownFormatError as error:
            raise Refusal(415, "validation", f"{name} cannot be read: {error}") from error
        except transforms.ImageError as error:
            raise Refusal(422, "validation", f"{name} cannot be read: {error}") from error
        except QueueFullError as error:
            message = str(error)
            raise Refusal(429, "overloaded", message, retry_after=error.retry_after) from error
        except UnavailableError as error:
            message = "no captioner can be reached; try again"
            raise Refusal(503, "unavailable", message, retry_after=1) from error
        except asyncio.TimeoutError as error:
            seconds = self.settings.request_timeout_s
            message = f"no caption after {seconds:g} s; try again"
            raise Refusal(504, "timeout", message) from error

    @property
    def limits(self) -> dict[str, Any]:
        return {
            "max_body_bytes": self.settings.max_body_bytes,
            "max_pixels": transforms.MAX_PIXELS,
            "max_pixels_of": transforms.MAX_PIXELS_OF,
            "max_decoding_bytes": self.settings.max_decoding_bytes,
            "formats": list(transforms.FORMATS),
            "max_pictures": MAX_PICTURES,
            "max_beams": MAX_BEAMS,
            "max_return_sequences": MAX_RETURN,
            "max_new_tokens": MAX_LENGTH,
            "request_timeout_s": self.settings.request_timeout_s,
        }


def _too_much_at_a_time() -> Refusal:
    return Refusal(429, "overloaded", "too many bodies are being received", retry_after=1)


def unzipped(data: bytes, encoding: str, settings: Settings) -> bytes:
    """What a compressed body holds, which counts as the body. Raises Refusal."""
    limit = settings.max_body_bytes
    if encoding not in ENCODINGS:
        message = f"Content-Encoding is {encoding[:100]!r}: send {', '.join(ENCODINGS)} or none"
        headers = {"Accept-Encoding": ", ".join(ENCODINGS)}
        raise Refusal(415, "validation", message, field="Content-Encoding", headers=headers)
    found = bytearray()
    try:
        while data:  # gzip may have several parts
            unzip = zlib.decompressobj(ENCODINGS[encoding])
            found += unzip.decompress(data, limit + 1 - len(found))
            if len(found) > limit:
                raise Refusal(413, "validation", f"the body has more than {limit} bytes")
            if not unzip.eof:
                raise zlib.error("it breaks off")
            data = unzip.unused_data
    except zlib.error as error:
        message = f"the body is no {encoding}, as its Content-Encoding says: {error}"
        raise Refusal(400, "validation", message) from error
    return bytes(found)


async def first_of(parts: AsyncIterator[Part]) -> tuple[Part, AsyncIterator[Part]]:
    """The first part, and all parts: so that an error before the first can still be a status."""
    first = await anext(parts)

    async def all_parts() -> AsyncIterator[Part]:
        yield first
        async for part in parts:
            yield part

    return first, all_parts()


def request_id(scope: Scope) -> str:
    """The client's X-Request-ID, or one that Ray's proxy made; the proxy sends it back. Cut, and
    without what could forge a line of the log."""
    found = header(scope, b"x-request-id") or "?"
    return re.sub(r"[^!-~]", "?", found[:MAX_REQUEST_ID])


def header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def unforeseen(scope: Scope) -> Refusal:
    """The answer to the exception being handled, which is unexpected: it contains only the request
    id, under which the stack trace goes to the log."""
    logger.exception(f"Request {request_id(scope)} failed")
    return Refusal(500, "internal", f"internal error in request {request_id(scope)}")
