"""Ray's real autoscaler, with processes as nodes: it starts them for a run and ends them after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import yaml
from patience import scaled, wait_until

from caption_ray.captioning import run_folder
from caption_ray.data import shapes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
IDLE_MINUTES = 0.1
HEAD_TYPE = "ray.head.default"  # as this provider calls it
NODES = """
import json, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while True:
    gpus = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    print(json.dumps(sum(gpus)), flush=True)
    time.sleep(0.5)
"""

unavailable = hosts.why_unavailable()
pytestmark = pytest.mark.skipif(unavailable is not None, reason=str(unavailable))


@pytest.fixture
def autoscaling(tmp_path: Path) -> Iterator[hosts.RayHost]:
    """A head with 2 CPUs, and up to two nodes that claim to have a GPU."""
    settings = {
        "cluster_name": "come-and-go",
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            # all nodes share an address, so only their ids tell them apart
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "max_workers": 2},
        },
        "auth": {},
        "upscaling_speed": 10,
        **{f"{kind}_commands": [] for kind in ("initialization", "setup")},
        **{f"{node}_{kind}_commands": [] for node in ("head", "worker")
           for kind in ("setup", "start_ray")},
        **{name: {} for name in ("docker", "file_mounts", "head_node", "worker_nodes")},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }  # fmt: skip
    file = tmp_path / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(settings))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_SCHEDULER_EVENTS": "0",
    }
    with hosts.hosts(["head"], tmp_path) as host:
        head = hosts.RayHost(
            host["head"], environment, None, "--num-cpus=2", "--num-gpus=0",
            f"--autoscaling-config={file}",
        )  # fmt: skip
        head.start()
        try:
            yield head
        finally:
            head.stop()


@pytest.mark.timeout(900)
def test_two_gpu_nodes_come_for_a_run_and_go_after_it(
    autoscaling: hosts.RayHost, tmp_path: Path
) -> None:
    head, seen = autoscaling, tmp_path / "gpus"
    environment = head.environment | {"CAPTION_RAY_NUM_GPUS": "1"}
    for _ in range(100):  # until the head answers
        watch = subprocess.Popen(
            head.host.command(sys.executable, "-c", NODES),
            env=environment,
            stdout=seen.open("w"),
            stderr=subprocess.DEVNULL,
        )
        while watch.poll() is None and not seen.read_text():
            time.sleep(0.2)
        if watch.poll() is None:
            break
    else:
        raise AssertionError(head.host.log.read_text()[-3000:])

    def gpus() -> list[float]:
        return [json.loads(line) for line in seen.read_text().splitlines()]

    assert gpus()[-1] == 0
    scenes = tmp_path / "scenes"
    shapes.write(scenes, 40, 4, seed=0)
    job = subprocess.run(
        head.host.command(
            sys.executable, str(ROOT / "jobs/train.py"), "shapes", "--run.tracker", "none",
            "--data.source", str(scenes), "--run.storage", str(tmp_path / "runs"),
            "--run.name", "gpus", "--train.num-workers", "2", "--train.backend", "gloo",
            "--train.epochs", "1", "--train.batch-size", "5", "--model.encoder.image-size", "32",
            "--train.cpus-per-worker", "0.5", "--train.validation-gpus", "0",
        ),
        env=environment, capture_output=True, text=True, timeout=scaled(PATIENCE),
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "2 worker(s) on GPU" in job.stdout
    assert run_folder.latest_step(str(tmp_path / "runs/gpus")) == 4  # 40 / (2 x 5)
    assert max(gpus()) == 2
    wait_until(lambda: gpus()[-1] == 0, PATIENCE, "idle nodes leave", pause=0.5)
