"""The HTTP endpoint on Ray Serve: `serve run serve_config.yaml`.

    client -> Ingress (CPU: limits, decoding, errors) -> Captioner (one device: batches)

Both scale on their own. Nothing happens at import; `build_app` builds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import ray
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caption_ray import cluster
from caption_ray.config import EncoderConfig, default_storage
from caption_ray.data import transforms
from caption_ray.serving.predictor import Caption, Images, Predictor, prepare
from caption_ray.training import checkpoint
from caption_ray.training.checkpoint import CheckpointError

CHECKPOINT_VARIABLE = "CAPTION_RAY_CHECKPOINT"

DECODE_THREADS = 4
"""Pictures that one ingress decodes at a time: the largest allowed takes 200 MB."""

INGRESS_REQUESTS = 64
"""Requests in flight in one ingress: with full bodies, 640 MB."""

READY_TIMEOUT = 2.0
"""Seconds in which the captioner must answer `/readyz`."""

UNAVAILABLE = (BackPressureError, DeploymentUnavailableError, RayActorError)

logger = logging.getLogger("ray.serve")


class Arguments(BaseModel):
    """What `args` in serve_config.yaml, or `key=value` after `serve run`, may say."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

    checkpoint: str = Field(
        default_factory=lambda: os.environ.get(CHECKPOINT_VARIABLE, "latest"), min_length=1
    )
    """`latest` or `best` of the run in `storage` that was written to last, or the URI of a
    checkpoint or run (default: $CAPTION_RAY_CHECKPOINT, else latest)."""

    storage: str = Field(default_factory=default_storage, min_length=1)
    """URI of the folder that holds all runs (default: $CAPTION_RAY_STORAGE, else ./runs in the
    folder where Ray was started, which is that of `serve run` if it starts Ray itself)."""

    num_gpus: float | None = Field(
        default_factory=lambda: cast(float | None, os.environ.get(cluster.GPU_VARIABLE)), ge=0
    )
    """GPUs of each captioner, a fraction to share one; null: 1 if the cluster has any, else 0
    (default: $CAPTION_RAY_NUM_GPUS, for clusters that start GPU nodes on demand, else null)."""

    max_batch_size: int = Field(default=16, ge=1)
    """Most pictures that are captioned at once."""

    batch_wait_timeout_s: float = Field(default=0.005, ge=0)
    """Seconds that a picture waits for others to share its batch."""

    max_body_bytes: int = Field(default=10 * 1024 * 1024, ge=1)
    """Largest request body, in bytes."""


class StartError(CheckpointError, RayServeException):
    """There is nothing to serve.

    A RayServeException, because Ray then reports its message as it is; any other error of
    `build_app` it repeats three times and reports with two tracebacks.
    """


def build_app(args: Arguments | dict[str, Any]) -> Application:
    """The application that serves one verified checkpoint; `args` are those of `Arguments`.

    All replicas serve the checkpoint that is found here, also if they start later. Raises
    StartError, a CheckpointError, if there is none, or it is unreadable, of another model, or
    cannot caption: the application then never starts, and one that runs already goes on. Raises
    the same for arguments that are unknown or out of bounds.
    """
    try:
        args = Arguments.model_validate(args)
    except ValidationError as error:
        problem = _problem(error, Arguments.model_fields)
        raise StartError(f"args of caption_ray.serving.app:build_app: {problem}") from error
    try:
        if args.checkpoint in checkpoint.POINTERS:
            uri = checkpoint.find(args.storage, args.checkpoint)  # type: ignore[arg-type]
        else:
            uri = checkpoint.find(args.checkpoint)
        predictor = Predictor.from_uri(uri, torch.device("cpu"))
        predictor.warm_up()
    except (ValueError, OSError) as error:
        raise StartError(f"checkpoint {args.checkpoint!r} cannot be served: {error}") from error
    num_gpus = args.num_gpus
    if num_gpus is None:
        if not ray.is_initialized():  # `serve run` with an import path builds before it connects
            cluster.connect()
        num_gpus = 1 if cluster.num_gpus() else 0
    captioner = serve.deployment(
        # the next batch gathers while one is captioned
        max_ongoing_requests=2 * args.max_batch_size,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
    )(Captioner)
    ingress = serve.deployment(
        max_ongoing_requests=INGRESS_REQUESTS, ray_actor_options={"num_cpus": 1}
    )(serve.ingress()(Ingress))
    return ingress.bind(
        captioner.bind(uri, args.max_batch_size, args.batch_wait_timeout_s),
        predictor.encoder_config,
        args.max_body_bytes,
    )


# Captioner ------------------------------------------------------------------------------------


class Captioner:
    """One device: captions prepared pictures, as many at once as have come in."""

    def __init__(self, uri: str, max_batch_size: int, batch_wait_timeout_s: float) -> None:
        has_gpu = bool(ray.get_runtime_context().get_accelerator_ids()["GPU"])
        device = torch.device("cuda" if has_gpu else "cpu")
        self.predictor = Predictor.from_uri(uri, device)
        self.predictor.warm_up()
        # one thread, always the same: torch keeps a pool of its own for each that calls it
        self.thread = ThreadPoolExecutor(1)
        batches: Any = self._caption  # serve.batch gives it these
        batches.set_max_batch_size(max_batch_size)
        batches.set_batch_wait_timeout_s(batch_wait_timeout_s)
        logger.info(f"Captioning with {uri} on {device}")

    async def __call__(self, image: Images) -> tuple[Caption, int]:
        """The caption of one prepared picture, and how many shared its batch."""
        size = self.predictor.encoder_config.image_size
        if image.shape != (3, size, size):  # here, where it harms nobody else's batch
            raise ValueError(f"a picture of {image.shape}: give (3, {size}, {size})")
        result: tuple[Caption, int] = await self._caption(image)
        return result

    @serve.batch
    async def _caption(self, images: list[Images]) -> list[tuple[Caption, int]]:
        captions = await asyncio.get_running_loop().run_in_executor(
            self.thread, self.predictor.predict, np.stack(images)
        )
        return [(caption, len(images)) for caption in captions]

    def ready(self) -> bool:
        return True


# Ingress --------------------------------------------------------------------------------------


class Ingress:
    """Everything about HTTP; pictures are decoded here, so that devices only caption."""

    def __init__(
        self, captioner: DeploymentHandle[Any], encoder: EncoderConfig, max_body_bytes: int
    ) -> None:
        self.captioner = captioner
        self.encoder = encoder
        self.max_body_bytes = max_body_bytes

    async def caption(self, image: Images) -> tuple[Caption, int]:
        result: tuple[Caption, int] = await self.captioner.remote(image)
        return result

    async def ready(self) -> bool:
        answer = self.captioner.ready.remote()
        try:
            return bool(await asyncio.wait_for(answer, READY_TIMEOUT))
        except (asyncio.TimeoutError, *UNAVAILABLE):
            answer.cancel()
            return False

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self.caption, self.ready, self.encoder, self.max_body_bytes)


class Refusal(Exception):
    """An answer other than a caption: status, kind and a message for a person."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message

    def response(self) -> JSONResponse:
        """As huggingface_hub reads it: both values strings."""
        headers = {"Retry-After": "1"} if self.status == 503 else None
        content = {"error": self.message, "error_type": self.error_type}
        return JSONResponse(content, self.status, headers)


class CaptionRequest(BaseModel):
    """A picture in JSON, as huggingface_hub sends it when there are parameters."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    inputs: str
    """The picture's bytes in base64."""

    parameters: dict[str, Any] | None = Field(default=None, json_schema_extra={"maxProperties": 0})
    """None is supported: captions are searched for as the checkpoint says."""

    @field_validator("parameters")
    @classmethod
    def _supported(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters:
            raise PydanticCustomError("unsupported", "no parameter is supported; leave it out")
        return parameters


class GeneratedText(BaseModel):
    """A caption, as huggingface_hub reads it."""

    generated_text: str


def build_http(
    caption: Callable[[Images], Awaitable[tuple[Caption, int]]],
    ready: Callable[[], Awaitable[bool]],
    encoder: EncoderConfig,
    max_body_bytes: int,
) -> FastAPI:
    """The HTTP application around `caption`, which takes what `prepare` makes for `encoder`."""
    app = FastAPI(title="caption_ray", description="Captions for pictures.")
    app.add_middleware(_Unforeseen)
    threads = ThreadPoolExecutor(DECODE_THREADS)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return Refusal(error.status_code, "validation", message).response()

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "No captioner answers (yet)."}})
    async def readyz() -> dict[str, str]:
        """Whether pictures can be captioned."""
        if not await ready():
            raise Refusal(503, "unavailable", "no captioner answers yet")
        return {"status": "ready"}

    body = {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": CaptionRequest.model_json_schema()},
        },
    }

    @app.post("/caption", response_model=list[GeneratedText], openapi_extra={"requestBody": body})
    async def caption_picture(request: Request, response: Response) -> list[dict[str, str]]:
        """The caption of the picture in the body: its bytes, or JSON with them in base64.

        The header X-Batch-Size says how many pictures were captioned together with it.
        """
        data = await _read_body(request, max_body_bytes)
        is_json = request.headers.get("content-type", "").startswith("application/json")
        image = await asyncio.get_running_loop().run_in_executor(
            threads, _read_picture, data, is_json, encoder
        )
        try:
            found, batch_size = await caption(image)
        except UNAVAILABLE as error:
            logger.warning(f"No captioner for request {_request_id(request.scope)}: {error}")
            raise Refusal(503, "unavailable", "no captioner is free; try again") from error
        response.headers["X-Batch-Size"] = str(batch_size)
        return [{"generated_text": found.text}]

    return app


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = Refusal(413, "validation", f"the body has more than {limit} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    if not body:
        raise Refusal(400, "validation", "the body is empty: send the bytes of a picture")
    return bytes(body)


def _read_picture(data: bytes, is_json: bool, encoder: EncoderConfig) -> Images:
    """The prepared picture in a request's body."""
    if is_json or data[:1] == b"{":  # no picture begins like that
        data = _read_json(data)
    try:
        return prepare(data, encoder)
    except transforms.UnknownFormatError as error:
        raise Refusal(415, "validation", f"the picture cannot be read: {error}") from error
    except transforms.ImageError as error:
        raise Refusal(422, "validation", f"the picture cannot be read: {error}") from error


def _read_json(data: bytes) -> bytes:
    try:
        inputs = CaptionRequest.model_validate_json(data).inputs
    except ValidationError as error:
        raise Refusal(400, "validation", _problem(error, CaptionRequest.model_fields)) from error
    try:
        picture = base64.b64decode("".join(inputs.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, "validation", f"inputs is no base64: {error}") from error
    if not picture:
        raise Refusal(400, "validation", "inputs is '': give the bytes of a picture in base64")
    return picture


def _problem(error: ValidationError, valid: Iterable[str]) -> str:
    """The first of the problems: the field, its value, what is wrong and the valid fields."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the body"
    value = repr(problem["input"])
    shown = value if len(value) <= 100 else f"{value[:100]}..."
    hint = f"; valid: {', '.join(valid)}" if problem["type"] == "extra_forbidden" else ""
    return f"{field} is {shown}: {problem['msg']}{hint}"


def _request_id(scope: Scope) -> str:
    """Ray's proxy takes it from the client's X-Request-ID or makes one, and sends it back."""
    return next((value.decode() for key, value in scope["headers"] if key == b"x-request-id"), "?")


class _Unforeseen:
    """Middleware: an error that nobody foresaw is a 500 that names the request, no more; the
    stack stands in the log beside the same name."""

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
            pass  # nobody is left to answer
        except Exception:
            logger.exception(f"Request {_request_id(scope)} failed")
            if has_started:
                raise
            message = f"internal error in request {_request_id(scope)}"
            await Refusal(500, "internal", message).response()(scope, receive, send)
