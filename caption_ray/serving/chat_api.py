"""`/v1`: the API for OpenAI's clients; http.py adds its routes. A captioner takes no instructions,
so it uses only the picture in the messages."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from caption_ray.config import SMALLEST
from caption_ray.serving import sse
from caption_ray.serving.caption_api import MAX_SEED, decode_base64
from caption_ray.serving.contract import MAX_LENGTH, MAX_RETURN, Answer, NextWords, Options
from caption_ray.serving.errors import Refusal, Strict, documented, read_json
from caption_ray.serving.fetch import FetchError, fetch
from caption_ray.serving.service import Service, first_of

MAX_MESSAGES = 1000
"""Most messages, and most parts of one: pydantic would report the problems of each."""


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = Field(
        default=None,
        description="Of the last message of the user: one part "
        '`{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`, and any text.',
    )

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        is_one = content is None or isinstance(content, str | list)
        if not is_one or len(parts) > MAX_MESSAGES or not all(isinstance(p, dict) for p in parts):
            raise ValueError(f"give a text, or a list of at most {MAX_MESSAGES} parts")
        return content


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """The part of OpenAI's request that a captioner supports; other fields are refused by name."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "caption_ray",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "What is this?"},
                                {
                                    "type": "image_url",
                                    "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."},
                                },
                            ],
                        }
                    ],
                }
            ]
        }
    )

    model: str
    """As `GET /v1/models` names it."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The user's last message holds the picture."""

    stream: bool = False
    """Whether words are sent as soon as they are certain."""

    stream_options: StreamOptions | None = None

    n: int | None = Field(default=None, ge=1, le=MAX_RETURN)
    """Captions, the best first."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Most words in a caption; never more than the limit that `GET /info` states."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Another name for the same."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """Above 0, words are sampled; at 0, the best caption is searched for."""

    top_p: float | None = Field(default=None, ge=SMALLEST, le=1)
    """Sample among the fewest words that together have this probability."""

    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    """The same seed samples the same captions."""

    # Accepted with values that change nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    # For OpenAI's own bookkeeping; ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def options(self) -> Options:
        drawn = self.temperature is not None or self.top_p is not None
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < SMALLEST:
            temperature = 0.0
        most = self.max_completion_tokens or self.max_tokens
        return Options(
            num_return=self.n or 1,
            max_length=None if most is None else min(most, MAX_LENGTH),
            temperature=temperature if drawn else None,
            top_p=self.top_p,
            seed=(self.seed or 0) % (MAX_SEED + 1),
        )


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens: the picture's regions as the prompt, the captions' words as the completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "caption_ray"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def add(app: FastAPI, service: Service) -> list[type[BaseModel]]:
    """Add the routes to the app; returns the models whose schemas they refer to."""
    name = service.settings.model_name
    model = Model(id=name, created=int(time.time()))
    body = {"$ref": "#/components/schemas/ChatRequest"}
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The captions.",
            "model": ChatCompletion,
            "content": {"text/event-stream": {}},
        },
        **documented("chat", 400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    }

    @app.get("/v1/models", tags=["chat"], responses=documented("chat", 401))
    async def models() -> Models:
        """The one model that is served."""
        return Models(data=[model])

    @app.get("/v1/models/{model_id:path}", tags=["chat"], responses=documented("chat", 401, 404))
    async def one_model(model_id: str) -> Model:
        """A model by its name."""
        if model_id != name:
            raise _unknown_model(model_id, name)
        return model

    @app.post(
        "/v1/chat/completions",
        tags=["chat"],
        response_model=None,
        responses=answers,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}}
        },
    )
    async def complete(request: Request) -> Response:
        """A caption of the picture in the last message of the user."""
        async with service.body(request) as data:
            asked = await asyncio.to_thread(read_json, ChatRequest, data)
            if asked.model != name:
                raise _unknown_model(asked.model, name)
            picture = await asyncio.to_thread(_picture, asked, service)
            chat_id = f"chatcmpl-{uuid.uuid4().hex}"
            if asked.stream:
                if asked.options().num_return > 1:
                    message = f"n is {asked.n}: only one caption can be streamed"
                    raise Refusal(400, "validation", message, field="n")
                parts = service.stream(picture, asked.options())
                _, parts = await first_of(parts)  # up to here errors become HTTP statuses
                return sse.response(_events(parts, asked, chat_id), request, _refused)
            answer = await service.caption(picture, asked.options())
        choices = [
            Choice(
                index=index,
                message=AssistantMessage(content=caption.text),
                finish_reason="stop" if caption.is_whole else "length",
            )
            for index, caption in enumerate(answer.captions)
        ]
        completion = ChatCompletion(
            id=chat_id,
            created=int(time.time()),
            model=name,
            choices=choices,
            usage=_usage(answer),
        )
        return JSONResponse(completion.model_dump())

    return [ChatRequest]


def _unknown_model(asked: str, known: str) -> Refusal:
    shown = asked if len(asked) <= 100 else f"{asked[:100]}..."
    message = f"model is {shown!r}: the model served here is {known!r}"
    return Refusal(404, "model_not_found", message, field="model")


def _usage(answer: Answer) -> Usage:
    words = sum(len(caption.words) + caption.is_whole for caption in answer.captions)
    return Usage(
        prompt_tokens=answer.regions,
        completion_tokens=words,
        total_tokens=answer.regions + words,
    )


def _picture(asked: ChatRequest, service: Service) -> bytes:
    """The bytes of the one picture of the user's last message. Raises Refusal."""
    number, content = next(
        (
            (number, message.content)
            for number, message in reversed(list(enumerate(asked.messages)))
            if message.role == "user"
        ),
        (0, None),
    )
    field = f"messages.{number}.content"
    parts = content if isinstance(content, list) else []
    images = [part for part in parts if part.get("type") == "image_url"]
    if len(images) != 1:
        message = (
            f"{field} has {len(images)} parts of type image_url: the last message of the user "
            "must have one"
        )
        raise Refusal(400, "validation", message, field=field)
    holder = images[0].get("image_url")
    url = holder.get("url") if isinstance(holder, dict) else None
    field = f"{field}.image_url.url"
    if not isinstance(url, str):
        raise Refusal(400, "validation", f"{field} is missing", field=field)
    if url.startswith("data:"):
        head, comma, text = url.partition(",")
        if not comma or not head.endswith(";base64"):
            message = f"{field} is not a data:image/...;base64,... URI"
            raise Refusal(400, "validation", message, field=field)
        return decode_base64(text, field)
    return _fetch(url, field, service)


def _fetch(url: str, field: str, service: Service) -> bytes:
    settings = service.settings
    if not settings.url_allow_list:
        message = f"{field}: URLs are not fetched; send the picture as data:image/...;base64,..."
        raise Refusal(400, "validation", message, field=field)
    try:
        return fetch(url, settings.url_allow_list, settings.max_body_bytes, settings.body_timeout_s)
    except FetchError as error:
        status = 413 if error.kind == "too_large" else 400
        raise Refusal(status, "fetch", f"{field}: {error}", field=field) from error


async def _events(
    parts: AsyncIterator[NextWords | Answer], asked: ChatRequest, chat_id: str
) -> AsyncIterator[str]:
    """The answer's chunks, as server-sent events in OpenAI's format."""
    created = int(time.time())
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        content: dict[str, Any] = {
            "id": chat_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": asked.model,
            "choices": choices,
        }
        if with_usage:
            content["usage"] = usage.model_dump() if usage else None
        return sse.event(content)

    def choice(delta: dict[str, str], finish_reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": finish_reason}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    told = 0  # characters
    async for part in parts:
        text = part.captions[0].text[told:] if isinstance(part, Answer) else part.text
        if text:
            yield chunk(choice({"content": text}))
            told += len(text)
        if isinstance(part, Answer):
            reason = "stop" if part.captions[0].is_whole else "length"
            yield chunk(choice({}, reason))
            if with_usage:
                yield chunk([], _usage(part))
    yield "data: [DONE]\n\n"


def _refused(refusal: Refusal) -> str:
    return sse.event(refusal.content("chat"))
