"""Functions for a separate process, whose own Ray gives the workers its environment."""

from __future__ import annotations

import socket
import urllib.request


def start() -> None:
    import ray

    from caption_ray import cluster

    ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    cluster.configure_data()


def serve_once(checkpoint: str, picture: bytes) -> bytes:
    """Start the endpoint, have it caption one picture, and stop it; returns its answer."""
    from ray import serve

    from caption_ray.serving.app import build_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app({"checkpoint": checkpoint, "num_gpus": 0, "follow_interval_s": 1.0}))
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/caption",
            data=picture,
            headers={"Content-Type": "application/octet-stream"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    finally:
        serve.shutdown()
