"""Error answers: a status, a kind and a message for the client, in each API's own form."""

from __future__ import annotations

import codecs
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.responses import JSONResponse

Family = Literal["caption", "chat"]
"""The API whose clients read the answer: Hugging Face's (and all others), or OpenAI's (`/v1`)."""

MAX_FIELDS = 100
"""Most fields of an object in a request; no model has that many."""

Read = TypeVar("Read", bound=BaseModel)

CHAT_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An error answer, raised anywhere while a request is handled."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message
        self.field = field
        """Name of the field of the request that is wrong."""
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def content(self, family: Family) -> dict[str, Any]:
        """The body: huggingface_hub expects `error` to be a string, openai an object."""
        if family == "caption":
            return {"error": self.message, "error_type": self.error_type}
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": CHAT_TYPES.get(self.status, fallback),
            "param": self.field,
            "code": self.error_type,
        }
        return {"error": error}

    def response(self, family: Family) -> JSONResponse:
        """The answer. A bad picture is 400 to chat's clients, as OpenAI has it: there are some that
        try any other status again, up to six times."""
        headers = dict(self.headers)
        status = 400 if family == "chat" and self.status in (415, 422) else self.status
        if family == "chat" and self.status < 500 and self.status not in (408, 429):
            headers["x-should-retry"] = "false"  # it would fail again
        return JSONResponse(self.content(family), status, headers)


class Error(BaseModel):
    """An error in the form that Hugging Face's clients expect."""

    error: str = Field(description="What is wrong and what to do, for people.")
    error_type: str = Field(description="Its kind, for programs.")


class ChatErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ChatError(BaseModel):
    """An error in the form that OpenAI's clients expect."""

    error: ChatErrorDetails


KINDS = {
    400: "The request is invalid; the message names the field, its value and the bound.",
    401: "No valid token in `Authorization: Bearer`.",
    404: "There is no such model.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "Not a picture in an accepted format.",
    422: "A picture that is damaged or has too many pixels.",
    429: "Overloaded; try again after `Retry-After` seconds.",
    500: "An unexpected error; the log has its stack trace under the request id.",
    503: "No captioner can be reached; try again.",
    504: "The captioner took too long.",
}


def documented(family: Family, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses, which openapi.json documents."""
    model = Error if family == "caption" else ChatError
    return {status: {"model": model, "description": KINDS[status]} for status in statuses}


class Strict(BaseModel):
    """A model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # pydantic collects all problems: for a million unknown fields they would take gigabytes
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"{len(value)} fields; valid: {', '.join(cls.model_fields)}")
        return value


def read_json(model: type[Read], data: str | bytes, prefix: str = "") -> Read:
    """JSON as `model`; raises Refusal. Nothing is converted: neither true nor "1" is a number."""
    if isinstance(data, bytes):
        data = data.removeprefix(codecs.BOM_UTF8)  # programs on Windows like to begin with it
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise explain(error, model, prefix) from error


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> Refusal:
    """The first of the problems of `model`: the field, its value, what is wrong and, for an unknown
    field, the valid ones."""
    return refuse_field(error.errors(include_url=False)[0], model, prefix)


def refuse_field(
    problem: Any, model: type[BaseModel], prefix: str = "", whole: str = "the body"
) -> Refusal:
    """The Refusal for one of pydantic's problems; `whole` names what is wrong if not a field."""
    path = [str(part) for part in problem["loc"]]
    field = ".".join([prefix] * bool(prefix) + path) or whole
    value = repr(problem.get("input"))
    shown = value if len(value) <= 100 else f"{value[:100]}..."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown; valid: {', '.join(_fields(model, path[:-1]))}"
    return Refusal(400, "validation", f"{field} is {shown}: {message}", field=field)


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """The fields of the model that is nested at `path` in `model`."""
    for part in path:
        field = model.model_fields.get(part)
        below = _models_in(field.annotation) if field is not None else []
        model = below[0] if below else model
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
