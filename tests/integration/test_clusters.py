"""Training on separate hosts that are cut off, preempted, killed and brought back.

Real Ray, real addresses, a real S3 server on its own host, and the commands that a user types.
With -s, or -rP for passed tests, pytest shows the log of what happened to the hosts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import hosts
import numpy as np
import pytest
import swift_server
import yaml
from ledgers import mask_of
from patience import scaled, wait_until
from safetensors.numpy import load_file

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.data import shapes
from caption_ray.data.ingest import ingest

ROOT = Path(__file__).resolve().parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PICTURES, BUCKET = 300, "training"
EPOCHS = 3
"""Steps of the job that is stopped; each takes a few seconds."""
PATIENCE = 240.0
"""Seconds in which a run must resume after a fault: a busy machine starts processes slowly."""
NOTICE = 10
"""Seconds between the preemption notice to a host and its end."""
BUCKET_AWAY = 15
"""Seconds for which the bucket is cut off."""
TINY = (
    "shapes --run.tracker none --data.captions-per-image 2 --model.encoder.image-size 32 "
    "--model.decoder.embedding-dim 8 --model.decoder.hidden-dim 16 "
    "--model.decoder.attention-dim 8 --train.batch-size 5 --train.warmup-steps 4 "
    "--train.deterministic --train.sample-captions 1 --train.log-every 20"
).split()
CLUSTER = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "only-for-the-hosts-of-this-test-0000000",
    # declares a host dead after about 10 s without an answer, not after a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE),
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
    # idle processes cost time on the two cores that all hosts share
    "RAY_prestart_worker_first_driver": "0",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "NO_PROXY": "*",
    "no_proxy": "*",
}
ALL_JOINED = """
import ray, sys, time

while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False)
    except ConnectionError:  # the head is not up yet
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
"""
"""Waits until argv[1] nodes have joined."""

METADATA_ADDRESS = "169.254.169.254"
METADATA = f"""
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Metadata(BaseHTTPRequestHandler):
    def do_PUT(self):
        assert self.path == "/latest/api/token"
        self.answer(b"token")
    def do_GET(self):
        known = self.headers["X-aws-ec2-metadata-token"] == "token"
        assert self.path == "/latest/meta-data/spot/instance-action" and known
        if os.path.exists(sys.argv[1]):
            self.answer(b'{{"action": "terminate"}}')
        else:
            self.send_error(404)
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

HTTPServer(("{METADATA_ADDRESS}", 80), Metadata).serve_forever()
"""
"""AWS's metadata server for spot machines: it announces a preemption once argv[1] exists."""

unavailable = hosts.why_unavailable()
pytestmark = pytest.mark.skipif(unavailable is not None, reason=str(unavailable))


@pytest.fixture(scope="module")
def scenes_as_shards(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("shards")
    shapes.write(folder, PICTURES, 6, seed=0)
    ingest(
        str(folder), str(out), image_size=None, images_per_shard=50, seed=0,
        splits=("train", "val"), progress=False,
    )  # fmt: skip
    return out


@contextmanager
def _cluster(
    nodes: dict[str, list[str]],
    extra: dict[str, str],
    stack: dict[str, hosts.Host],
    notices: dict[str, Path] | None = None,
) -> Iterator[dict[str, hosts.RayHost]]:
    """Ray on the named hosts, the head first.

    Those in `notices` are spot machines, each preempted once its file exists.
    """
    environment = {**os.environ, **CLUSTER, **extra}
    started: dict[str, hosts.RayHost] = {}
    head: str | None = None
    try:
        for name, options in nodes.items():
            started[name] = hosts.RayHost(stack[name], environment, head, *options)
            head = started[name].head
            if notices and name in notices:
                _start_as_spot_machine(started[name], notices[name])
            else:
                started[name].start()
        # a run that starts with fewer nodes would restart when the others join
        first = next(iter(started.values()))
        subprocess.run(
            first.host.command(sys.executable, "-c", ALL_JOINED, str(len(started))),
            env=first.environment,
            check=True,
            timeout=scaled(PATIENCE),
        )
        yield started
    finally:
        for node in started.values():
            node.stop()


def _wait(condition: Callable[[], bool], what: str, job: subprocess.Popen[str] | None) -> None:
    def holds() -> bool:
        assert job is None or job.poll() is None, f"the job ended before {what}"
        return condition()

    wait_until(holds, PATIENCE, what, pause=0.25)


class _Run:
    """`python jobs/train.py` on the head, on shards and with checkpoints in the bucket."""

    def __init__(self, head: hosts.RayHost, s3: hosts.Host, client: Any, log: Path) -> None:
        self.head, self.s3, self.client, self.log = head, s3, client, log
        self.job: subprocess.Popen[str] | None = None
        self.start = time.monotonic()
        self.table: list[str] = []

    def begin(self, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "jobs/train.py"), *TINY, *arguments]
        self.job = subprocess.Popen(
            self.head.host.command(*command),
            env=self.head.environment,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read(self, key: str) -> bytes:
        get = self.client.get_object
        return self.s3.call(lambda: get(Bucket=BUCKET, Key=key)["Body"].read())

    def step(self) -> int:
        """The step of the newest checkpoint."""
        try:
            return int(json.loads(self.read("runs/hosts/latest.json"))["step"])
        except self.client.exceptions.NoSuchKey:
            return 0

    def resumed(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "Resumed from" in line]

    def goes_on_after(self, fault: str, do: Callable[[], object], workers: int | None) -> None:
        """Call `do`, and wait until checkpoints are written again, by this many workers."""
        step, resumed, begun = self.step(), len(self.resumed()), time.monotonic()
        do()

        def has() -> bool:
            if workers is None:
                return self.step() > step
            lines = self.resumed()[resumed:]
            if not lines or f"with {workers} worker" not in lines[-1]:
                return False
            return self.step() > int(lines[-1].split("step ")[1].split(")")[0])

        _wait(has, f"training after {fault}", self.job)
        now = time.monotonic()
        self.table.append(
            f"{begun - self.start:6.0f} s  {fault:32} checkpoint then {step:4}, "
            f"now {self.step():4}, {now - begun:5.1f} s until the next"
        )
        print(self.table[-1], flush=True)

    def checkpoints(self) -> list[tuple[dict[str, Any], np.ndarray]]:
        """State and ledger, as a mask, of every checkpoint that was ever committed, by step."""

        def fetch() -> list[tuple[dict[str, Any], np.ndarray]]:
            pages = self.client.get_paginator("list_objects_v2")
            keys = [
                item["Key"]
                for page in pages.paginate(Bucket=BUCKET, Prefix="runs/hosts/checkpoint-")
                for item in page.get("Contents", [])
            ]
            found = []
            for key in sorted(k for k in keys if k.endswith(f"/{checkpoint.MANIFEST}")):
                folder = key.rsplit("/", 1)[0]
                state, ledger = (
                    self.client.get_object(Bucket=BUCKET, Key=f"{folder}/{name}")["Body"]
                    for name in (checkpoint.STATE, checkpoint.LEDGER)
                )
                found.append((json.loads(state.read()), mask_of(ledger.read())))
            return found

        return self.s3.call(fetch)


def _assert_exactly_once(checkpoints: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Each checkpoint's weights have learnt from every picture of every epoch exactly once."""
    before: tuple[dict[str, Any], np.ndarray] | None = None
    for state, ledger in checkpoints:
        # `pictures` counts the pictures in all steps; the ledger says which ones they were
        assert state["pictures"] == state["epoch"] * PICTURES + ledger.sum(), state
        if before is not None and before[0]["epoch"] == state["epoch"]:
            forgotten = np.flatnonzero(before[1] > ledger).tolist()
            assert not forgotten, f"of {before[0]}, forgotten by {state}: {forgotten}"
        before = state, ledger


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    swift_server.why_unavailable() is not None, reason=str(swift_server.why_unavailable())
)
def test_a_run_outlasts_hosts_and_bucket_and_learns_from_every_picture_once(
    scenes_as_shards: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        host = stack.enter_context(hosts.hosts(["head", "rack", "spot", "bucket"], tmp_path))
        bucket = host["bucket"]
        s3 = stack.enter_context(swift_server.swift_s3(bucket.address, bucket.command()))
        client = boto3.client(
            "s3", endpoint_url=s3.endpoint_url, region_name=s3.region,
            aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key,
        )  # fmt: skip

        def fill() -> None:
            client.create_bucket(Bucket=BUCKET)
            for file in scenes_as_shards.rglob("*"):
                if file.is_file():
                    key = f"shards/{file.relative_to(scenes_as_shards)}"
                    client.upload_file(str(file), BUCKET, key)

        os.environ["NO_PROXY"] = "*"
        bucket.call(fill)
        cpus = {name: ["--num-cpus=3"] for name in ("head", "rack", "spot")}
        notice = tmp_path / "notice"
        node = stack.enter_context(_cluster(cpus, s3.environment(), host, {"spot": notice}))
        run = _Run(node["head"], bucket, client, tmp_path / "job.log")
        arguments = (
            f"--run.storage s3://{BUCKET}/runs --run.name hosts --data.shards s3://{BUCKET}/shards "
            "--train.num-workers 3 --train.min-workers 1 --train.cpus-per-worker 2 "
            "--train.checkpoint-seconds 3 --train.keep-checkpoints 100000"
        ).split()
        try:
            run.begin(*arguments, "--train.epochs", "1000")
            _wait(lambda: run.step() > 0, "the first checkpoint", run.job)
            run.goes_on_after("a host is cut off", host["rack"].cut, 2)

            def bring_back() -> None:
                host["rack"].restore()
                host["rack"].kill()
                node["rack"].start()

            run.goes_on_after("it is brought back", bring_back, 3)

            noticed = run.step()
            run.goes_on_after(f"a spot machine is given {NOTICE} s notice", notice.touch, 2)
            assert int(run.resumed()[-1].split("step ")[1].split(")")[0]) > noticed

            run.goes_on_after("a host is killed", host["rack"].kill, 1)

            def cut_bucket() -> None:
                bucket.cut()
                time.sleep(BUCKET_AWAY)
                bucket.restore()

            run.goes_on_after(f"the bucket is cut off for {BUCKET_AWAY} s", cut_bucket, None)
            os.kill(run.job.pid, signal.SIGTERM)
            assert run.job.wait(scaled(PATIENCE)) == 1
            assert "Stopped; " in run.log.read_text()
            epochs = 1 + json.loads(run.read("runs/hosts/latest.json"))["epoch"]
            run.begin(*arguments, "--train.epochs", str(epochs))
            assert run.job.wait(scaled(PATIENCE)) == 0
        except BaseException:
            print(run.log.read_text()[-8000:])
            raise
        finally:
            if run.job is not None and run.job.poll() is None:
                run.job.kill()
        found = run.checkpoints()
        _assert_exactly_once(found)
        last = found[-1][0]
        assert (last["epoch"], last["pictures"]) == (epochs, epochs * PICTURES)
        print(f"{epochs} epochs, {last['pictures']} pictures, {len(found)} checkpoints: exact")


@pytest.mark.timeout(1200)
def test_a_stopped_job_goes_on_bit_for_bit_where_it_was(
    scenes_as_shards: Path, tmp_path: Path
) -> None:
    arguments = [
        sys.executable, str(ROOT / "jobs/train.py"), *TINY, "--data.shards", str(scenes_as_shards),
        "--run.storage", str(tmp_path), "--train.epochs", str(EPOCHS),
        "--train.checkpoint-seconds", "None",
    ]  # fmt: skip
    with (
        hosts.hosts(["head"], tmp_path) as host,
        _cluster({"head": ["--num-cpus=4", f"--dashboard-host={hosts.SUBNET}.1"]}, {}, host) as ray,
    ):
        head = ray["head"]

        def command(*words: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                head.host.command(*words),
                env={**head.environment, "RAY_ADDRESS": f"http://{head.host.address}:8265"},
                stdout=(tmp_path / "jobs.log").open("a"),
                stderr=subprocess.STDOUT,
                text=True,
            )

        def submit(name: str, job: str) -> subprocess.Popen[str]:
            entry = [*arguments, "--run.name", name]
            return command(*RAY, "job", "submit", "--submission-id", job, "--", *entry)

        def step(name: str) -> int:
            return run_folder.latest_step(str(tmp_path / name))

        try:
            _wait(lambda: _answers(head, 8265), "the dashboard", None)
            job = submit("stopped", "first")
            _wait(lambda: step("stopped") > 0, "the first epoch", job)
            assert command(*RAY, "job", "stop", "first").wait(scaled(PATIENCE)) == 0
            job.wait(scaled(PATIENCE))
            state = checkpoint.load(run_folder.find(str(tmp_path / "stopped"), "latest")).state
            assert 0 < state.epoch < EPOCHS and state.epoch_step > 0, "not stopped in mid-epoch"
            for job in (submit("stopped", "second"), submit("whole", "whole")):
                assert job.wait(scaled(PATIENCE)) == 0
        except BaseException:
            print((tmp_path / "jobs.log").read_text()[-8000:])
            raise
    whole, stopped = (
        load_file(Path(run_folder.find(str(tmp_path / name), "latest"), checkpoint.MODEL))
        for name in ("whole", "stopped")
    )
    assert step("whole") == step("stopped") == EPOCHS * PICTURES // 5
    for name, weight in whole.items():
        assert np.array_equal(weight, stopped[name]), name


def _start_as_spot_machine(node: hosts.RayHost, notice: Path) -> None:
    """Start the host as cluster.yaml starts a worker; once `notice` exists, it is preempted."""
    address = node.host.command("ip", "address", "replace", METADATA_ADDRESS, "dev", "lo")
    subprocess.run(address, check=True)
    node.host.start(sys.executable, "-c", METADATA, str(notice), environment=node.environment)
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["worker_start_ray_commands"]
    (command,) = (text for text in commands if "ray start" in text)
    for ours, here in (
        ("--block ", f"--block {' '.join(node.options())} "),
        ("TIMEOUT_S=110", f"TIMEOUT_S={NOTICE}"),
        ("/tmp/ray-node.log", f"{notice.parent}/ray-node.log"),
    ):
        assert ours in command
        command = command.replace(ours, here)
    environment = node.environment | {"RAY_HEAD_IP": node.head.partition(":")[0]}
    node.host.start("bash", "-c", f"{command}\nwait", environment=environment)


def _answers(node: hosts.RayHost, port: int) -> bool:
    import socket

    def connect() -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex((node.host.address, port)) == 0

    return node.host.call(connect)
