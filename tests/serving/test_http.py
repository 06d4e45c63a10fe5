"""The HTTP application around both APIs: probes, tokens, limits, faults, documentation, page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html.parser
import io
import json
import logging
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from caption_ray.serving import auth
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.contract import NextWords, UnavailableError

README = Path(__file__).resolve().parents[2] / "README.md"

Pictures = Callable[..., bytes]
Clients = Callable[..., TestClient]
Refused = Callable[..., None]
Receive = Callable[[], Awaitable[dict[str, Any]]]

TOKEN, OTHER = "a-token-of-enough-length", "another-token-of-enough-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PATHS = ("/caption", "/v1/chat/completions")


def body_of(path: str, data: bytes) -> bytes:
    """The body of a request to `path` for a caption of `data`."""
    if path == "/caption":
        return data
    url = {"url": f"data:;base64,{base64.b64encode(data).decode()}"}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    return json.dumps({"model": "caption_ray", "messages": messages}).encode()


class Exchange:
    """A request straight to the ASGI application, whose body arrives as `receive` says."""

    def __init__(self, http: TestClient, path: str, receive: Receive, **headers: str) -> None:
        self.http, self.path, self.receive, self.request_headers = http, path, receive, headers
        self.status_code: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.request = http.build_request("POST", path)

    async def __call__(self) -> Exchange:
        headers = [
            (name.replace("_", "-").lower().encode(), value.encode())
            for name, value in {"X_Request_ID": "request-7", **self.request_headers}.items()
        ]
        scope = {"type": "http", "method": "POST", "path": self.path, "root_path": "",
                 "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
                 "server": ("testserver", 80), "client": ("testclient", 1)}  # fmt: skip
        await self.http.app(scope, self.receive, self._send)
        return self

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status_code = message["status"]
            self.headers = {k.decode().title(): v.decode() for k, v in message["headers"]}
        self.body += message.get("body", b"")

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def arriving(*pieces: bytes, then: str = "end", pause_s: float = 0.0) -> Receive:
    """A body in pieces, which then ends, hangs, or is cut off as the client disconnects."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        if left:
            more = len(left) > 1 or then != "end"
            return {"type": "http.request", "body": left.pop(0), "more_body": more}
        if then == "hang":
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    return receive


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of Ray Serve's logger, which does not propagate."""
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("ray.serve").removeHandler(caplog.handler)


# Probes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["ready", "asleep"])
def test_ready_says_so(client: Clients, backend: Any, status: Any) -> None:
    backend.ready = status
    answer = client().get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": status})


def test_while_it_starts_it_lives_and_is_not_ready(
    client: Clients, backend: Any, refused: Refused
) -> None:
    backend.ready = "starting"
    answer = client().get("/readyz")
    refused(answer, 503, "no captioner is ready")
    assert answer.headers["Retry-After"] == "1"
    assert client().get("/livez").json() == {"status": "alive"}


def test_info_tells_the_model_and_the_limits_that_hold(client: Clients, predictor: Any) -> None:
    answer = client(max_body_bytes=1234, request_timeout_s=7).get("/info").json()
    assert answer["checkpoint"]["uri"] == predictor.uri
    assert answer["model"]["vocabulary"] == len(predictor.vocabulary)
    assert answer["limits"] == {
        "max_body_bytes": 1234,
        "max_pixels": 64_000_000,
        "max_pixels_of": {"WEBP": 36_000_000, "AVIF": 49_000_000},
        "max_decoding_bytes": 10**9,
        "formats": ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF"],
        "max_pictures": 16,
        "max_beams": 10,
        "max_return_sequences": 10,
        "max_new_tokens": 50,
        "request_timeout_s": 7,
    }


# Tokens ---------------------------------------------------------------------------------------


OPEN = ("/livez", "/readyz", "/", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css")
CLOSED = [
    ("POST", "/caption"), ("POST", "/caption/"), ("GET", "/caption"), ("GET", "/info"),
    ("POST", "/"), ("PUT", "/livez"), ("POST", "/docs"),
    ("GET", "/examples"), ("GET", "/examples/scene-1.png"), ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"), ("GET", "/v1/models/caption_ray"), ("GET", "/nothing"),
    ("GET", "/livez/"), ("GET", "/livez/../info"), ("GET", "/livez//info"), ("GET", "/INFO"),
]  # fmt: skip


@pytest.fixture(params=["environment", "file"])
def token(request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Settings with which TOKEN is required."""
    if request.param == "environment":
        monkeypatch.setenv(auth.TOKENS_VARIABLE, f"{OTHER},{TOKEN}")
        return {}
    (tmp_path / "tokens").write_text(f"{OTHER}\n{TOKEN}\n")
    return {"tokens_file": str(tmp_path / "tokens")}


def test_without_tokens_everybody_is_served_and_the_log_warns(
    client: Clients, picture: Pictures, log: pytest.LogCaptureFixture
) -> None:
    assert client().post("/caption", content=picture(1)).status_code == 200
    assert "anyone who can connect is served" in log.text


def test_with_a_token_all_is_served(
    client: Clients, picture: Pictures, token: dict[str, Any]
) -> None:
    http = client(**token)
    assert http.post("/caption", content=picture(1), headers=BEARER).status_code == 200
    assert http.get("/info", headers=BEARER).status_code == 200
    assert http.get("/examples/scene-1.png", headers=BEARER).status_code == 200


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": TOKEN}])
def test_without_one_nothing_is_served_that_costs_or_tells(
    client: Clients, backend: Any, refused: Refused, token: dict[str, Any], given: dict[str, str]
) -> None:
    http = client(**token)
    for method, path in CLOSED:
        answer = http.request(method, path, headers=given)
        refused(answer, 401, "Authorization: Bearer")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert backend.calls == []
    assert http.get("/caption?token=" + TOKEN).status_code == 401


def test_probes_and_what_says_how_to_ask_need_none(client: Clients, token: dict[str, Any]) -> None:
    http = client(**token)
    assert {path: http.get(path).status_code for path in OPEN} == dict.fromkeys(OPEN, 200)


@pytest.mark.parametrize("path", PATHS)
def test_the_body_is_not_read_before_the_token_is_checked(
    client: Clients, refused: Refused, token: dict[str, Any], path: str
) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is read")

    answer = asyncio.run(Exchange(client(**token), path, receive)())
    refused(answer, 401)


def test_a_bad_token_file_stops_the_start(client: Clients, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens_file is .*No such file"):
        client(tokens_file=str(tmp_path / "none"))


# Other origins --------------------------------------------------------------------------------


ORIGIN = "https://example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "Authorization, Content-Type",
}


def test_other_origins_may_not_call_by_default(client: Clients, picture: Pictures) -> None:
    http = client()
    for answer in (
        http.post("/caption", content=picture(1), headers={"Origin": ORIGIN}),
        http.options("/caption", headers=PREFLIGHT),
    ):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert http.options("/caption", headers=PREFLIGHT).status_code == 405


def test_listed_origins_may_call_and_no_others(
    client: Clients, picture: Pictures, token: dict[str, Any]
) -> None:
    http = client(cors_origins=(ORIGIN,), **token)
    allowed = http.options("/caption", headers=PREFLIGHT)  # browsers send no token with a preflight
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Authorization" in allowed.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    for headers in (BEARER, {}):  # the page must be able to read errors, too
        answer = http.post("/caption", content=b"", headers={"Origin": ORIGIN, **headers})
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
    for other in ("https://example.com", "http://example.org", f"{ORIGIN}.evil.com", "null"):
        refused = http.options("/caption", headers={**PREFLIGHT, "Origin": other})
        assert refused.status_code == 400
        answer = http.post("/caption", content=b"", headers={"Origin": other})
        for each in (refused, answer):
            assert "Access-Control-Allow-Origin" not in each.headers


# Bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_comes_too_slowly_is_refused(
    client: Clients, picture: Pictures, refused: Refused, path: str
) -> None:
    http = client(body_timeout_s=0.1)
    data = body_of(path, picture(1))
    drops = [data[start : start + 20] for start in range(0, len(data), 20)]
    for receive in (arriving(data, then="hang"), arriving(*drops, pause_s=0.02)):
        answer = asyncio.run(Exchange(http, path, receive)())
        refused(answer, 408, "the body was not complete after 0.1 s")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_comes_in_pieces_in_time_is_captioned(
    client: Clients, picture: Pictures, path: str
) -> None:
    data = body_of(path, picture(1))
    pieces = [data[start : start + 100] for start in range(0, len(data), 100)]
    answer = asyncio.run(Exchange(client(), path, arriving(*pieces, b""))())
    assert answer.status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_no_more_is_read_of_a_body_that_is_too_large(
    client: Clients, refused: Refused, path: str
) -> None:
    read = 0

    async def endless() -> dict[str, Any]:
        nonlocal read
        read += 1000
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    http = client(max_body_bytes=50_000)
    refused(asyncio.run(Exchange(http, path, endless)()), 413, "more than 50000 bytes")
    assert read == 51_000
    read = 0
    answer = asyncio.run(Exchange(http, path, endless, Content_Length="50001")())
    refused(answer, 413, "more than 50000 bytes")
    assert read == 0, "its announced size says enough"


def test_a_client_that_goes_before_its_body_is_complete_gets_no_answer_and_leaves_no_stack(
    client: Clients, picture: Pictures, backend: Any, log: pytest.LogCaptureFixture
) -> None:
    http = client()
    http.get("/livez")  # drops the warning that there are no tokens
    log.clear()
    for path in PATHS:
        data = body_of(path, picture(1))
        answer = asyncio.run(Exchange(http, path, arriving(data[:200], then="go"))())
        assert (answer.status_code, answer.body) == (None, b"")
    assert backend.calls == [] and log.text == ""


@pytest.mark.parametrize("path", PATHS)
def test_more_bytes_than_may_be_buffered_are_refused_until_others_are_let_go(
    client: Clients, picture: Pictures, refused: Refused, path: str
) -> None:
    """Three stalled bodies fill the buffer; once they time out, all of it is free again."""
    http = client(max_body_bytes=50_000, max_buffered_bytes=90_000, body_timeout_s=0.5)

    async def scenario() -> list[Exchange]:
        hanging = [Exchange(http, path, arriving(bytes(29_000), then="hang")) for _ in range(3)]
        tasks = [asyncio.create_task(exchange()) for exchange in hanging]
        await asyncio.sleep(0.1)
        squeezed = await Exchange(http, path, arriving(bytes(4_000)))()
        small = await Exchange(http, path, arriving(body_of(path, picture(1))))()
        await asyncio.gather(*tasks)
        after = await Exchange(http, path, arriving(body_of(path, picture(1)), b""))()
        return [squeezed, small, *hanging, after]

    squeezed, small, *hanging, after = asyncio.run(scenario())
    refused(squeezed, 429, "too many bodies are being received")
    assert squeezed.headers["Retry-After"] == "1"
    assert small.status_code == 200, "there was room for this one"
    for exchange in hanging:
        refused(exchange, 408)
    assert after.status_code == 200


ENDINGS: dict[str, Callable[[bytes], Receive]] = {
    "captioned": lambda data: arriving(data),
    "no-picture": lambda data: arriving(bytes(40_000)),
    "too-large": lambda data: arriving(bytes(30_000), bytes(30_000), b""),
    "too-slow": lambda data: arriving(bytes(40_000), then="hang"),
    "client-gone": lambda data: arriving(bytes(40_000), then="go"),
    "broken": lambda data: arriving(b"{" + bytes(40_000)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_request_ends_its_bytes_are_let_go(
    client: Clients, picture: Pictures, path: str, ending: str
) -> None:
    """The buffer has room for one body only, so a body that stayed counted would block the next."""
    http = client(max_body_bytes=50_000, max_buffered_bytes=50_000, body_timeout_s=0.05)
    data = body_of(path, picture(1))
    for _ in range(3):
        answer = asyncio.run(Exchange(http, path, ENDINGS[ending](data))())
        assert answer.status_code != 429
    full = data + b" " * (50_000 - len(data)) if path != "/caption" else data + bytes(48_000)
    assert asyncio.run(Exchange(http, path, arriving(full))()).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_the_bytes_of_a_picture_that_is_being_captioned_count(
    client: Clients, picture: Pictures, backend: Any, refused: Refused, path: str
) -> None:
    backend.delay_s = 0.3
    http = client(max_body_bytes=4000, max_buffered_bytes=4000)
    data = body_of(path, picture(1))
    assert 2 * len(data) > 4000 - 1000

    async def scenario() -> tuple[Exchange, Exchange]:
        first = asyncio.create_task(Exchange(http, path, arriving(data))())
        await asyncio.sleep(0.1)
        second = await Exchange(http, path, arriving(bytes(3500)))()
        return await first, second

    first, second = asyncio.run(scenario())
    assert first.status_code == 200
    refused(second, 429)


# Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_captioner_that_takes_too_long_is_a_504(
    client: Clients, picture: Pictures, backend: Any, refused: Refused, path: str
) -> None:
    backend.delay_s = 60
    answer = client(request_timeout_s=0.05).post(path, content=body_of(path, picture(1)))
    refused(answer, 504, "no caption after 0.05 s; try again")


@pytest.mark.parametrize("path", PATHS)
def test_a_time_out_behind_the_backend_is_a_504(
    client: Clients, picture: Pictures, backend: Any, refused: Refused, path: str
) -> None:
    backend.raises = asyncio.TimeoutError()
    refused(client().post(path, content=body_of(path, picture(1))), 504, "no caption after 5 s")


@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_is_a_429_that_says_when_to_come_again(
    client: Clients, picture: Pictures, backend: Any, refused: Refused, path: str
) -> None:
    backend.raises = QueueFullError(17)
    answer = client().post(path, content=body_of(path, picture(1)))
    refused(answer, 429, "try again in 17 s")
    assert answer.headers["Retry-After"] == "17"


@pytest.mark.parametrize("path", PATHS)
def test_no_captioner_is_a_503_that_tells_nothing_of_it(
    client: Clients, picture: Pictures, backend: Any, refused: Refused, path: str
) -> None:
    backend.raises = UnavailableError("actor 10.0.0.3 died")
    answer = client().post(path, content=body_of(path, picture(1)))
    refused(answer, 503, "no captioner can be reached; try again")
    assert answer.headers["Retry-After"] == "1" and "10.0.0.3" not in answer.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, OSError, AssertionError])
def test_what_nobody_foresaw_is_a_500_with_the_id_and_the_stack_in_the_log_alone(
    client: Clients,
    picture: Pictures,
    backend: Any,
    refused: Refused,
    log: pytest.LogCaptureFixture,
    path: str,
    error: type[Exception],
) -> None:
    backend.raises = error("a secret")
    headers = {"X-Request-ID": "mine"}
    answer = client().post(path, content=body_of(path, picture(1)), headers=headers)
    refused(answer, 500, "internal error in request mine")
    assert "secret" not in answer.text
    (record,) = [record for record in log.records if record.levelname == "ERROR"]
    assert "Request mine failed" in record.getMessage()
    assert record.exc_info is not None and record.exc_info[1] is backend.raises
    backend.raises = None
    assert client().post(path, content=body_of(path, picture(1))).status_code == 200


def test_one_picture_that_fails_ends_the_others_of_the_request(
    client: Clients, picture: Pictures, backend: Any, refused: Refused
) -> None:
    ended = []
    good = base64.b64encode(picture(1)).decode()
    caption = backend.caption

    async def noting(data: bytes, options: Any) -> Any:
        try:
            return await caption(data, options)
        except asyncio.CancelledError:
            ended.append(data)
            raise

    async def scenario() -> Exchange:
        body = json.dumps({"inputs": [good, "aGVsbG8=", good]}).encode()
        answer = await Exchange(client(), "/caption", arriving(body))()
        await asyncio.sleep(0.05)  # keep the loop running: its end would cancel everything
        assert ended == [picture(1)] * 2
        return answer

    backend.caption, backend.delay_s = noting, 60
    refused(asyncio.run(scenario()), 415, "inputs.1")


def test_a_client_that_goes_while_it_is_streamed_to_ends_the_captioning(
    client: Clients, picture: Pictures, backend: Any
) -> None:
    ended = asyncio.Event()

    async def stream(data: bytes, options: Any) -> AsyncIterator[NextWords]:
        try:
            while True:
                yield NextWords(["word"], " word")
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    async def scenario() -> Exchange:
        gone = asyncio.Event()
        text = base64.b64encode(picture(1)).decode()
        body = arriving(json.dumps({"inputs": text, "parameters": {"stream": True}}).encode())

        async def receive() -> dict[str, Any]:
            message = await body()
            if message["type"] == "http.disconnect":
                await gone.wait()
            return message

        exchange = Exchange(client(), "/caption", receive)
        task = asyncio.create_task(exchange())
        await asyncio.sleep(0.2)
        gone.set()
        await asyncio.wait_for(task, 5)
        await asyncio.wait_for(ended.wait(), 5)
        return exchange

    backend.stream = stream
    exchange = asyncio.run(scenario())
    assert exchange.body.count(b"event: words") > 1


# Route prefix ---------------------------------------------------------------------------------


def test_everything_works_below_a_route_prefix(
    client: Clients,
    picture: Pictures,
    backend: Any,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(auth.TOKENS_VARIABLE, TOKEN)
    http = TestClient(client().app, root_path="/captions", raise_server_exceptions=False)
    for path in OPEN:
        assert http.get(f"/captions{path}").status_code == 200, path
    for method, path in CLOSED:
        refused(http.request(method, f"/captions{path}"), 401)
    http.headers.update(BEARER)
    for path in PATHS:
        answer = http.post(f"/captions{path}", content=body_of(path, picture(1)))
        assert answer.status_code == 200
        refused(http.post(f"/captions{path}", content=b""), 400)
    for link in Links(http.get("/captions/docs").text).addresses:
        assert http.get(urljoin("/captions/docs", link)).status_code == 200, link


# Documentation --------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Collects a page's URLs, the texts of `<script>` and `<style>`, and inline code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.inline: list[str] = []
        self._within: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag in self.texts and "src" not in given:
            self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[self._within].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._within = None


def test_the_documentation_needs_nothing_from_elsewhere(client: Clients) -> None:
    http = client()
    page = http.get("/docs")
    assert page.status_code == 200
    links = Links(page.text).addresses
    assert len(links) >= 3
    for link in links:
        # relative, for proxies that strip a prefix which this server never sees
        assert re.match(r"static-offline-docs/", link), link
        assert http.get(urljoin("/docs", link)).status_code == 200, link
    described = re.findall(r"url: '([^']*)'", page.text)
    assert described == ["openapi.json"]
    (server,) = http.get("/openapi.json").json()["servers"]
    assert urljoin("https://a.org/prefix/openapi.json", server["url"]) == "https://a.org/prefix/"


def test_every_reference_in_openapi_leads_somewhere(client: Clients) -> None:
    described = client().get("/openapi.json").json()
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(described)))
    assert len(references) > 10
    for reference in references:
        found = described
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert isinstance(found, dict)


def test_openapi_tells_every_form_of_body_and_every_answer(client: Clients) -> None:
    described = client().get("/openapi.json").json()
    caption = described["paths"]["/caption"]["post"]
    assert set(caption["requestBody"]["content"]) == {
        "image/*", "application/json", "multipart/form-data",
    }  # fmt: skip
    everywhere = {"200", "400", "401", "408", "413", "429", "500", "503", "504"}
    for path, more in zip(PATHS, ({"415", "422"}, set()), strict=True):
        assert set(described["paths"][path]["post"]["responses"]) >= everywhere | more
    assert "HTTPValidationError" not in json.dumps(described), "which nobody is ever sent"


def test_openapi_says_whether_a_token_is_needed(
    client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "security" not in client().get("/openapi.json").json()
    monkeypatch.setenv(auth.TOKENS_VARIABLE, TOKEN)
    described = client().get("/openapi.json").json()
    (name,) = described["security"][0]
    assert described["components"]["securitySchemes"][name]["scheme"] == "bearer"


# The page -------------------------------------------------------------------------------------


def test_only_the_pages_own_code_runs_and_it_talks_to_this_server_only(client: Clients) -> None:
    answer = client().get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
    )
    page = Links(answer.text)
    for tag in ("script", "style"):
        assert page.texts[tag]
        hashes = [hashlib.sha256(text.encode()).digest() for text in page.texts[tag]]
        allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes]
        assert policy[f"{tag}-src"].split() == allowed
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert page.inline == [], "which no hash allows"
    assert not [link for link in page.addresses if re.match(r"//|https?:", link)]
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_scenes_are_drawn_if_no_examples_are_given(client: Clients) -> None:
    http = client()
    examples = http.get("/examples").json()["examples"]
    assert [example["name"] for example in examples] == [f"scene-{n}.png" for n in range(1, 5)]
    pictures = set()
    for example in examples:
        answer = http.get(f"/{example['url']}")
        assert answer.headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).format == "PNG"
        assert http.post("/caption", content=answer.content).status_code == 200
        pictures.add(answer.content)
    assert len(pictures) == 4
    assert pictures == {http.get(f"/{example['url']}").content for example in examples}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_command_of_the_readme_works_as_printed(client: Clients) -> None:
    (command,) = re.findall(r"^curl .*/caption$", README.read_text(), re.MULTILINE)
    server = uvicorn.Server(uvicorn.Config(client().app, lifespan="off", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        port = str(listener.getsockname()[1])
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        assert here.count(port) == 2
        try:
            answer = subprocess.run(here, shell=True, capture_output=True, text=True, timeout=60)
        finally:
            server.should_exit = True
            thread.join()
    assert answer.returncode == 0
    (caption,) = json.loads(answer.stdout)
    assert set(caption) == {"generated_text", "log_prob"}


def test_the_first_pictures_of_a_folder_are_examples(
    client: Clients, picture: Pictures, tmp_path: Path
) -> None:
    names = ["a #1?.jpg", "b 100%.png", "c.jpg", "d.webp", "e.jpg"]
    for seed, name in enumerate(names):
        kind = {"png": "PNG", "webp": "WEBP"}.get(name.rsplit(".")[-1], "JPEG")
        (tmp_path / name).write_bytes(picture(seed, kind))
    http = client(examples=str(tmp_path))
    examples = http.get("/examples").json()["examples"]
    assert [example["name"] for example in examples] == names[:4]
    answers = [http.get(f"/{example['url']}") for example in examples]
    assert [answer.content for answer in answers] == [
        (tmp_path / name).read_bytes() for name in names[:4]
    ]
    assert [answer.headers["Content-Type"] for answer in answers] == [
        "image/jpeg", "image/png", "image/jpeg", "image/webp",
    ]  # fmt: skip


def test_a_folder_without_pictures_stops_the_start(client: Clients, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"examples is '{folder}': there are no files"):
            client(examples=str(folder))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="notes.txt is not a picture: .*accepted format"):
        client(examples=str(tmp_path))


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("a" * 60_000, "a" * 128),
        ("\x1b[31mRED\x1b[0m é INFO fake", "?[31mRED?[0m????INFO?fake"),
        ("mine", "mine"),
    ],
)
def test_a_request_id_is_cut_and_forges_no_line(
    client: Clients,
    picture: Pictures,
    backend: Any,
    log: pytest.LogCaptureFixture,
    sent: str,
    told: str,
) -> None:
    backend.raises = RuntimeError("unforeseen")
    headers = {"X-Request-ID": sent.encode()}
    answer = client().post("/caption", content=picture(1), headers=headers)
    assert answer.json()["error"] == f"internal error in request {told}"
    (record,) = [record for record in log.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"Request {told} failed"
