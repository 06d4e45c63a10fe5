"""The HTTP application, on any `Backend`: tokens, probes, documentation and the page.

ingress.py builds it. caption_api.py (Hugging Face's clients, curl, the page) and chat_api.py
(OpenAI's clients) add the routes that caption; errors.py has the form of error answers.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caption_ray import storage
from caption_ray.data import shapes, transforms
from caption_ray.serving import api_document, caption_api, chat_api
from caption_ray.serving.auth import Tokens
from caption_ray.serving.contract import Backend
from caption_ray.serving.errors import Family, Refusal, documented, refuse_field
from caption_ray.serving.service import Service, Settings, header, unforeseen

OPEN_PATHS = ("/livez", "/readyz", "/", "/docs", "/openapi.json", "/static-offline-docs")
"""Paths that can be read without a token: the probes, the page and the documentation."""

MAX_EXAMPLES = 4
"""Most example pictures that the page shows."""

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

    _add_page(app, settings.examples)
    schemas = [*caption_api.add(app, service), *chat_api.add(app, service)]
    app.openapi = partial(api_document.describe, app, schemas, tokens.required)  # type: ignore[method-assign]
    return app


# The page -------------------------------------------------------------------------------------


def _add_page(app: FastAPI, examples: str | None) -> None:
    html = (Path(__file__).parent / "page" / "index.html").read_text()
    policy = _content_security_policy(html)
    pictures = _drawn_scenes() if examples is None else _pictures_in(examples)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(html, media_type="text/html", headers=headers)

    @app.get("/examples", include_in_schema=False)
    async def list_examples() -> dict[str, list[dict[str, str]]]:
        return {"examples": [{"name": name, "url": f"examples/{quote(name)}"} for name in pictures]}

    @app.get("/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in pictures:
            raise HTTPException(404)
        kind = Image.MIME.get(str(Image.open(io.BytesIO(pictures[name])).format))
        return Response(pictures[name], media_type=kind)


def _content_security_policy(html: str) -> str:
    """A policy that allows only the page's own style and script, and requests to this server."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)

    return (
        f"default-src 'none'; style-src {digests('style')}; script-src {digests('script')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _drawn_scenes() -> dict[str, bytes]:
    """Scenes of the embedded data set: PNG bytes by name. The README asks for scene-1.png."""
    pictures = {}
    for number in range(MAX_EXAMPLES):
        buffer = io.BytesIO()
        shapes.draw(shapes.scene("val", number, seed=0)).save(buffer, "PNG")
        pictures[f"scene-{number + 1}.png"] = buffer.getvalue()
    return pictures


def _pictures_in(folder: str) -> dict[str, bytes]:
    """The first pictures in a folder or bucket prefix: their bytes by name. Raises ValueError."""
    uri = storage.resolve(folder)
    pictures = {}
    try:
        for file in storage.list_files(uri)[:MAX_EXAMPLES]:
            data = storage.read_bytes(file)
            transforms.image_size(data)
            pictures[storage.name(file)] = data
    except transforms.ImageError as error:
        raise ValueError(f"examples is {folder!r}: {file} is not a picture: {error}") from error
    except OSError as error:
        raise ValueError(f"examples is {folder!r}: {error}") from error
    if not pictures:
        raise ValueError(f"examples is {folder!r}: there are no files; name a folder of pictures")
    return pictures


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
