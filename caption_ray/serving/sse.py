"""Server-sent events: how both APIs stream (https://html.spec.whatwg.org, section 9.2)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from caption_ray.serving.errors import Refusal
from caption_ray.serving.service import unforeseen

NO_CACHE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of a stream: without them proxies would collect what should arrive word by word."""


def event(data: Any, name: str | None = None) -> str:
    """One event whose data is JSON, of a named kind or of none."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def response(
    events: AsyncIterator[str], request: Request, refused: Callable[[Refusal], str]
) -> StreamingResponse:
    """The answer that streams these events. An error comes too late for a status: it ends the
    stream as the event that `refused` makes of it."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except Refusal as refusal:
            yield refused(refusal)
        except Exception:
            yield refused(unforeseen(request.scope))

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=NO_CACHE)
