"""What /openapi.json and /docs say about the endpoint as a whole, and how they are tidied.

The routes describe themselves, in caption_api.py, chat_api.py and http.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

DESCRIPTION = """\
Send a picture, get a caption:

```sh
curl --data-binary @picture.jpg HOST/caption
```

Clients of OpenAI and of Hugging Face work unchanged. An answer that is an error says what is wrong
and what to do about it. Every answer has the header `X-Request-ID`, under which the request stands
in the server's log: tell it when you report a problem.
"""

TAGS = [
    {
        "name": "captions",
        "description": "Pictures in, captions out. Also for Hugging Face's `image_to_text`.",
    },
    {
        "name": "chat",
        "description": "The same as OpenAI's chat completions: ask about a picture, and the answer "
        "is its caption.",
    },
    {"name": "about", "description": "What is served."},
    {"name": "probes", "description": "For load balancers and Kubernetes. They need no token."},
]


EXAMPLE_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4"
    "2mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel in base64: with it the requests that /docs shows can be tried."""


def describe(app: FastAPI, schemas: list[type[BaseModel]], tokens: bool) -> dict[str, Any]:
    """FastAPI's document, plus the schemas of the bodies that the APIs parse themselves. `tokens`:
    whether requests need one."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        _, definitions = models_json_schema(
            [(schema, "validation") for schema in schemas],
            ref_template="#/components/schemas/{model}",
        )
        components = described.setdefault("components", {})
        components.setdefault("schemas", {}).update(definitions.get("$defs", {}))
        _drop_fastapis_errors(described)
        _drop_titles(described)
        if tokens:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            described["security"] = [{"token": []}]
        app.openapi_schema = described
    return app.openapi_schema


def _drop_fastapis_errors(described: dict[str, Any]) -> None:
    """FastAPI documents a 422 for every route with parameters; here these errors are a 400."""
    own = {"HTTPValidationError", "ValidationError"}
    for path in described["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    schemas = described["components"]["schemas"]
    described["components"]["schemas"] = {k: v for k, v in schemas.items() if k not in own}


def _drop_titles(part: Any) -> None:
    """Titles that are only the name of a field or function in other letters ("Num Beams", "Response
    Livez Livez Get")."""
    if isinstance(part, list):
        for item in part:
            _drop_titles(item)
    elif isinstance(part, dict):
        if isinstance(part.get("title"), str) and ("type" in part or "anyOf" in part):
            if part.get("type") != "object" or part["title"].startswith("Response "):
                del part["title"]
        for item in part.values():
            _drop_titles(item)
