"""Fixtures that several test files share."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
import patience

COCO_MINI_VARIABLE = "CAPTION_RAY_COCO_MINI"

# before torch is loaded: its threads must not spin while Ray's processes want the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Folder with a small real excerpt of COCO 2017 in its original zips."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "coco-mini"
    chosen = os.environ.get(COCO_MINI_VARIABLE)
    for folder in (beside, *([Path(chosen)] if chosen else [])):
        if folder.is_dir():
            return folder
    pytest.skip(f"no real pictures: neither ../shared/coco-mini nor ${COCO_MINI_VARIABLE} is there")


@pytest.fixture(scope="session")
def pretrained_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights of `timm/tf_efficientnet_lite0`: a .safetensors file."""
    import pretrained

    return pretrained.convert(tmp_path_factory.mktemp("pretrained") / "lite0.safetensors")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray of four (logical) CPUs and no GPU, shared by all tests that need one."""
    import ray

    from caption_ray import cluster

    ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    cluster.configure_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `shapes` data set in COCO layout: 40 training and 12 validation scenes, unpacked."""
    from caption_ray.data import shapes

    folder = tmp_path_factory.mktemp("scenes")
    shapes.write(folder, 40, 12, seed=0)
    return folder


@pytest.fixture(scope="session")
def shards(scenes: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same scenes as shards of at most 15 pictures."""
    from caption_ray.data.ingest import ingest

    out = str(tmp_path_factory.mktemp("shards"))
    ingest(
        str(scenes),
        out,
        image_size=None,
        images_per_shard=15,
        seed=0,
        splits=("train", "val"),
        progress=False,
    )
    return out


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with one checkpoint: an untrained captioner of 32 pixels that knows shapes' words."""
    import dataclasses

    import torch

    from caption_ray import config
    from caption_ray.captioning import checkpoint, run_folder
    from caption_ray.data.ledger import Ledger
    from caption_ray.data.vocabulary import Vocabulary
    from caption_ray.model.captioner import build_captioner

    preset = config.shapes().model
    model = dataclasses.replace(
        preset,
        encoder=dataclasses.replace(preset.encoder, image_size=32),
        decoder=dataclasses.replace(
            preset.decoder, embedding_dim=8, hidden_dim=16, attention_dim=8
        ),
    )
    vocabulary = Vocabulary("a large small red blue circle star left of above".split())
    torch.manual_seed(0)
    captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
    state = checkpoint.State(1, 1, 0, {}, None)
    scratch, run = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("tiny-run")
    search = config.SearchConfig(beam_size=2, max_length=8)
    ledger = Ledger([1])
    checkpoint.save(scratch, captioner, vocabulary, model, search, state, {}, ledger)
    run_folder.commit(scratch, str(run), state, keep=1, is_best=True)
    return str(run)


@pytest.fixture(scope="session")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of the tiny captioner, of 24 steps in three epochs (`trainer.Finished`)."""
    from tiny_runs import tiny_config

    from caption_ray.training import trainer

    runs = tmp_path_factory.mktemp("runs")
    return trainer.train(tiny_config(shards, runs, "undisturbed"))


@pytest.fixture(scope="session")
def two_workers(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same without dropout, by two workers."""
    from tiny_runs import tiny_config, without_dropout

    from caption_ray.training import trainer

    runs = tmp_path_factory.mktemp("runs")
    return trainer.train(without_dropout(tiny_config(shards, runs, "two", num_workers=2)))


class _Ranges(SimpleHTTPRequestHandler):
    """Serves ranges, which the standard library's handler does not, and fails on demand."""

    failures = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        span = self.headers.get("Range")
        path = self.translate_path(self.path)
        if span is None or not os.path.isfile(path):
            return super().do_GET()
        first, last = (int(n) for n in span.removeprefix("bytes=").split("-"))
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def web(tmp_path):
    """A web server of `tmp_path` that serves ranges, and fails `web.handler.failures` times."""
    handler = type("Handler", (_Ranges,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.handler = handler
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Endpoint:
    """A real Ray Serve that is deployed from a configuration, as `serve run FILE` does it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def deploy(
        self,
        args: dict[str, Any],
        captioner: dict[str, Any] | None = None,
        ingress: dict[str, Any] | None = None,
        wait: bool = True,
    ) -> None:
        """`args` of build_app, and settings of the two deployments."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate(
            {
                "applications": [
                    {
                        "name": "captions",
                        "import_path": "caption_ray.serving.app:build_app",
                        "args": {"num_gpus": 0, **args},
                        "deployments": [
                            {"name": "Captioner", **(captioner or {})},
                            {"name": "Ingress", **(ingress or {})},
                        ],
                    }
                ]
            }
        )
        _get_global_client().deploy_apps(schema)
        if wait:
            self.wait_until(self.is_running)

    @staticmethod
    def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
        patience.wait_until(condition, seconds, "the endpoint")

    @staticmethod
    def application() -> Any:
        from ray import serve

        return serve.status().applications.get("captions")

    def is_running(self) -> bool:
        application = self.application()
        assert application is None or application.status != "DEPLOY_FAILED", application.message
        return application is not None and application.status == "RUNNING"

    def running(self, deployment: str) -> int:
        """Replicas that run."""
        states = self.application().deployments[deployment].replica_states
        return int(states.get("RUNNING", 0))

    @staticmethod
    def pids(deployment: str) -> list[int]:
        """Processes of a deployment's replicas."""
        import psutil

        title = f"ray::ServeReplica:captions:{deployment}"
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                pass
        return sorted(found)


@pytest.fixture(scope="module")
def endpoint(local_ray: None) -> Iterator[Endpoint]:
    """Ray Serve on a free port; `deploy` puts the application there."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield Endpoint(port)
    serve.shutdown()
