"""`POST /caption`: for Hugging Face's clients, for curl, for forms and for the page.

The body is a picture, JSON with pictures in base64, or a form with pictures; parameters come in the
query string, in the JSON or in the form. http.py adds the route.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import unquote

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from caption_ray import storage
from caption_ray.config import SMALLEST, Count
from caption_ray.serving import sse
from caption_ray.serving.api_document import EXAMPLE_PICTURE
from caption_ray.serving.contract import (
    MAX_BEAMS,
    MAX_LENGTH,
    MAX_RETURN,
    Answer,
    NextWords,
    Options,
)
from caption_ray.serving.errors import Refusal, Strict, documented, explain, read_json
from caption_ray.serving.service import MAX_PICTURES, Service, first_of

MAX_SEED = 2**63 - 1

JAVASCRIPT_CLIENT = "@huggingface/inference"
"""How the User-Agent of Hugging Face's client for JavaScript begins: its imageToText fails on a
list. (In browsers it cannot say so, and needs `?format=object`.)"""


class Generation(Strict):
    """How captions are generated; the checkpoint's settings are the defaults."""

    num_return_sequences: int = Field(default=1, ge=1, le=MAX_RETURN)
    """How many captions to return for each picture, the best first."""

    num_beams: int | None = Field(default=None, ge=1, le=MAX_BEAMS)
    """Width of the beam search; 1 is greedy search. At least `num_return_sequences`, unless words
    are sampled."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_LENGTH)
    """Greatest number of words in a caption."""

    min_new_tokens: int | None = Field(default=None, ge=0, le=MAX_LENGTH)
    """Smallest number of words before a caption may end."""

    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=MAX_LENGTH)
    """No sequence of this many words appears twice in a caption; 0 allows repetition."""

    length_penalty: float | None = Field(default=None, ge=0, le=5)
    """Captions are ranked by log-probability / length ** length_penalty: larger values favour
    longer captions."""

    do_sample: bool | None = None
    """Sample words at random instead of searching for the likeliest caption. Implied by
    `temperature`, `top_k` and `top_p`."""

    temperature: float | None = Field(default=None, ge=SMALLEST, le=10)
    """Words are sampled from softmax(logits / temperature); 1 if it is not given."""

    top_k: Count | None = None
    """Sample only among this many of the likeliest words."""

    top_p: float | None = Field(default=None, ge=SMALLEST, le=1)
    """Sample only among the likeliest words that together have this probability."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """The same seed gives the same samples."""

    @model_validator(mode="after")
    def _consistent(self) -> Generation:
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = [name for name, value in drawn.items() if value is not None]
        if self.do_sample is False and given:
            raise ValueError(f"do_sample is false, so leave out {', '.join(given)}")
        if not self.samples and self.num_beams is not None:
            if self.num_beams < self.num_return_sequences:
                raise ValueError(
                    f"num_beams is {self.num_beams}, num_return_sequences "
                    f"{self.num_return_sequences}: there are no more captions than beams"
                )
        most = self.max_new_tokens
        if most is not None and (self.min_new_tokens or 0) > most:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, max_new_tokens {most}: the minimum is "
                "above the maximum"
            )
        if self.samples and (self.num_beams or 1) > 1:
            raise ValueError(f"num_beams is {self.num_beams}: either sample or use beams")
        return self

    @property
    def samples(self) -> bool:
        drawn = (self.temperature, self.top_k, self.top_p)
        return bool(self.do_sample) or any(value is not None for value in drawn)


class Parameters(Generation):
    """Parameters of `POST /caption`, in the query string or in a form."""

    return_attention: bool = False
    """Whether each caption comes with its words' attention."""

    stream: bool = False
    """Whether words are sent as soon as they are certain, as server-sent events: `words` with
    `{"words": [...]}`, finally `captions` with what the answer would have been, or `error`."""

    format: Literal["list", "object"] = "list"
    """`object`: only the best caption, not in a list, as Hugging Face's client for JavaScript
    expects it; where that says who it is, this is the default."""

    def options(self) -> Options:
        temperature = (self.temperature or 1.0) if self.samples else None
        return Options(
            num_return=self.num_return_sequences,
            beam_size=self.num_beams,
            max_length=self.max_new_tokens,
            min_length=self.min_new_tokens,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            length_penalty=self.length_penalty,
            temperature=0.0 if self.do_sample is False else temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            attention=self.return_attention,
        )


class JsonParameters(Parameters):
    """Parameters of `POST /caption`, in JSON."""

    generation_parameters: Generation | None = None
    """The generation's parameters may also be here, where huggingface_hub puts them."""

    generate_kwargs: Generation | None = None
    """Another name for the same."""


class CaptionRequest(Strict):
    """Pictures in JSON."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": EXAMPLE_PICTURE, "parameters": {"num_return_sequences": 3}}]
        },
    )

    inputs: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES)] = Field(
        description="A picture's bytes in base64, or a list of such."
    )
    parameters: JsonParameters | None = None

    @field_validator("inputs", mode="before")
    @classmethod
    def _texts(cls, inputs: Any) -> Any:
        texts = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(texts) <= MAX_PICTURES or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"give a picture in base64 as text, or a list of 1 to {MAX_PICTURES}")
        return inputs


class Attention(BaseModel):
    """Where the model looked for each word of a caption."""

    rows: int
    columns: int
    box: list[float] = Field(
        description="The part of the upright picture that the grid covers: left, top, right and "
        "bottom as fractions of its width and height."
    )
    weights: list[list[float]] = Field(
        description="For each word the weights of the grid's cells, row by row; they sum to one."
    )


class GeneratedCaption(BaseModel):
    """A caption."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"generated_text": "a dog runs across the grass", "log_prob": -4.21}]
        }
    )

    generated_text: str
    log_prob: float = Field(description="Natural logarithm of the caption's probability.")
    words: list[str] | None = Field(default=None, description="If attention was requested.")
    attention: Attention | None = None


class Asked(NamedTuple):
    """What a request asks for, from its body and its query string."""

    pictures: list[bytes]
    is_list: bool
    """Whether the answer is a list with an element per picture."""
    parameters: Parameters


def add(app: FastAPI, service: Service) -> list[type[BaseModel]]:
    """Add the route to the app; returns the models whose schemas it refers to."""
    ref = "#/components/schemas/CaptionRequest"
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "parameters": {"type": "string", "description": "As in the JSON body, as text."},
            **{name: {"type": "string"} for name in Parameters.model_fields},
        },
    }
    body = {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": {"$ref": ref}},
            "multipart/form-data": {"schema": form},
        },
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "Captions, the best first; a list of these for a list of pictures.",
            "model": list[GeneratedCaption] | list[list[GeneratedCaption]] | GeneratedCaption,
            "content": {"text/event-stream": {}, "text/plain": {}},
        },
        **documented("caption", 400, 401, 408, 413, 415, 422, 429, 500, 503, 504),
    }

    @app.post("/", include_in_schema=False, response_model=None)  # Inference Endpoints' habit
    @app.post(
        "/caption",
        tags=["captions"],
        summary="Caption pictures",
        response_model=None,
        responses=answers,
        openapi_extra={"requestBody": body},
    )
    async def caption(request: Request, query: Annotated[Parameters, Query()]) -> Response:
        """The body is the bytes of a picture, JSON with pictures in base64, or a form with files.

        The answer's header `X-Checkpoint` names the checkpoint, and `X-Batch-Size` says how many
        pictures were captioned together. With `Accept: text/plain` the answer has only the
        captions, one on each line.
        """
        async with service.body(request) as body:
            asked = await _read(body.data, request.headers, query, service)
            options = asked.parameters.options()
            if asked.parameters.stream:
                parts = service.stream(asked.pictures[0], options)
                _, parts = await first_of(parts)  # up to here errors become HTTP statuses
                return sse.response(_events(parts, asked), request, _refused)
            names = [f"inputs.{n}" for n in range(len(asked.pictures))]
            if not asked.is_list:
                names = ["the picture"]
            answers = await service.caption_all(
                dict(zip(names, asked.pictures, strict=True)), options
            )
        headers = {
            "X-Checkpoint": ",".join(map(storage.name, answers[0].checkpoint.split(","))),
            "X-Batch-Size": str(max(answer.batch_size for answer in answers)),
        }
        accept = request.headers.get("accept", "")
        if _quality(accept, "text/plain") > _quality(accept, "application/json"):
            lines = (caption.text + "\n" for answer in answers for caption in answer.captions)
            return PlainTextResponse("".join(lines), headers=headers)
        return JSONResponse(_content(answers, asked), headers=headers)

    return [CaptionRequest]


def _quality(accept: str, kind: str) -> float:
    """How much an Accept header wants a type of content (RFC 9110, 12.5.1)."""
    ranges = {"*/*": 0, f"{kind.partition('/')[0]}/*": 1, kind: 2}
    best, quality = -1, 0.0
    for part in accept.lower().split(","):
        media, *parameters = (text.strip() for text in part.split(";"))
        if ranges.get(media, -1) > best:
            best, weight = ranges[media], [p[2:] for p in parameters if p.startswith("q=")]
            try:
                quality = float(weight[0]) if weight else 1.0
            except ValueError:
                quality = 0.0
    return quality


def _content(answers: list[Answer], asked: Asked) -> Any:
    found: list[Any] = [_captions(answer, asked.parameters) for answer in answers]
    if asked.parameters.format == "object":
        found = [captions[0] for captions in found]
    return found if asked.is_list else found[0]


def _captions(answer: Answer, parameters: Parameters) -> list[dict[str, Any]]:
    captions = []
    for caption in answer.captions:
        content: dict[str, Any] = {"generated_text": caption.text, "log_prob": caption.log_prob}
        if parameters.return_attention:
            content["words"] = caption.words
            content["attention"] = None
            if caption.attention is not None:
                words, rows, columns = caption.attention.shape
                weights = caption.attention.reshape(words, rows * columns).astype(float).round(6)
                content["attention"] = {
                    "rows": rows,
                    "columns": columns,
                    "box": list(answer.box),
                    "weights": weights.tolist(),
                }
        captions.append(content)
    return captions


async def _events(parts: AsyncIterator[NextWords | Answer], asked: Asked) -> AsyncIterator[str]:
    async for part in parts:
        if isinstance(part, Answer):
            yield sse.event(_content([part], asked), "captions")
        else:
            yield sse.event({"words": part.words}, "words")


def _refused(refusal: Refusal) -> str:
    return sse.event({**refusal.content("caption"), "status": refusal.status}, "error")


# Bodies ---------------------------------------------------------------------------------------


async def _read(data: bytes, headers: Headers, query: Parameters, service: Service) -> Asked:
    """Parses the body and merges the query's parameters. Raises Refusal."""
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        asked = await _read_form(data, headers, query)
    # no picture begins with this
    elif kind == "application/json" or data.removeprefix(codecs.BOM_UTF8)[:1] == b"{":
        asked = await service.parse(_read_json, data, query)
    else:
        asked = Asked([data], False, query)
    if "format" not in asked.parameters.model_fields_set and headers.get(
        "user-agent", ""
    ).startswith(JAVASCRIPT_CLIENT):
        asked = asked._replace(parameters=asked.parameters.model_copy(update={"format": "object"}))
    if asked.parameters.stream and asked.is_list:
        raise Refusal(400, "validation", "stream is true: send one picture", field="stream")
    return asked


def _read_json(data: bytes, query: Parameters) -> Asked:
    request = read_json(CaptionRequest, data)
    is_list = isinstance(request.inputs, list)
    inputs = request.inputs if isinstance(request.inputs, list) else [request.inputs]
    pictures = [
        decode_base64(text, f"inputs.{number}" if is_list else "inputs")
        for number, text in enumerate(inputs)
    ]
    return Asked(pictures, is_list, _merge(request.parameters, query))


async def _read_form(data: bytes, headers: Headers, query: Parameters) -> Asked:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    most = 1 + len(Parameters.model_fields)
    parser = MultiPartParser(headers, stream(), max_files=MAX_PICTURES, max_fields=most)
    parser.spool_max_size = len(data)  # keeps it in memory: uploads are never stored
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refusal(400, "validation", f"the form cannot be read: {error}") from error
    valid = ["image", "parameters", *Parameters.model_fields]
    unknown = sorted(set(form) - set(valid))
    if unknown:
        # repr, as the form's charset may give characters that cannot be encoded
        message = f"{unknown[0][:100]!r} is not a field of the form; valid: {', '.join(valid)}"
        raise Refusal(400, "validation", message, field=unknown[0][:100])
    files = [file for file in form.getlist("image") if isinstance(file, UploadFile)]
    if not files or len(files) != len(form.getlist("image")):
        message = "image is missing, or not a file: send pictures as files named image"
        raise Refusal(400, "validation", message, field="image")
    text = form.get("parameters")
    own = read_json(JsonParameters, str(text), "parameters") if text is not None else None
    fields = {name: value for name, value in form.items() if name in Parameters.model_fields}
    try:  # text, which becomes numbers as in the query
        beside = Parameters.model_validate(fields)
    except ValidationError as error:
        raise explain(error, Parameters) from error
    pictures = [await file.read() for file in files]
    return Asked(pictures, len(pictures) > 1, _merge(own, _merge(beside, query)))


def _merge(own: Parameters | None, query: Parameters) -> Parameters:
    """The parameters of the body, those nested in it and the query's, as one. Raises Refusal."""
    if own is None:
        return query
    sources: list[BaseModel] = [query, own]
    if isinstance(own, JsonParameters):
        sources += [part for part in (own.generation_parameters, own.generate_kwargs) if part]
    merged: dict[str, Any] = {}
    nested = {"generation_parameters", "generate_kwargs"}
    for source in sources:
        given = source.model_dump(exclude_unset=True, exclude_none=True, exclude=nested)
        for name, value in given.items():
            if merged.get(name, value) != value:
                message = f"{name} is both {merged[name]!r} and {value!r}: give it once"
                raise Refusal(400, "validation", message, field=name)
            merged[name] = value
    try:
        return Parameters.model_validate(merged)
    except ValidationError as error:
        raise explain(error, Parameters, "parameters") from error


def decode_base64(text: str, field: str) -> bytes:
    """The bytes that base64 `text` encodes: plain or as a data: URI, of either alphabet, with line
    breaks and without padding, as clients have it. Raises Refusal, which names the field."""
    head, comma, encoded = text.partition(",")
    if not comma:
        encoded = text
    elif not re.fullmatch(r"\s*data:[^,]*;\s*base64\s*", head, re.IGNORECASE):
        message = f"{field} is {text[:40]!r}...: give base64, alone or as data:image/...;base64,..."
        raise Refusal(400, "validation", message, field=field)
    # a data: URI may have its padding escaped
    plain = "".join(unquote(encoded).split()).translate(_TO_PLAIN).rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"{field} is {text[:40]!r}..., which is not base64: {error}"
        raise Refusal(400, "validation", message, field=field) from error
    if not data:
        message = f"{field} is empty: give the bytes of a picture in base64"
        raise Refusal(400, "validation", message, field=field)
    return data


_TO_PLAIN = str.maketrans("-_", "+/")
"""From the alphabet that URLs may hold to the common one."""
