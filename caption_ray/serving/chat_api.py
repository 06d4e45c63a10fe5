"""`/v1`: the API for OpenAI's clients; http.py adds its routes. A captioner takes no instructions,
so it uses only the pictures in the messages.

What a request asks for is done or refused by name; what asks for nothing is accepted: null, empty
lists, settings at the value that changes nothing, notes of the client's own.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from caption_ray.config import SMALLEST
from caption_ray.serving import sse
from caption_ray.serving.api_document import EXAMPLE_PICTURE
from caption_ray.serving.budget import Share
from caption_ray.serving.caption_api import MAX_SEED, decode_base64
from caption_ray.serving.contract import MAX_LENGTH, MAX_RETURN, Answer, NextWords, Options
from caption_ray.serving.conversation import UpToStop, picture_urls
from caption_ray.serving.errors import Refusal, Strict, documented, read_json
from caption_ray.serving.service import Service, first_of

ASKS_FOR_NOTHING: tuple[Any, ...] = (None, False, "", [], {}, "none")
"""Values of any other field that are accepted."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("auto",),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "reasoning_effort": ("minimal",),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "tool_choice": ("auto",),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "verbosity": ("low", "medium"),
    # only to name them when they are refused
    "functions": (),
    "logit_bias": (),
    "logprobs": (),
    "tools": (),
}
"""Fields of OpenAI's API and vLLM's, with values of theirs that change nothing either."""

NOTES = frozenset(
    "metadata prompt_cache_key prompt_cache_retention request_id safety_identifier service_tier "
    "session_id store tags trace_id user".split()
)
"""Fields for the client's own bookkeeping: ignored."""

MAX_STOPS = 4
MAX_STOP = 1000
"""Most sequences in `stop`, as in OpenAI's API, and most characters of one."""

MAX_MESSAGES = 1000
"""Most messages, and most parts of one: pydantic would report the problems of each."""


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = Field(
        default=None,
        description="Of the user: parts such as "
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
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: there is nothing to hide in how long a word is."""


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """The part of OpenAI's request that a captioner supports. Other fields are accepted where they
    ask for nothing, and refused by name otherwise."""

    model_config = ConfigDict(
        extra="allow",
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
                                    "image_url": {
                                        "url": f"data:image/png;base64,{EXAMPLE_PICTURE}"
                                    },
                                },
                            ],
                        }
                    ],
                }
            ]
        },
    )

    model: str | None = None
    """Any name: one model is served, which the answer and `GET /v1/models` name."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The user's last message with pictures counts. Each of its pictures is captioned; of several,
    the answer has a line each, `Image 1: ...`."""

    stream: bool | None = None
    """Whether words are sent as soon as they are certain."""

    stream_options: StreamOptions | None = None

    n: int | None = Field(default=None, ge=1, le=MAX_RETURN)
    """How many captions to return, the best first."""

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

    stop: str | list[str] | None = None
    """Up to four sequences; a caption ends before the first of them."""

    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        sequences = [stop] if isinstance(stop, str) else stop or []
        if len(sequences) > MAX_STOPS or any(len(text) > MAX_STOP for text in sequences):
            raise ValueError(f"give at most {MAX_STOPS} sequences of at most {MAX_STOP} characters")
        return stop

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

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
        **documented("chat", 400, 401, 404, 408, 413, 429, 500, 503, 504),
    }

    @app.get(
        "/v1/models",
        tags=["chat"],
        summary="List the models",
        responses=documented("chat", 401),
    )
    async def models() -> Models:
        """There is always one: the captioner."""
        return Models(data=[model])

    @app.get(
        "/v1/models/{model_id:path}",
        tags=["chat"],
        summary="Look up a model",
        responses=documented("chat", 401, 404),
    )
    async def one_model(model_id: str) -> Model:
        """404 if the captioner has another name."""
        if model_id != name:
            raise _unknown_model(model_id, name)
        return model

    @app.post(
        "/v1/chat/completions",
        tags=["chat"],
        summary="Ask about a picture",
        response_model=None,
        responses=answers,
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}}
        },
    )
    async def complete(request: Request) -> Response:
        """The answer is a caption of the picture in the last message that has one, whatever its
        text asks. Of several pictures in that message each is captioned, on a line of its own."""
        async with service.body(request) as received:
            asked = await service.parse(read_json, ChatRequest, received.data)
            _require_supported(asked)
            pictures = await _pictures(asked, service, received.share)
            chat_id = f"chatcmpl-{uuid.uuid4().hex}"
            if asked.stream:
                parts = _stream(pictures, asked, service)
                _, parts = await first_of(parts)  # up to here errors become HTTP statuses
                events = _events(parts, asked, len(pictures), chat_id, name)
                return sse.response(events, request, _refused)
            answers = await service.caption_all(pictures, asked.options())
        completion = ChatCompletion(
            id=chat_id,
            created=int(time.time()),
            model=name,
            choices=_choices(answers, asked),
            usage=_usage(answers),
        )
        return JSONResponse(completion.model_dump())

    return [ChatRequest]


def _require_supported(asked: ChatRequest) -> None:
    """Raise Refusal for a field that asks for what a captioner cannot do."""
    for name, value in (asked.model_extra or {}).items():
        neutral = NEUTRAL.get(name, ())
        if name in NOTES or any(_same(value, one) for one in (*ASKS_FOR_NOTHING, *neutral)):
            continue
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
        why = f"unknown; valid: {', '.join(ChatRequest.model_fields)}"
        if name in NEUTRAL:
            why = "a captioner cannot do that; leave it out"
            if neutral:
                why += f" or give {' or '.join(map(repr, neutral))}"
        raise Refusal(400, "validation", f"{name} is {shown}: {why}", field=name)


def _same(one: Any, other: Any) -> bool:
    """Equal, but neither False and 0 nor True and 1 are the same."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _choices(answers: list[Answer], asked: ChatRequest) -> list[Choice]:
    choices = []
    for index in range(max(len(answer.captions) for answer in answers)):
        lines, is_whole = [], True
        for number, answer in enumerate(answers, 1):
            caption = answer.captions[min(index, len(answer.captions) - 1)]
            until = UpToStop(asked.stops)
            lines.append(_prefix(number, len(answers)) + until.feed(caption.text) + until.rest())
            is_whole = is_whole and (caption.is_whole or until.stopped)
        message = AssistantMessage(content="".join(lines))
        choices.append(
            Choice(index=index, message=message, finish_reason="stop" if is_whole else "length")
        )
    return choices


def _prefix(number: int, pictures: int) -> str:
    """What stands before the caption of this picture, the first being 1."""
    if pictures == 1:
        return ""
    return ("\n" if number > 1 else "") + f"Image {number}: "


def _unknown_model(asked: str, known: str) -> Refusal:
    shown = asked if len(asked) <= 100 else f"{asked[:100]}..."
    message = f"model is {shown!r}: the model served here is {known!r}"
    return Refusal(404, "model_not_found", message, field="model")


def _usage(answers: list[Answer]) -> Usage:
    words = sum(
        len(caption.words) + caption.is_whole for answer in answers for caption in answer.captions
    )
    regions = sum(answer.regions for answer in answers)
    return Usage(prompt_tokens=regions, completion_tokens=words, total_tokens=regions + words)


async def _pictures(asked: ChatRequest, service: Service, share: Share) -> dict[str, bytes]:
    """The pictures that are asked about, by their fields; one alone is "the picture". Raises
    Refusal."""
    found = {}
    for url, field in picture_urls(asked.messages):
        if re.match("https?://", url, re.IGNORECASE):
            found[field] = await service.fetch(url, field, share)
        else:
            found[field] = await service.parse(decode_base64, url, field)
    if len(found) == 1:
        return {"the picture": next(iter(found.values()))}
    return found


async def _stream(
    pictures: dict[str, bytes], asked: ChatRequest, service: Service
) -> AsyncIterator[NextWords | Answer]:
    """The words and the answer of each picture, one picture after the other."""
    for picture in pictures.values():
        async for part in service.stream(picture, asked.options()):
            yield part


async def _events(
    parts: AsyncIterator[NextWords | Answer],
    asked: ChatRequest,
    pictures: int,
    chat_id: str,
    model: str,
) -> AsyncIterator[str]:
    """The answer's chunks, as server-sent events in OpenAI's format. Only the best caption comes
    word by word, the others, if there are any, in one piece."""
    created = int(time.time())
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        content: dict[str, Any] = {
            "id": chat_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": choices,
        }
        if with_usage:
            content["usage"] = usage.model_dump() if usage else None
        return sse.event(content)

    def choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> str:
        return chunk([{"index": index, "delta": delta, "finish_reason": finish_reason}])

    answers: list[Answer] = []
    told, until, begun = 0, UpToStop(asked.stops), False
    async for part in parts:
        if not begun and not answers:
            yield choice(0, {"role": "assistant", "content": ""})
        text = part.captions[0].text[told:] if isinstance(part, Answer) else part.text
        told += len(text)
        new = until.feed(text) + (until.rest() if isinstance(part, Answer) else "")
        if not begun:
            new, begun = _prefix(len(answers) + 1, pictures) + new, True
        if new:
            yield choice(0, {"content": new})
        if isinstance(part, Answer):
            answers.append(part)
            told, until, begun = 0, UpToStop(asked.stops), False
    for found in _choices(answers, asked):
        if found.index:
            yield choice(found.index, {"role": "assistant", "content": found.message.content})
        yield choice(found.index, {}, found.finish_reason)
    if with_usage:
        yield chunk([], _usage(answers))
    yield "data: [DONE]\n\n"


def _refused(refusal: Refusal) -> str:
    return sse.event(refusal.content("chat"))
