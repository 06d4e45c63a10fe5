"""Tiny checkpoints and pictures, and the HTTP application without Ray."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.serving.backend import Answer, Options, Status
from caption_ray.serving.captioner import describe
from caption_ray.serving.http import build_http
from caption_ray.serving.predictor import Predictor, prepare_with_box
from caption_ray.serving.service import Settings
from caption_ray.training import checkpoint

MAX_BODY_BYTES = 100_000


def _save_run(
    run: Path, *, step: int = 1, seed: int = 0, image_size: int = 32, width: int = 16,
    fill: float | None = None,
) -> str:  # fmt: skip
    """A checkpoint of a captioner with random weights (or all `fill`); returns its URI.

    The weights are large enough for captions that depend on the picture.
    """
    torch.manual_seed(seed)
    encoder = EncoderConfig(
        name="small", weights="none", trainable_from="all", image_size=image_size, grid=None
    )
    decoder = DecoderConfig(embedding_dim=width, hidden_dim=width, attention_dim=width)
    model = ModelConfig(encoder, decoder)
    vocabulary = Vocabulary.build(["a red circle is above the blue square"], 1, None)
    captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(1.9) if fill is None else parameter.fill_(fill)
    state = checkpoint.State(
        step=step, epoch=0, epoch_step=0, metrics={"val/loss": 2.5}, tracker_id=None, best_loss=None
    )
    scratch = run.parent / f"{run.name}-scratch-{step}"
    checkpoint.save(
        scratch, captioner, vocabulary, model, SearchConfig(beam_size=2, max_length=6), state,
        optimizer={}, ledger=np.zeros(1, bool),
    )  # fmt: skip
    return checkpoint.commit(scratch, str(run), state, keep=5, is_best=True)


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


class LocalBackend:
    """A `Backend` in this process: one picture after the other; misbehaves when told to."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.ready: Status = "ready"
        self.raises: Exception | None = None
        self.delay_s = 0.0
        self.calls: list[Options] = []

    async def caption(self, picture: bytes, options: Options) -> Answer:
        parts = [part async for part in self.stream(picture, options)]
        assert isinstance(parts[-1], Answer)
        return parts[-1]

    async def stream(self, picture: bytes, options: Options) -> AsyncIterator[list[str] | Answer]:
        self.calls.append(options)
        image, box = prepare_with_box(picture, self.predictor.encoder_config)
        await asyncio.sleep(self.delay_s)
        if self.raises is not None:
            raise self.raises
        words: list[list[str]] = []
        found = self.predictor.predict(
            image[None],
            options.search(self.predictor.search),
            options.num_return,
            [options.seed],
            lambda _, new: words.append(new),
        )
        for new in words:
            yield new
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
    """The HTTP application on `backend`, with settings other than the defaults if they are given.

    Errors become answers, as on a real server.
    """

    def build(**changed: Any) -> TestClient:
        defaults: dict[str, Any] = {
            "max_body_bytes": MAX_BODY_BYTES,
            "max_buffered_bytes": 10 * MAX_BODY_BYTES,
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
