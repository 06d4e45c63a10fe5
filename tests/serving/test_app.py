"""The endpoint: a real Ray Serve over a tiny checkpoint, real clients, and every refusal."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import requests
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from ray import serve

from caption_ray import cluster, storage
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.serving import app
from caption_ray.serving.predictor import Caption, Predictor
from caption_ray.training import checkpoint
from caption_ray.training.checkpoint import CheckpointError

MAX_BATCH_SIZE = 4
MAX_BODY_BYTES = 100_000
ENCODER = EncoderConfig(
    name="small", weights="none", trainable_from="all", image_size=32, grid=None
)


def save_run(run: Path, scratch: Path, width: int = 16, fill: float | None = None) -> str:
    """A checkpoint of a captioner with random weights (or all `fill`); returns its URI."""
    torch.manual_seed(0)
    decoder = DecoderConfig(embedding_dim=width, hidden_dim=width, attention_dim=width)
    model = ModelConfig(ENCODER, decoder)
    vocabulary = Vocabulary.build(["a red circle is above the blue square"], 1, None)
    captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(1.9) if fill is None else parameter.fill_(fill)
    state = checkpoint.State(
        step=1, epoch=0, epoch_step=0, metrics={}, tracker_id=None, best_loss=None
    )
    checkpoint.save(
        scratch, captioner, vocabulary, model, SearchConfig(beam_size=2, max_length=6), state,
        optimizer={}, ledger=np.zeros(1, bool),
    )  # fmt: skip
    return checkpoint.commit(scratch, str(run), state, keep=1, is_best=True)


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 60)) -> bytes:
    """A random picture whose brightness depends on the seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (*size, 3)) + 20 * (seed % 8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


# A real server --------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    url: str
    predictor: Predictor
    """Of the checkpoint that is served, in this process."""

    def post(self, body: Any, **headers: str) -> requests.Response:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.post(f"{self.url}/caption", data=body, headers=headers, timeout=30)

    def expected(self, data: bytes) -> str:
        return self.predictor.predict(self.predictor.prepare(data)[None])[0].text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started_here = not ray.is_initialized()
    folder = tmp_path_factory.mktemp("storage")
    uri = save_run(folder / "runs" / "first", folder / "scratch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if started_here:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = app.build_app(
            {
                "storage": str(folder / "runs"),
                "max_batch_size": MAX_BATCH_SIZE,
                "batch_wait_timeout_s": 0.1,  # long enough for threads to meet in a batch
                "max_body_bytes": MAX_BODY_BYTES,
            }
        )
        serve.run(application, name="captions")
        yield Server(f"http://127.0.0.1:{port}", Predictor.from_uri(uri, torch.device("cpu")))
    finally:
        serve.shutdown()
        if started_here:
            ray.shutdown()


def test_ready_once_it_runs(server: Server) -> None:
    assert requests.get(f"{server.url}/readyz", timeout=30).status_code == 200
    assert requests.get(f"{server.url}/livez", timeout=30).json() == {"status": "alive"}


def test_huggingface_client_gets_captions(server: Server, tmp_path: Path) -> None:
    client = InferenceClient(model=f"{server.url}/caption")
    data = picture(1)
    file = tmp_path / "picture.jpg"
    file.write_bytes(data)
    for image in (data, file, str(file)):
        assert client.image_to_text(image).generated_text == server.expected(data)


def test_huggingface_client_understands_refusals(server: Server) -> None:
    client = InferenceClient(model=f"{server.url}/caption")
    with pytest.raises(HfHubHTTPError, match="accepted format.*JPEG, PNG"):
        client.image_to_text(b"no picture")


@pytest.mark.parametrize(
    ("kind", "declared"),
    [
        ("JPEG", None),
        ("PNG", "image/png"),
        ("WEBP", "image/jpeg"),
        ("GIF", "text/plain"),
        ("BMP", "application/octet-stream"),
        ("TIFF", "application/x-www-form-urlencoded"),
    ],
)
def test_content_decides_not_its_declared_type(
    server: Server, kind: str, declared: str | None
) -> None:
    data = picture(2, kind)
    answer = server.post(data, **({"Content_Type": declared} if declared else {}))
    assert (answer.status_code, answer.json()) == (200, [{"generated_text": server.expected(data)}])


@pytest.mark.parametrize(
    "request_body",
    [
        {"inputs": base64.b64encode(picture(3)).decode()},
        {"inputs": base64.b64encode(picture(3)).decode(), "parameters": {}},
        {"inputs": base64.encodebytes(picture(3)).decode(), "parameters": None},  # with line breaks
    ],
    ids=["plain", "empty-parameters", "line-breaks"],
)
def test_json_with_base64_is_captioned(server: Server, request_body: dict[str, Any]) -> None:
    for headers in ({"Content_Type": "application/json"}, {}):
        answer = server.post(json.dumps(request_body), **headers)
        assert answer.json() == [{"generated_text": server.expected(picture(3))}]


def test_concurrent_pictures_share_batches_and_get_their_own_captions(server: Server) -> None:
    pictures = [picture(seed) for seed in range(8)]
    expected = [server.expected(data) for data in pictures]
    assert len(set(expected)) > 2, "else a mix-up would not show"
    with ThreadPoolExecutor(len(pictures)) as threads:
        answers = list(threads.map(server.post, pictures))
    assert [answer.json()[0]["generated_text"] for answer in answers] == expected
    sizes = [int(answer.headers["X-Batch-Size"]) for answer in answers]
    assert 1 < max(sizes) <= MAX_BATCH_SIZE
    assert server.post(pictures[0]).headers["X-Batch-Size"] == "1"


def test_bad_pictures_hurt_nobody_beside_them(server: Server) -> None:
    bodies = {seed: picture(seed) for seed in range(6)}
    bodies[1], bodies[4] = bodies[1][: len(bodies[1]) // 2], b"no picture"
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = dict(zip(bodies, threads.map(server.post, bodies.values()), strict=True))
    assert (answers.pop(1).status_code, answers.pop(4).status_code) == (422, 415)
    for seed, answer in answers.items():
        assert answer.json() == [{"generated_text": server.expected(bodies[seed])}]


def test_request_ids_are_echoed_or_made(server: Server) -> None:
    assert server.post(picture(0), X_Request_ID="mine").headers["X-Request-ID"] == "mine"
    assert server.post(b"", X_Request_ID="mine").headers["X-Request-ID"] == "mine"
    made = {server.post(b"").headers["X-Request-ID"] for _ in range(2)}
    assert len(made) == 2 and all(made)


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 1000):
        yield bytes(1000)


def claiming(width: int, height: int) -> bytes:
    """A small BMP whose header claims another size."""
    data = bytearray(picture(0, "BMP"))
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(data)


PNG = picture(0, "PNG")
REFUSED: dict[str, tuple[Any, int, str]] = {
    "announced-too-large": (bytes(MAX_BODY_BYTES + 1), 413, f"more than {MAX_BODY_BYTES} bytes"),
    "streamed-too-large": (chunks(2 * MAX_BODY_BYTES), 413, f"more than {MAX_BODY_BYTES} bytes"),
    "empty": (b"", 400, "the body is empty"),
    "text": (b"hello", 415, "JPEG, PNG, WEBP, GIF, BMP, TIFF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "accepted format"),
    "truncated-jpeg": (picture(0)[:500], 422, "the picture cannot be read"),
    "truncated-png": (PNG[: len(PNG) // 2], 422, "PNG of 60 x 40"),
    "too-many-pixels": (claiming(10_000, 10_000), 422, "10000 x 10000"),
    "broken-json": (b'{"inputs": ', 400, "the body is"),
    "nested-json": (b'{"inputs": ' + b"[" * 50_000, 400, "recursion limit"),
    "no-inputs": (b'{"parameters": {}}', 400, "inputs is {'parameters': {}}: Field required"),
    "inputs-number": (b'{"inputs": 5}', 400, "inputs is 5: Input should be a valid string"),
    "inputs-empty": (b'{"inputs": ""}', 400, "inputs is ''"),
    "inputs-no-base64": (b'{"inputs": "!!!"}', 400, "inputs is no base64"),
    "inputs-not-ascii": ('{"inputs": "ü"}'.encode(), 400, "inputs is no base64"),
    "inputs-no-picture": (b'{"inputs": "aGVsbG8="}', 415, "accepted format"),
    "unknown-field": (
        b'{"inputs": "aGVsbG8=", "input": 7}',
        400,
        "input is 7: Extra inputs are not permitted; valid: inputs, parameters",
    ),
    "unknown-parameter": (
        b'{"inputs": "aGVsbG8=", "parameters": {"max_new_tokens": 20}}',
        400,
        "parameters is {'max_new_tokens': 20}: no parameter is supported",
    ),
}


@pytest.mark.parametrize(("body", "status", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_why(server: Server, body: Any, status: int, message: str) -> None:
    answer = server.post(body)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json()) == {"error", "error_type"}
    assert all(isinstance(value, str) for value in answer.json().values())
    assert message in answer.json()["error"]
    assert answer.headers["X-Request-ID"]


def test_json_that_is_declared_but_is_none_is_refused(server: Server) -> None:
    for body in ("[1, 2]", '"text"', "nonsense"):
        answer = server.post(body, Content_Type="application/json; charset=utf-8")
        assert answer.status_code == 400 and "the body is" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/caption", 405)]
)
def test_other_paths_and_methods_are_refused_in_json(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = requests.request(method, f"{server.url}{path}", timeout=30)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"]


def test_openapi_describes_both_bodies(server: Server) -> None:
    described = requests.get(f"{server.url}/openapi.json", timeout=30).json()
    content = described["paths"]["/caption"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/*", "application/json"}
    assert set(content["application/json"]["schema"]["properties"]) == {"inputs", "parameters"}
    assert "$ref" not in json.dumps(content), "a reference that no tool could resolve"


# Faults, without a server ---------------------------------------------------------------------


def call(
    answer: Any, path: str = "/caption", method: str = "POST", ready: bool = True
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON that the HTTP application gives when captioning does `answer`."""

    async def caption(image: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer, 1

    async def is_ready() -> bool:
        return ready

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": picture(0), "more_body": False}

    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b"",
        "headers": [(b"x-request-id", b"request-7")], "scheme": "http", "server": ("test", 80),
    }  # fmt: skip
    asgi = app.build_http(caption, is_ready, ENCODER, MAX_BODY_BYTES)
    asyncio.run(asgi(scope, receive, send))
    start, *body = sent
    headers = {key.decode(): value.decode() for key, value in start["headers"]}
    return start["status"], headers, json.loads(b"".join(part["body"] for part in body))


def test_the_http_application_needs_no_ray() -> None:
    status, _, body = call(Caption("a caption", -1.0, ["a", "caption"], None))
    assert (status, body) == (200, [{"generated_text": "a caption"}])


def test_not_ready_is_503_but_alive() -> None:
    status, _, body = call(None, "/readyz", "GET", ready=False)
    assert (status, body["error"]) == (503, "no captioner answers yet")
    assert call(None, "/livez", "GET", ready=False)[0] == 200


def test_the_unforeseen_is_a_500_with_id_whose_stack_is_in_the_log_only() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    app.logger.addHandler(handler)
    try:
        status, _, body = call(RuntimeError("a secret"))
    finally:
        app.logger.removeHandler(handler)
    assert status == 500
    assert body == {"error": "internal error in request request-7", "error_type": "internal"}
    (record,) = records
    assert "request-7" in record.getMessage()
    assert record.exc_info and "a secret" in str(record.exc_info[1])


def test_a_dead_captioner_is_a_503_to_be_retried() -> None:
    status, headers, body = call(ray.exceptions.RayActorError())
    assert (status, headers["retry-after"]) == (503, "1")
    assert body["error_type"] == "unavailable"


# Starting -------------------------------------------------------------------------------------


def test_one_gpu_for_each_captioner_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "runs" / "first", tmp_path / "scratch")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "num_gpus", lambda: 3)

    def gpus(**args: Any) -> float:
        built = app.build_app({"storage": str(tmp_path / "runs"), **args})
        captioner = built._bound_deployment.init_args[0]._bound_deployment
        return float(captioner.ray_actor_options["num_gpus"])

    assert gpus() == 1
    assert gpus(num_gpus=0.25) == 0.25
    monkeypatch.setattr(cluster, "num_gpus", lambda: 0)
    assert gpus() == 0
    monkeypatch.setenv("CAPTION_RAY_NUM_GPUS", "1")
    assert gpus() == 1, "the autoscaler has no GPU node up yet"


def test_environment_moves_storage_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = save_run(tmp_path / "runs" / "first", tmp_path / "scratch")
    monkeypatch.setenv("CAPTION_RAY_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("CAPTION_RAY_NUM_GPUS", "0")

    def served() -> str:
        built = app.build_app({})
        return str(built._bound_deployment.init_args[0]._bound_deployment.init_args[0])

    assert served() == uri
    other = save_run(tmp_path / "other", tmp_path / "scratch")
    monkeypatch.setenv("CAPTION_RAY_CHECKPOINT", other)
    assert served() == other


def test_a_relative_storage_is_found_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = save_run(tmp_path / "runs" / "first", tmp_path / "scratch")
    monkeypatch.delenv("CAPTION_RAY_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    built = app.build_app({"num_gpus": 0})
    assert built._bound_deployment.init_args[0]._bound_deployment.init_args[0] == uri


def test_no_checkpoint_fails_before_anything_starts(tmp_path: Path) -> None:
    for args in ({"storage": str(tmp_path)}, {"checkpoint": str(tmp_path)}):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: .*train one"):
            app.build_app({"num_gpus": 0, **args})


def rewrite(uri: str, name: str, data: bytes) -> None:
    """Replace a checkpoint's file and what the manifest says of it."""
    manifest = json.loads(storage.read_bytes(f"{uri}/{checkpoint.MANIFEST}"))
    manifest[name] = {"bytes": len(data), "digest": storage.digest(data)}
    storage.write_bytes(f"{uri}/{name}", data)
    storage.write_bytes(f"{uri}/{checkpoint.MANIFEST}", json.dumps(manifest).encode())


def test_a_damaged_checkpoint_fails_before_anything_starts(tmp_path: Path) -> None:
    uri = save_run(tmp_path / "run", tmp_path / "scratch")
    weights = Path(uri) / checkpoint.MODEL
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot be served: .*{checkpoint.MODEL}"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


def test_weights_of_another_model_fail_before_anything_starts(tmp_path: Path) -> None:
    uri = save_run(tmp_path / "run", tmp_path / "scratch")
    other = save_run(tmp_path / "other", tmp_path / "scratch", width=8)
    rewrite(uri, checkpoint.MODEL, storage.read_bytes(f"{other}/{checkpoint.MODEL}"))
    with pytest.raises(CheckpointError, match=f"{uri}: cannot be rebuilt"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


def test_a_checkpoint_that_cannot_caption_fails_before_anything_starts(tmp_path: Path) -> None:
    uri = save_run(tmp_path / "run", tmp_path / "scratch", fill=float("nan"))
    with pytest.raises(CheckpointError, match="cannot caption a blank picture"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"chekpoint": "best"}, "chekpoint is 'best': .*valid: checkpoint, storage"),
        ({"max_batch_size": 0}, "max_batch_size is 0: .*greater than or equal to 1"),
        ({"num_gpus": "many"}, "num_gpus is 'many': .*valid number"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_args_name_the_key_its_value_and_the_remedy(
    args: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        app.build_app(args)
