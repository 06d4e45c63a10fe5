"""HTTP as clients of all kinds speak it: HEAD, compressed bodies, plain text, other origins."""

from __future__ import annotations

import base64
import codecs
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from serving_fixtures import MAX_BODY_BYTES
from starlette.testclient import TestClient

Clients = Callable[..., TestClient]
Pictures = Callable[..., bytes]
Captions = Callable[..., Any]
Refused = Callable[..., None]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chat(data: bytes) -> bytes:
    url = {"url": f"data:;base64,{text(data)}"}
    content = [{"type": "image_url", "image_url": url}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


# Methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/", "/livez", "/readyz", "/info", "/docs", "/openapi.json", "/examples", "/v1/models",
     "/examples/scene-1.png", "/static-offline-docs/swagger-ui.css", "/nothing", "/v1/nothing"],
)  # fmt: skip
def test_head_is_get_without_the_body(client: Clients, path: str) -> None:
    http = client()
    get, head = http.get(path), http.head(path)
    assert head.content == b"" and get.content
    assert head.status_code == get.status_code
    assert dict(head.headers) == dict(get.headers)


def test_head_needs_a_token_where_get_does(
    client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_RAY_TOKENS", "a-token-of-enough-length")
    assert client().head("/info").status_code == 401
    assert client().head("/livez").status_code == 200


def test_a_picture_may_go_to_the_root(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    http, expected = client(), captions(picture(1))[0].text
    assert http.post("/", content=picture(1)).json()[0]["generated_text"] == expected
    answer = http.post("/?num_return_sequences=2", json={"inputs": text(picture(1))})
    assert len(answer.json()) == 2


# Bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("gzip", lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:])),
        ("identity", bytes),
        ("", bytes),
    ],
)
def test_a_compressed_body_is_what_it_holds(
    client: Clients, picture: Pictures, captions: Captions, encoding: str, pack: Any
) -> None:
    http, expected = client(), captions(picture(1))[0].text
    headers = {"Content-Encoding": encoding}
    answer = http.post("/caption", content=pack(picture(1)), headers=headers)
    assert answer.json()[0]["generated_text"] == expected
    body = json.dumps({"inputs": text(picture(1))}).encode()
    answer = http.post("/caption", content=pack(body), headers=headers)
    assert answer.json()[0]["generated_text"] == expected
    answer = http.post("/v1/chat/completions", content=pack(chat(picture(1))), headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("encoding", "body", "status", "piece"),
    [
        ("br", b"x", 415, "Content-Encoding is 'br': send gzip, deflate or none"),
        ("gzip, gzip", b"x", 415, "Content-Encoding is 'gzip, gzip'"),
        ("x" * 5000, b"x", 415, "send gzip, deflate or none"),
        ("gzip", b"no gzip", 400, "the body is no gzip, as its Content-Encoding says"),
        ("gzip", gzip.compress(b"a" * 1000, mtime=0)[:-9], 400, "it breaks off"),
        ("gzip", gzip.compress(b"a", mtime=0) + b"rest", 400, "the body is no gzip"),
        ("deflate", gzip.compress(b"a", mtime=0), 400, "the body is no deflate"),
        ("gzip", gzip.compress(b"", mtime=0), 400, "the body is empty"),
        ("gzip", gzip.compress(bytes(MAX_BODY_BYTES + 1), mtime=0), 413, "more than"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(
    client: Clients, refused: Refused, encoding: str, body: bytes, status: int, piece: str
) -> None:
    answer = client().post("/caption", content=body, headers={"Content-Encoding": encoding})
    refused(answer, status, piece)
    assert (answer.headers.get("accept-encoding") == "gzip, deflate") == (status == 415)


def test_a_bomb_takes_no_more_memory_than_the_largest_body(client: Clients) -> None:
    bomb = gzip.compress(bytes(300_000_000))  # 300 kB
    http = client(max_body_bytes=1_000_000)
    tracemalloc.start()
    answer = http.post("/caption", content=bomb, headers={"Content-Encoding": "gzip"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code == 413
    assert peak < 10_000_000


@pytest.mark.parametrize("path", ["/caption", "/v1/chat/completions"])
def test_a_mark_before_json_is_no_part_of_it(client: Clients, picture: Pictures, path: str) -> None:
    body = chat(picture(1)) if "chat" in path else json.dumps({"inputs": text(picture(1))}).encode()
    for declared in ("application/json", "text/plain", "application/octet-stream"):
        headers = {"Content-Type": declared}
        answer = client().post(path, content=codecs.BOM_UTF8 + body, headers=headers)
        assert answer.json() == client().post(path, content=body, headers=headers).json() or (
            "chat" in path and answer.status_code == 200
        )


# Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "is_text"),
    [
        ("text/plain", True),
        ("text/plain, */*;q=0.5", True),
        ("application/json;q=0.1, text/*", True),
        ("TEXT/PLAIN; charset=utf-8", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/plain, */*", False),  # axios
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("text/plain;q=0.4, application/json;q=0.5", False),
        ("text/plain;q=0", False),
        ("text/plain;q=x", False),
        (",;,", False),
    ],
)
def test_captions_come_as_text_where_that_is_wanted_more_than_json(
    client: Clients, picture: Pictures, captions: Captions, accept: str, is_text: bool
) -> None:
    found = captions(picture(1), 2)
    answer = client().post(
        "/caption?num_return_sequences=2", content=picture(1), headers={"Accept": accept}
    )
    if is_text:
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.text == "".join(f"{caption.text}\n" for caption in found)
        assert answer.headers["x-checkpoint"]
    else:
        assert [one["generated_text"] for one in answer.json()] == [c.text for c in found]


@pytest.mark.parametrize(
    ("query", "agent", "is_object"),
    [
        ("", "@huggingface/inference/4.13.0 Node.js/22", True),
        ("?num_beams=2", "@huggingface/inference/2.8.0", True),
        ("?format=list", "@huggingface/inference/4.13.0", False),
        ("?format=object", "curl/8", True),
        ("", "curl/8", False),
        ("", "python-huggingface_hub", False),
    ],
)
def test_javascripts_client_gets_an_object(
    client: Clients, picture: Pictures, query: str, agent: str, is_object: bool
) -> None:
    headers = {"User-Agent": agent}
    raw = client().post(f"/caption{query}", content=picture(1), headers=headers).json()
    assert isinstance(raw, dict) is is_object
    body = {"inputs": text(picture(1))}
    assert client().post(f"/caption{query}", json=body, headers=headers).json() == raw


def test_a_listed_origin_may_send_the_headers_it_wants(client: Clients) -> None:
    http = client(cors_origins=("https://a.org",))
    wanted = "authorization, content-type, traceparent, x-stainless-lang, x-stainless-retry-count"

    def preflight(origin: str, method: str = "POST") -> Any:
        headers = {"Origin": origin, "Access-Control-Request-Method": method,
                   "Access-Control-Request-Headers": wanted}  # fmt: skip
        return http.options("/v1/chat/completions", headers=headers)

    allowed = preflight("https://a.org")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.org"
    assert allowed.headers["access-control-allow-headers"] == wanted
    assert preflight("https://a.org", "HEAD").status_code == 200
    other = preflight("https://b.org")
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    assert preflight("https://a.org", "DELETE").status_code == 400
    answer = http.get("/livez", headers={"Origin": "https://a.org"})
    assert "X-Checkpoint" in answer.headers["access-control-expose-headers"]
