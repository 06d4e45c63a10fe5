"""The endpoint on a real Ray Serve: real clients, batches, changes of checkpoint, and errors that
prevent its start."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from caption_ray import cluster, storage
from caption_ray.captioning import checkpoint
from caption_ray.captioning.checkpoint import CheckpointError
from caption_ray.captioning.predictor import Predictor
from caption_ray.serving import app

MAX_BATCH_SIZE = 4
MakeRun = Callable[..., str]
MakePicture = Callable[..., bytes]


@dataclasses.dataclass
class Server:
    url: str
    storage: Path
    predictor: Predictor
    """A predictor in this process, of the checkpoint that is served."""

    def post(self, body: Any, query: str = "", **headers: str) -> requests.Response:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.url}/caption{query}"
        return requests.post(url, data=body, headers=headers, timeout=30)

    def expected(self, data: bytes) -> str:
        return self.predictor.predict(self.predictor.prepare(data)[None])[0][0].text

    def info(self) -> Any:
        return requests.get(f"{self.url}/info", timeout=30).json()


@pytest.fixture(scope="module")
def server(
    endpoint: Any, save_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    runs = tmp_path_factory.mktemp("runs")
    uri = save_run(runs / "first")
    endpoint.deploy(
        {
            "storage": str(runs),
            "max_batch_size": MAX_BATCH_SIZE,
            "batch_wait_timeout_s": 0.1,  # long enough for concurrent requests to share a batch
        }
    )
    yield Server(endpoint.url, runs, Predictor.from_uri(uri, torch.device("cpu")))


def test_ready_once_it_runs(server: Server) -> None:
    assert requests.get(f"{server.url}/readyz", timeout=30).json() == {"status": "ready"}
    assert requests.get(f"{server.url}/livez", timeout=30).json() == {"status": "alive"}
    assert server.info()["checkpoint"]["uri"] == server.predictor.uri


# Clients, unmodified --------------------------------------------------------------------------


def test_huggingface_client_gets_captions(
    server: Server, picture: MakePicture, tmp_path: Path
) -> None:
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


def openai_messages(data: bytes) -> Any:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    text = {"type": "text", "text": "What is this?"}
    return [
        {"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": url}}]},
    ]


def test_openai_client_gets_captions_whole_and_in_words(
    server: Server, picture: MakePicture
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    (model,) = client.models.list()
    asked: Any = {"model": model.id, "messages": openai_messages(picture(1))}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == server.expected(picture(1))
    chunks = list(client.chat.completions.create(stream=True, **asked))
    words = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(words) == server.expected(picture(1))
    with pytest.raises(openai.APIStatusError, match="accepted format"):
        client.chat.completions.create(model=model.id, messages=openai_messages(b"no picture"))


def test_a_stream_ends_with_what_the_plain_answer_is(server: Server, picture: MakePicture) -> None:
    query = "?num_return_sequences=2&return_attention=true"
    plain = server.post(picture(1), query).json()
    with requests.post(
        f"{server.url}/caption{query}&stream=true", data=picture(1), stream=True, timeout=30
    ) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    named = [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in events]
    assert named[-1][0] == "captions"
    assert [c["generated_text"] for c in named[-1][1]] == [c["generated_text"] for c in plain]
    words = [word for name, data in named[:-1] for word in data["words"]]
    assert name_of(named[:-1]) <= {"words"} and words == named[-1][1][0]["words"]
    for caption in named[-1][1]:
        weights = caption["attention"]["weights"]
        assert len(weights) == len(caption["words"])
        assert all(abs(sum(shares) - 1) < 1e-3 for shares in weights)


def name_of(events: list[tuple[str, Any]]) -> set[str]:
    return {name for name, _ in events}


# Batches --------------------------------------------------------------------------------------


def test_concurrent_pictures_share_batches_and_get_their_own_captions(
    server: Server, picture: MakePicture
) -> None:
    pictures = [picture(seed) for seed in range(8)]
    expected = [server.expected(data) for data in pictures]
    assert len(set(expected)) > 2, "else a mix-up would not show"
    with ThreadPoolExecutor(len(pictures)) as threads:
        answers = list(threads.map(server.post, pictures))
    assert [answer.json()[0]["generated_text"] for answer in answers] == expected
    sizes = [int(answer.headers["X-Batch-Size"]) for answer in answers]
    assert 1 < max(sizes) <= MAX_BATCH_SIZE
    assert server.post(pictures[0]).headers["X-Batch-Size"] == "1"


def test_bad_pictures_hurt_nobody_beside_them(server: Server, picture: MakePicture) -> None:
    bodies = {seed: picture(seed) for seed in range(6)}
    bodies[1], bodies[4] = bodies[1][: len(bodies[1]) // 2], b"no picture"
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = dict(zip(bodies, threads.map(server.post, bodies.values()), strict=True))
    assert (answers.pop(1).status_code, answers.pop(4).status_code) == (422, 415)
    for seed, answer in answers.items():
        assert answer.json()[0]["generated_text"] == server.expected(bodies[seed])


def test_clients_that_hang_up_hurt_nobody_beside_them(server: Server, picture: MakePicture) -> None:
    def hang_up(seed: int) -> None:
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{server.url}/caption", data=picture(seed), timeout=0.02)

    with ThreadPoolExecutor(12) as threads:
        leaving = [threads.submit(hang_up, seed) for seed in range(6)]
        staying = [threads.submit(server.post, picture(seed)) for seed in range(6)]
        for seed, answer in enumerate(staying):
            text = answer.result().json()[0]["generated_text"]
            assert text == server.expected(picture(seed))
        for task in leaving:
            task.result()


def test_request_ids_are_echoed_or_made(server: Server, picture: MakePicture) -> None:
    assert server.post(picture(0), X_Request_ID="mine").headers["X-Request-ID"] == "mine"
    assert server.post(b"", X_Request_ID="mine").headers["X-Request-ID"] == "mine"
    made = {server.post(b"").headers["X-Request-ID"] for _ in range(2)}
    assert len(made) == 2 and all(made)


def test_our_figures_are_in_rays_exporter(server: Server, picture: MakePicture) -> None:
    server.post(picture(0))
    node = ray.nodes()[0]
    exporter = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 30
    page = (Path(app.__file__).parent / "README.md").read_text()
    wanted = set(re.findall(r"\bray_caption_ray_\w+", page))
    assert len(wanted) == 4
    missing = wanted
    while missing and time.monotonic() < deadline:
        text = requests.get(exporter, timeout=10).text
        # of a histogram, the sample's name goes on
        missing = {name for name in wanted if not re.search(rf"^{name}(_bucket)?\{{", text, re.M)}
        time.sleep(1)
    assert not missing


# Another checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, 48])
def test_a_new_checkpoint_takes_over_without_a_failed_request(
    server: Server, endpoint: Any, save_run: MakeRun, picture: MakePicture, image_size: int
) -> None:
    """Also one with another image size, which the ingress has to learn."""
    uri = save_run(server.storage / f"other-{image_size}", seed=5, image_size=image_size)
    new = Predictor.from_uri(uri, torch.device("cpu"))
    by_step = {}
    stop = False

    def ask(seed: int) -> set[tuple[int, str]]:
        seen = set()
        while not stop:
            answer = server.post(picture(seed))
            seen.add((answer.status_code, answer.json()[0]["generated_text"]))
        return seen

    before = {seed: server.expected(picture(seed)) for seed in range(4)}
    after = {seed: new.predict(new.prepare(picture(seed))[None])[0][0].text for seed in range(4)}
    assert before != after, "else the change would not show"
    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, seed) for seed in range(4)]
        try:
            serve_checkpoint(server, endpoint, uri)
            endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == uri)
            time.sleep(0.5)
            by_step = {seed: server.post(picture(seed)) for seed in range(4)}
        finally:
            stop = True
        for seed, task in enumerate(asking):
            assert task.result() <= {(200, before[seed]), (200, after[seed])}
    for seed, answer in by_step.items():
        assert answer.json()[0]["generated_text"] == after[seed]
    assert server.info()["checkpoint"]["refused"] is None
    serve_checkpoint(server, endpoint, server.predictor.uri)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == server.predictor.uri)


def serve_checkpoint(server: Server, endpoint: Any, uri: str, follow: float | None = None) -> None:
    """Deploy a change of `user_config`, as an edited serve_config.yaml would."""
    endpoint.deploy(
        {
            "storage": str(server.storage),
            "max_batch_size": MAX_BATCH_SIZE,
            "batch_wait_timeout_s": 0.1,
        },
        captioner={
            "user_config": {
                "checkpoint": uri,
                "storage": str(server.storage),
                "follow_interval_s": follow,
            }
        },
    )


def test_a_bad_checkpoint_is_refused_and_the_old_one_serves_on(
    server: Server, endpoint: Any, save_run: MakeRun, picture: MakePicture
) -> None:
    pids = endpoint.pids("Captioner")
    bad = save_run(server.storage / "bad", fill=float("nan"))
    for uri, reason in (
        (bad, "not finite"),
        (str(server.storage / "nothing"), "neither a checkpoint nor a run"),
    ):
        serve_checkpoint(server, endpoint, uri)
        endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is not None)
        told = server.info()["checkpoint"]
        assert told["uri"] == server.predictor.uri
        assert told["refused"]["checkpoint"] == uri and reason in told["refused"]["error"]
        answer = server.post(picture(1)).json()[0]["generated_text"]
        assert answer == server.expected(picture(1))
        serve_checkpoint(server, endpoint, server.predictor.uri)
        endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is None)
    assert endpoint.pids("Captioner") == pids, "no captioner was started anew for any of this"


def test_a_refused_configuration_is_told_until_the_next_one(
    server: Server, endpoint: Any, save_run: MakeRun
) -> None:
    run = server.storage / "followed"
    save_run(run, step=1, seed=1)
    serve_checkpoint(server, endpoint, str(run), follow=0.2)
    endpoint.wait_until(lambda: str(run) in server.info()["checkpoint"]["uri"])
    serve_checkpoint(server, endpoint, str(run), follow=-1)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is not None)
    second = save_run(run, step=2, seed=2)  # which is followed, as the configuration before says
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == second)
    refused = server.info()["checkpoint"]["refused"]
    assert "follow_interval_s" in refused["error"] and "-1" in refused["checkpoint"]
    serve_checkpoint(server, endpoint, server.predictor.uri)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is None)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == server.predictor.uri)


def test_the_best_checkpoint_of_a_run_is_followed_as_training_goes_on(
    server: Server, endpoint: Any, save_run: MakeRun, picture: MakePicture
) -> None:
    run = server.storage / "in-training"
    save_run(run, step=1, seed=1)
    serve_checkpoint(server, endpoint, str(run), follow=0.2)
    for step in (2, 3):
        uri = save_run(run, step=step, seed=step)
        endpoint.wait_until(lambda uri=uri: server.info()["checkpoint"]["uri"] == uri)
        assert server.post(picture(0)).headers["X-Checkpoint"] == f"checkpoint-{step:08d}"
    bad = save_run(run, step=4, fill=float("nan"))
    endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is not None)
    told = server.info()["checkpoint"]
    assert (told["refused"]["checkpoint"], told["uri"]) == (bad, uri)
    mended = save_run(run, step=5, seed=9)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == mended)
    assert server.info()["checkpoint"]["refused"] is None
    serve_checkpoint(server, endpoint, server.predictor.uri)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == server.predictor.uri)


def test_runs_that_caption_together_are_followed_and_their_newest_checkpoints_served(
    server: Server, endpoint: Any, save_run: MakeRun, picture: MakePicture
) -> None:
    runs = [server.storage / "together-1", server.storage / "together-2"]
    one, two = (save_run(run, step=1, seed=seed) for seed, run in enumerate(runs, 11))
    serve_checkpoint(server, endpoint, ",".join(map(str, runs)), follow=0.2)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == f"{one},{two}")
    both = Predictor.from_uri(f"{one},{two}", torch.device("cpu"))
    expected = [both.predict(both.prepare(picture(seed))[None])[0][0].text for seed in range(4)]
    assert expected != [server.expected(picture(seed)) for seed in range(4)]
    for seed, text in enumerate(expected):
        answer = server.post(picture(seed))
        assert answer.json()[0]["generated_text"] == text
        assert answer.headers["X-Checkpoint"] == "checkpoint-00000001,checkpoint-00000001"
    told = server.info()
    assert [member["uri"] for member in told["checkpoint"]["members"]] == [one, two]
    assert told["model"]["decoder"] == "soft, soft"

    newer = save_run(runs[1], step=2, seed=13)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == f"{one},{newer}")
    unfit = save_run(runs[1], step=3, image_size=48)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["refused"] is not None)
    told = server.info()["checkpoint"]
    assert told["uri"] == f"{one},{newer}", "what was served goes on"
    assert told["refused"]["checkpoint"] == f"{one},{unfit}"
    assert "differ in image_size (32 and 48)" in told["refused"]["error"]
    serve_checkpoint(server, endpoint, server.predictor.uri)
    endpoint.wait_until(lambda: server.info()["checkpoint"]["uri"] == server.predictor.uri)


# Starting -------------------------------------------------------------------------------------


def test_one_gpu_for_each_captioner_where_there_are_any(
    save_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "runs" / "first")
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
    save_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = save_run(tmp_path / "runs" / "first")
    monkeypatch.setenv("CAPTION_RAY_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("CAPTION_RAY_NUM_GPUS", "0")

    def served() -> str:
        built = app.build_app({})
        return str(built._bound_deployment.init_args[0]._bound_deployment.init_args[0])

    assert served() == uri
    other = save_run(tmp_path / "other")
    monkeypatch.setenv("CAPTION_RAY_CHECKPOINT", other)
    assert served() == other


def test_a_relative_storage_is_found_from_the_working_directory(
    save_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = save_run(tmp_path / "runs" / "first")
    monkeypatch.delenv("CAPTION_RAY_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    built = app.build_app({"num_gpus": 0})
    assert built._bound_deployment.init_args[0]._bound_deployment.init_args[0] == uri


def test_no_checkpoint_fails_before_anything_starts(tmp_path: Path) -> None:
    for args in ({"storage": str(tmp_path)}, {"checkpoint": str(tmp_path)}):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: .*train one"):
            app.build_app({"num_gpus": 0, **args})


def rewrite(uri: str, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint, and its entry in the manifest."""
    manifest = json.loads(storage.read_bytes(f"{uri}/{checkpoint.MANIFEST}"))
    manifest[name] = {"bytes": len(data), "digest": storage.digest(data)}
    storage.write_bytes(f"{uri}/{name}", data)
    storage.write_bytes(f"{uri}/{checkpoint.MANIFEST}", json.dumps(manifest).encode())


def test_a_damaged_checkpoint_fails_before_anything_starts(
    save_run: MakeRun, tmp_path: Path
) -> None:
    uri = save_run(tmp_path / "run")
    weights = Path(uri) / checkpoint.MODEL
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot be served: .*{checkpoint.MODEL}"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


def test_weights_of_another_model_fail_before_anything_starts(
    save_run: MakeRun, tmp_path: Path
) -> None:
    uri = save_run(tmp_path / "run")
    other = save_run(tmp_path / "other", width=8)
    rewrite(uri, checkpoint.MODEL, storage.read_bytes(f"{other}/{checkpoint.MODEL}"))
    with pytest.raises(CheckpointError, match=f"{uri}: cannot be rebuilt"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


def test_a_checkpoint_that_cannot_caption_fails_before_anything_starts(
    save_run: MakeRun, tmp_path: Path
) -> None:
    uri = save_run(tmp_path / "run", fill=float("nan"))
    with pytest.raises(CheckpointError, match="cannot caption a blank picture"):
        app.build_app({"num_gpus": 0, "checkpoint": uri})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"chekpoint": "best"}, "chekpoint = 'best': .*valid: checkpoint, storage"),
        ({"max_batch_size": 0}, "max_batch_size = 0: give a whole number from 1"),
        ({"num_gpus": "many"}, "num_gpus = 'many': give 0, a fraction of one GPU"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_args_name_the_key_its_value_and_the_remedy(
    args: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        app.build_app(args)
