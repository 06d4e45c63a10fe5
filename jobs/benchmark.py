"""Measure caption_ray side by side with simpler ways to do the same, in one run on one machine.

Each section prints a table of ratios to baselines that are measured in turn with it, and one line
of JSON. `--quick` takes a minute or two, the full measurement several times that.
"""

from __future__ import annotations

import os

# before torch is loaded: its threads must not spin while other processes want the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import io
import json
import logging
import math
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import ray
import torch
import tyro
import uvicorn
from fastapi import FastAPI, Request
from ray import serve

from caption_ray import cluster, config
from caption_ray.data import shapes
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.serving import app
from caption_ray.serving.predictor import Predictor
from caption_ray.training import checkpoint


@dataclass
class Serve:
    """The endpoint, beside the predictor alone in full batches and a plain FastAPI server."""

    checkpoint: str | None = None
    """A checkpoint or run; None: the `coco` preset's captioner with random weights."""
    picture: str | None = None
    """A picture to send; None: a drawn scene as JPEG of 640 x 480."""
    clients: tuple[int, ...] = (1, 8, 32, 128)
    """Numbers of clients that ask at the same time, each one request after the other."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    quick: bool = False
    """One round, and a quarter of the requests."""


def main() -> None:
    sections = {"serve": Serve}
    section = tyro.extras.subcommand_cli_from_dict(sections, description=__doc__)
    if isinstance(section, Serve):
        benchmark_serve(section)


# serve ----------------------------------------------------------------------------------------

PICTURES_PER_CLIENT = {1: 24, 8: 8}
"""Requests of each client; 8 clients or more fill batches, and so need fewer each."""


def benchmark_serve(options: Serve) -> None:
    rounds = 1 if options.quick else options.rounds
    picture = Path(options.picture).read_bytes() if options.picture else drawn_picture()
    with tempfile.TemporaryDirectory() as folder:
        uri = options.checkpoint or untrained_checkpoint(Path(folder))
        predictor = Predictor.from_uri(uri, torch.device("cuda" if has_cuda() else "cpu"))
        batch_size = app.Arguments().max_batch_size
        predictor.warm_up(batch_size)
        with PlainServer(predictor.uri) as plain, RayServer(predictor.uri) as served:
            results: dict[str, list[Result]] = {}
            for _ in range(rounds):
                for arm, measure in arms(options, predictor, picture, plain, served, batch_size):
                    results.setdefault(arm, []).append(measure())
                    print(f"{arm}: {results[arm][-1]}", flush=True)
    report_serve(results, options, predictor, batch_size)


def arms(
    options: Serve, predictor: Predictor, picture: bytes, plain: str, served: str, batch_size: int
) -> list[tuple[str, Callable[[], Result]]]:
    share = 4 if options.quick else 1
    found: list[tuple[str, Callable[[], Result]]] = [
        ("alone, 1", lambda: alone(predictor, picture, 1, 24 // share)),
        (f"alone, {batch_size}", lambda: alone(predictor, picture, batch_size, 16 // share)),
    ]
    for clients in options.clients:
        requests = clients * PICTURES_PER_CLIENT.get(clients, 6)
        requests = max(clients, requests // share)
        found.append(
            (f"ray, {clients}", lambda c=clients, r=requests: ask(served, picture, c, r))  # type: ignore[misc]
        )
        fewer = max(min(clients, 32), requests // 4)  # it gets no faster by more
        found.append(
            (f"plain, {clients}", lambda c=clients, r=fewer: ask(plain, picture, c, r))  # type: ignore[misc]
        )
    return found


@dataclass
class Result:
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    answered: int
    refused: int
    failed: int

    @classmethod
    def of(cls, seconds: float, latencies: list[float], refused: int, failed: int) -> Result:
        if not latencies:
            raise RuntimeError(f"not one of {failed} requests was answered with 200")
        ordered = sorted(latencies)

        def quantile(share: float) -> float:
            return 1000 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

        return cls(
            len(ordered) / seconds, quantile(0.5), quantile(0.95), quantile(0.99),
            len(ordered), refused, failed,
        )  # fmt: skip


def alone(predictor: Predictor, picture: bytes, batch_size: int, batches: int) -> Result:
    """Bytes to captions in this process, nothing beside it."""
    latencies = []
    start = time.perf_counter()
    for _ in range(batches):
        before = time.perf_counter()
        predictor.predict(np.stack([predictor.prepare(picture) for _ in range(batch_size)]))
        latencies += [time.perf_counter() - before] * batch_size
    return Result.of(time.perf_counter() - start, latencies, 0, 0)


def ask(url: str, picture: bytes, clients: int, requests: int) -> Result:
    """So many requests by so many clients, from the first sent to the last answered."""
    latencies: list[float] = []
    counts = {"left": requests, "refused": 0, "failed": 0}

    async def client(session: aiohttp.ClientSession) -> None:
        while counts["left"] > 0:
            counts["left"] -= 1
            before = time.perf_counter()
            async with session.post(f"{url}/caption", data=picture) as answer:
                await answer.read()
                if answer.status == 200:
                    latencies.append(time.perf_counter() - before)
                elif answer.status == 429:  # a good client comes back when it is told to
                    counts["refused"] += 1
                    counts["left"] += 1
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                else:
                    counts["failed"] += 1

    async def everybody() -> float:
        connector = aiohttp.TCPConnector(limit=clients)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            start = time.perf_counter()
            await asyncio.gather(*(client(session) for _ in range(clients)))
            return time.perf_counter() - start

    seconds = asyncio.run(everybody())
    return Result.of(seconds, latencies, counts["refused"], counts["failed"])


def report_serve(
    results: dict[str, list[Result]], options: Serve, predictor: Predictor, batch_size: int
) -> None:
    def median(arm: str, field: str) -> float:
        return statistics.median(getattr(result, field) for result in results[arm])

    best = median(f"alone, {batch_size}", "per_second")
    single = median("alone, 1", "p50_ms")
    encoder = predictor.encoder_config
    device = f"{predictor.device}, {torch.get_num_threads()} threads"
    print(f"\n{encoder.name} at {encoder.image_size} pixels, {predictor.search}, {device}")
    heads = ("pictures/s", "of alone", "p50 ms", "p95 ms", "p99 ms", "refused", "failed")
    print(f"{'':12}" + "".join(f"{head:>12}" for head in heads))
    for arm in results:
        rates = [result.per_second for result in results[arm]]
        cells = [
            f"{median(arm, 'per_second'):.1f} ± {(max(rates) - min(rates)) / 2:.1f}",
            f"{median(arm, 'per_second') / best:.2f}",
            *(f"{median(arm, field):.0f}" for field in ("p50_ms", "p95_ms", "p99_ms")),
            str(sum(result.refused for result in results[arm])),
            str(sum(result.failed for result in results[arm])),
        ]
        print(f"{arm:12}" + "".join(f"{cell:>12}" for cell in cells))
    added = median("ray, 1", "p50_ms") - single if "ray, 1" in results else math.nan
    most = max(median(arm, "per_second") for arm in results if arm.startswith("ray"))
    plain = max(median(arm, "per_second") for arm in results if arm.startswith("plain"))
    print(f"At saturation {most / best:.2f} of the predictor alone and {most / plain:.2f} times "
          f"the plain server; one client waits {added:.1f} ms longer than alone.")  # fmt: skip
    print(
        json.dumps(
            {
                "section": "serve",
                "encoder": encoder.name,
                "device": str(predictor.device),
                "saturated_of_alone": round(most / best, 3),
                "saturated_of_plain": round(most / plain, 3),
                "added_ms": round(added, 1),
            }
        )
    )


class RayServer:
    """The endpoint, on a Ray of its own."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> str:
        cores = (os.cpu_count() or 1) + 2  # ingress and captioner each reserve one
        ray.init(address="local", num_cpus=cores, include_dashboard=False,
                 logging_level=logging.ERROR, log_to_driver=False)  # fmt: skip
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        gpus = 1 if cluster.num_gpus() else 0
        arguments = app.Arguments(checkpoint=self.uri, num_gpus=gpus, request_timeout_s=120)
        serve.run(app.build_app(arguments), name="captions")
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        serve.shutdown()
        ray.shutdown()


class PlainServer:
    """What one would write in an afternoon: FastAPI, one picture per request."""

    def __init__(self, uri: str) -> None:
        self.port = free_port()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=run_plain_server, args=(uri, self.port))

    def __enter__(self) -> str:
        self.process.start()
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return f"http://127.0.0.1:{self.port}"
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def run_plain_server(uri: str, port: int) -> None:
    predictor = Predictor.from_uri(uri, torch.device("cuda" if has_cuda() else "cpu"))
    predictor.warm_up()
    server = FastAPI()

    @server.post("/caption")
    async def caption(request: Request) -> list[dict[str, str]]:
        image = predictor.prepare(await request.body())
        ((found,),) = predictor.predict(image[None])
        return [{"generated_text": found.text}]

    uvicorn.run(server, host="127.0.0.1", port=port, log_level="error")


def untrained_checkpoint(folder: Path) -> str:
    """A run with one checkpoint of the `coco` preset, whose captions are nonsense."""
    preset = config.coco()
    vocabulary = Vocabulary([f"word{number}" for number in range(9000)])
    torch.manual_seed(0)
    captioner = build_captioner(preset.model, len(vocabulary), None, pretrained=False)
    state = checkpoint.State(0, 0, 0, {}, None, None)
    ledger = np.zeros(1, bool)
    scratch = folder / "scratch"
    checkpoint.save(
        scratch, captioner, vocabulary, preset.model, preset.search, state, {}, ledger
    )  # fmt: skip
    return checkpoint.commit(scratch, str(folder / "run"), state, keep=1, is_best=True)


def drawn_picture() -> bytes:
    buffer = io.BytesIO()
    shapes.draw(shapes.scene("val", 0, seed=0)).resize((640, 480)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def has_cuda() -> bool:
    return torch.cuda.is_available()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
