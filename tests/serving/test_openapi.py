"""/openapi.json describes what the endpoint does: schemathesis generates requests from it, valid
ones and mutated, invalid ones, and checks the answers."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
"""Not positive_data_acceptance: no schema tells what is a picture, or how many beams suffice."""

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
"""One pixel."""


schemathesis.openapi.media_type("image/*", st.just(PNG) | st.binary(max_size=100))


SETTINGS = settings(
    max_examples=150,
    derandomize=True,  # the same requests each time
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

OPERATIONS = [
    ("POST", "/caption"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/models"),
    ("GET", "/info"),
    ("GET", "/livez"),
    ("GET", "/readyz"),
]


@pytest.fixture
def described(client: Callable[..., TestClient]) -> Any:
    app = client(max_body_bytes=10**7, max_buffered_bytes=10**8).app  # 413 would hide a 400
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_no_operation_is_left_out(described: Any) -> None:
    found = {
        (operation.ok().method.upper(), operation.ok().path)
        for operation in described.get_all_operations()
    }
    assert found == set(OPERATIONS)


def test_every_operation_has_a_summary_that_a_person_wrote(
    client: Callable[..., TestClient],
) -> None:
    document = client().get("/openapi.json").json()
    tags = {tag["name"] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # FastAPI's own: "Readyz" of the function readyz
            assert operation["summary"].lower() != operation["operationId"].replace("_", " "), path
            assert operation["description"] and set(operation["tags"]) <= tags
    assert "Response " not in str(
        [s.get("title") for s in document["components"]["schemas"].values()]
    )


def test_the_requests_that_the_documentation_shows_are_answered(
    client: Callable[..., TestClient],
) -> None:
    http = client(max_body_bytes=10**6)
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for path, name in (("/caption", "CaptionRequest"), ("/v1/chat/completions", "ChatRequest")):
        for example in schemas[name]["examples"]:
            assert http.post(path, json=example).status_code == 200, example


def with_picture(case: Any) -> Any:
    """The same request, but with a real picture: schemas only know strings."""
    text = base64.b64encode(PNG).decode()
    if case.media_type == "multipart/form-data":
        case.body = {"image": [PNG]}
    elif case.path == "/caption" and isinstance(case.body, dict):
        is_list = isinstance(case.body["inputs"], list)
        case.body["inputs"] = [text] * len(case.body["inputs"]) if is_list else text
    elif case.path == "/v1/chat/completions":
        url = {"url": f"data:image/png;base64,{text}"}
        message = {"role": "user", "content": [{"type": "image_url", "image_url": url}]}
        case.body["model"] = "caption_ray"
        case.body["messages"].append(message)
    return case


def is_text_in_a_form(case: Any) -> bool:
    """Whether a form's text field is an object: it is sent as JSON, which is a valid text."""
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return is_form and isinstance(case.body.get("parameters"), dict)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_valid_requests_are_answered_as_described(described: Any, method: str, path: str) -> None:
    statuses = set()

    @SETTINGS
    @given(described[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def check(case: Any) -> None:
        answer = with_picture(case).call_and_validate(checks=CHECKS)
        statuses.add(answer.status_code)

    check()
    assert (404 if "{" in path else 200) in statuses
    assert statuses <= {200, 400, 404, 415, 422}


@pytest.mark.parametrize(("method", "path"), OPERATIONS[:2])
def test_invalid_requests_are_refused_as_described(described: Any, method: str, path: str) -> None:
    @SETTINGS
    @given(described[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        must_be_refused = [] if is_text_in_a_form(case) else [negative_data_rejection]
        case.call_and_validate(checks=[*CHECKS, *must_be_refused])

    check()
