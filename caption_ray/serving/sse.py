"""Server-sent events, with which both APIs stream (https://html.spec.whatwg.org, section 9.2)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from caption_ray.serving.errors import Refusal
from caption_ray.serving.service import unforeseen

NO_CACHE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of a stream: without them, proxies would buffer what should arrive word by word."""


def event(data: Any, name: str | None = None) -> str:
    """One event with `data` as JSON, with or without a name."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def response(
    events: AsyncIterator[str], request: Request, refused: Callable[[Refusal], str]
) -> StreamingResponse:
    """The answer that streams these events. An error comes too late to change the status: `refused`
    turns it into an event, which ends the stream."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except Refusal as refusal:
            yield refused(refusal)
        except Exception:
            yield refused(unforeseen(request.scope))

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=NO_CACHE)
