"""Fixtures of the endpoint's tests, fast and slow: tiny checkpoints and pictures, the HTTP
application without Ray, and clients that put load on a real one.

The conftest.py of both folders imports them."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from starlette.testclient import TestClient
from vocabularies import vocabulary_of

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.predictor import Caption, Predictor, prepare_with_box
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.data.ledger import Ledger
from caption_ray.model.captioner import build_captioner
from caption_ray.serving.contract import Answer, NextWords, Options, Status
from caption_ray.serving.http import build_http
from caption_ray.serving.replica import describe
from caption_ray.serving.service import Settings

MAX_BODY_BYTES = 100_000


def _save_run(
    run: Path, *, step: int = 1, seed: int = 0, image_size: int = 32, width: int = 16,
    fill: float | None = None,
) -> str:  # fmt: skip
    """Save a checkpoint of a captioner with random weights (or all `fill`); returns its URI.

    The weights are large enough for captions that depend on the picture.
    """
    torch.manual_seed(seed)
    encoder = EncoderConfig(
        name="small", weights="none", trainable_from="all", image_size=image_size, grid=None
    )
    decoder = DecoderConfig(embedding_dim=width, hidden_dim=width, attention_dim=width)
    model = ModelConfig(encoder, decoder)
    vocabulary = vocabulary_of(["a red circle is above the blue square"], 1, None)
    captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(1.9) if fill is None else parameter.fill_(fill)
    state = checkpoint.State(
        step=step, epoch=0, epoch_step=0, metrics={"val/loss": 2.5}, tracker_id=None
    )
    scratch = run.parent / f"{run.name}-scratch-{step}"
    checkpoint.save(
        scratch, captioner, vocabulary, model, SearchConfig(beam_size=2, max_length=6), state,
        optimizer={}, ledger=Ledger([1]),
    )  # fmt: skip
    return run_folder.commit(scratch, str(run), state, keep=5, is_best=True)


@pytest.fixture(scope="session")
def save_run() -> Callable[..., str]:
    return _save_run


def _picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 60)) -> bytes:
    """A random picture, size (height, width), whose brightness depends on the seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (*size, 3)) + 20 * (seed % 8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return _picture


@pytest.fixture(scope="session")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    uri = _save_run(tmp_path_factory.mktemp("runs") / "first")
    return Predictor.from_uri(uri, torch.device("cpu"))


@pytest.fixture(scope="session")
def captions(predictor: Predictor) -> Callable[..., list[Caption]]:
    """The predictor's own captions of a picture: `captions(data, num_return, seed, **search)`."""

    def of(data: bytes, num_return: int = 1, seed: int = 0, **search: Any) -> list[Caption]:
        changed = dataclasses.replace(predictor.search, **search)
        return predictor.predict(predictor.prepare(data)[None], changed, num_return, [seed])[0]

    return of


class LocalBackend:
    """A `Backend` in this process that captions one picture at a time, and fails on request."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.ready: Status = "ready"
        self.raises: Exception | None = None
        self.raises_late: Exception | None = None
        """Raised after all words have been streamed."""
        self.delay_s = 0.0
        self.calls: list[Options] = []

    async def caption(self, picture: bytes, options: Options) -> Answer:
        parts = [part async for part in self.stream(picture, options)]
        assert isinstance(parts[-1], Answer)
        return parts[-1]

    async def stream(self, picture: bytes, options: Options) -> AsyncIterator[NextWords | Answer]:
        self.calls.append(options)
        image, box = prepare_with_box(picture, self.predictor.encoder_config)
        await asyncio.sleep(self.delay_s)
        if self.raises is not None:
            raise self.raises
        words: list[NextWords] = []
        tokenizer = self.predictor.vocabulary.tokenizer

        def tell(_: int, new: list[str]) -> None:
            before = tokenizer.separator if words else ""
            words.append(NextWords(new, before + tokenizer.join(new)))

        found = self.predictor.predict(
            image[None],
            options.search(self.predictor.search),
            options.num_return,
            [options.seed],
            tell,
        )
        for new in words:
            yield new
        if self.raises_late is not None:
            raise self.raises_late
        rows, columns = self.predictor.captioner.encoder.grid
        yield Answer(found[0], self.predictor.uri, 1, box, rows * columns)

    async def status(self) -> Status:
        return self.ready

    async def info(self) -> dict[str, Any]:
        return describe(self.predictor, refused=None)


@pytest.fixture
def backend(predictor: Predictor) -> LocalBackend:
    return LocalBackend(predictor)


@pytest.fixture
def client(backend: LocalBackend) -> Callable[..., TestClient]:
    """The HTTP application on `backend`; given settings replace the defaults.

    Exceptions become error answers, as on a real server.
    """

    def build(**changed: Any) -> TestClient:
        defaults: dict[str, Any] = {
            "max_body_bytes": MAX_BODY_BYTES,
            "max_buffered_bytes": 10 * MAX_BODY_BYTES,
            "max_decoding_bytes": 10**9,
            "body_timeout_s": 5.0,
            "request_timeout_s": 5.0,
            "tokens_file": None,
            "cors_origins": (),
            "url_allow_list": (),
            "model_name": "caption_ray",
            "examples": None,
        }
        app = build_http(backend, Settings(**{**defaults, **changed}))
        return TestClient(app, raise_server_exceptions=False, headers={"X-Request-ID": "request-7"})

    return build


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """Asserts that an answer is an error: its status, its form, and a part of its message.

    Hugging Face's clients get two strings, OpenAI's (`/v1`) an object; neither a stack trace.
    """

    def check(answer: Any, status: int, piece: str = "") -> None:
        assert (answer.status_code, answer.headers["Content-Type"]) == (
            status,
            "application/json",
        ), answer.text[:500]
        content = answer.json()
        if "/v1/" in str(answer.request.url):
            assert list(content) == ["error"]
            content = content["error"]
            assert set(content) == {"message", "type", "param", "code"}
            message = content.pop("message")
            assert content.pop("param") is None or status in (400, 404, 413)
        else:
            assert set(content) == {"error", "error_type"}
            message = content.pop("error")
        assert all(isinstance(value, str) and value for value in [message, *content.values()])
        assert piece in message
        assert "Traceback" not in message and 'File "' not in message

    return check


class Answered(NamedTuple):
    start: float
    seconds: float
    status: int
    """HTTP status; 0 if the connection broke."""
    text: str
    checkpoint: str | None


class Load:
    """Concurrent clients, each of which sends one request after the other and never retries."""

    def __init__(self, url: str, picture: bytes, clients: int) -> None:
        self.url, self.picture = url, picture
        self.answers: list[Answered] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        session = requests.Session()
        session.headers["X-Request-Timeout-Seconds"] = "600"  # as Ray would allow it
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                answer = session.post(f"{self.url}/caption", data=self.picture, timeout=60)
                status, text = answer.status_code, answer.text
                checkpoint = answer.headers.get("X-Checkpoint")
            except requests.RequestException as error:
                status, text, checkpoint = 0, repr(error), None
            seconds = time.monotonic() - start
            self.answers.append(Answered(start, seconds, status, text, checkpoint))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(1)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)

    def p99_ms(self) -> float:
        return 1000 * statistics.quantiles([a.seconds for a in self.answers], n=100)[98]

    def report(self, fault: str) -> None:
        """Print a summary, which `pytest -rA` shows, as does a failing test."""
        seconds = self.answers[-1].start - self.answers[0].start
        failed = {s: n for s, n in self.statuses.items() if s != 200}
        print(f"{fault}: {len(self.answers)} requests in {seconds:.1f} s, failed {failed or 0}, "
              f"p99 {self.p99_ms():.0f} ms")  # fmt: skip
        for answer in self.answers:
            if answer.status != 200:
                print(f"  {answer.status} after {answer.seconds:.1f} s: {answer.text[:300]}")


@pytest.fixture(scope="session")
def load_on() -> type[Load]:
    """Load on an endpoint: `with load_on(url, picture, clients) as load: ...`."""
    return Load
