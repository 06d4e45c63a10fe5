"""Autoscaling: captioners follow the load, up and down to zero."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests


def deploy(endpoint: Any, runs: Path, **scaling: Any) -> None:
    """Scaling that reacts within seconds, so that a test can wait for it."""
    quick = {
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 1,
    }
    endpoint.deploy(
        {"storage": str(runs)},
        captioner={
            "ray_actor_options": {"num_cpus": 0.5},
            "autoscaling_config": {**quick, **scaling},
        },
        ingress={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}},
    )


@pytest.fixture(scope="module")
def runs(save_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "first")
    return folder


def test_captioners_come_and_go_with_the_load_and_lose_no_request(
    endpoint: Any, runs: Path, load_on: Any, picture: Callable[..., bytes]
) -> None:
    deploy(endpoint, runs, min_replicas=1, max_replicas=3)
    assert endpoint.running("Captioner") == 1
    load = load_on(endpoint.url, picture(0), 12)
    with load:
        start = time.monotonic()
        endpoint.wait_until(lambda: endpoint.running("Captioner") >= 2)
        print(f"a second captioner after {time.monotonic() - start:.1f} s")
    endpoint.wait_until(lambda: endpoint.running("Captioner") == 1)
    load.report("1 -> n -> 1")
    assert set(load.statuses) == {200}


def test_scaled_to_zero_it_is_ready_and_the_next_picture_wakes_it(
    endpoint: Any, runs: Path, picture: Callable[..., bytes]
) -> None:
    deploy(endpoint, runs, min_replicas=0, max_replicas=1, downscale_to_zero_delay_s=1)
    requests.post(f"{endpoint.url}/caption", data=picture(0), timeout=60)
    ready = f"{endpoint.url}/readyz"
    # probing every 0.1 s must not keep a captioner running
    endpoint.wait_until(lambda: requests.get(ready, timeout=10).json() == {"status": "asleep"})
    assert endpoint.running("Captioner") == 0
    checkpoint = requests.get(f"{endpoint.url}/info", timeout=10).json()["checkpoint"]
    assert checkpoint["step"] == 1, "what is known of it does not wake it either"
    assert endpoint.running("Captioner") == 0
    start = time.monotonic()
    answer = requests.post(f"{endpoint.url}/caption", data=picture(0), timeout=60)
    print(f"from zero to a caption in {time.monotonic() - start:.1f} s")
    assert answer.status_code == 200
    assert requests.get(ready, timeout=10).json() == {"status": "ready"}
