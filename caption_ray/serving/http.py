"""The HTTP application, on any `Backend`: tokens, probes and documentation.

ingress.py builds it. caption_api.py (Hugging Face's clients, curl, the page) and chat_api.py
(OpenAI's clients) add the routes that caption, page/ the page; errors.py has the form of error
answers.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caption_ray.serving import api_document, caption_api, chat_api, page
from caption_ray.serving.auth import Tokens
from caption_ray.serving.contract import Backend
from caption_ray.serving.errors import Family, Refusal, documented, refuse_field
from caption_ray.serving.service import Service, Settings, header, unforeseen

OPEN_PATHS = ("/livez", "/readyz", "/", "/docs", "/openapi.json", "/static-offline-docs")
"""Paths that can be read without a token: the probes, the page and the documentation."""

logger = logging.getLogger("ray.serve")


def build_http(backend: Backend, settings: Settings) -> FastAPI:
    """The HTTP application.

    Raises ValueError if the settings' tokens or examples cannot be read.
    """
    app = FastAPIOffline(
        title="caption_ray",
        description=api_document.DESCRIPTION,
        openapi_tags=api_document.TAGS,
        generate_unique_id_function=lambda route: route.name,
        docs_url=None,
        redoc_url=None,
        # the folder that this document is in, wherever a proxy has put it
        servers=[{"url": "."}],
        root_path_in_servers=False,
    )
    service = Service(backend, settings)
    tokens = Tokens(settings.tokens_file)
    app.add_middleware(_Authorize, tokens=tokens)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            # whatever the browser asks for: clients and tracers send headers of their own
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "X-Checkpoint", "X-Batch-Size", "Retry-After"],
        )
    app.add_middleware(_Head)
    app.add_middleware(_Unforeseen)  # outermost, so that it sees every error

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return refusal.response(_family(request.scope))

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        refusal = Refusal(error.status_code, "validation", message, headers=headers)
        return refusal.response(_family(request.scope))

    @app.exception_handler(RequestValidationError)
    async def refuse_query(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        source, *path = problem["loc"]  # only /caption has parameters that FastAPI checks
        refusal = refuse_field(
            {**problem, "loc": path}, caption_api.Parameters, whole=f"the {source}"
        )
        return refusal.response(_family(request.scope))

    @app.get("/livez", tags=["probes"], summary="Is the server running?")
    async def livez() -> dict[str, str]:
        """For liveness probes: always 200 once the server has started."""
        return {"status": "alive"}

    @app.get(
        "/readyz",
        tags=["probes"],
        summary="Can pictures be captioned?",
        responses=documented("caption", 503),
    )
    async def readyz() -> dict[str, str]:
        """For readiness probes: `ready`, or `asleep` if all captioners have been scaled away and
        the next picture starts one. 503 while captioners start."""
        status = await backend.status()
        if status == "starting":
            raise Refusal(503, "unavailable", "no captioner is ready", retry_after=1)
        return {"status": status}

    @app.get(
        "/info",
        tags=["about"],
        summary="Which model is served?",
        responses=documented("caption", 401),
    )
    async def info() -> dict[str, Any]:
        """The model and the checkpoint that it was loaded from, the last checkpoint that was
        refused, if any, and the limits for requests: bytes, pixels, formats, beams."""
        return {**await backend.info(), "limits": service.limits}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        # relative, so that it works behind a proxy that strips a prefix, too
        folder = "static-offline-docs"
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="caption_ray",
            swagger_js_url=f"{folder}/swagger-ui-bundle.js",
            swagger_css_url=f"{folder}/swagger-ui.css",
            swagger_favicon_url=f"{folder}/favicon.png",
        )

    page.add(app, settings.examples)
    schemas = [*caption_api.add(app, service), *chat_api.add(app, service)]
    app.openapi = partial(api_document.describe, app, schemas, tokens.required)  # type: ignore[method-assign]
    return app


# Middleware -----------------------------------------------------------------------------------


def _path(scope: Scope) -> str:
    """The path below the application's route prefix."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


def _family(scope: Scope) -> Family:
    return "chat" if _path(scope).startswith("/v1/") else "caption"


class _Authorize:
    """Middleware: refuses requests without a valid token before reading a byte of the body."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self.app = app
        self.tokens = tokens
        if not tokens.required:
            logger.warning("No tokens are configured: anyone who can connect is served")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or not self.tokens.required
            or self._is_open(scope)
            or self.tokens.accept(header(scope, b"authorization"))
        ):
            await self.app(scope, receive, send)
            return
        refusal = Refusal(
            401,
            "authentication",
            "a valid token is needed: send it as `Authorization: Bearer TOKEN`",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response(_family(scope))(scope, receive, send)

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        path = _path(scope)
        reads = scope["method"] in ("GET", "HEAD")
        return reads and (path in OPEN_PATHS or path.startswith(f"{OPEN_PATHS[-1]}/"))


class _Head:
    """Middleware: answers HEAD wherever GET is answered, with the same headers and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        await self.app({**scope, "method": "GET"}, receive, without_body)


class _Unforeseen:
    """Middleware: answers 500 to an unexpected exception."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            pass  # there is no one left to answer
        except Exception:
            refusal = unforeseen(scope)
            if has_started:
                raise
            await refusal.response(_family(scope))(scope, receive, send)
