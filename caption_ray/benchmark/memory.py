"""How much memory a training run takes over time: driver, workers, object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import ray
from matplotlib import pyplot
from numpy.typing import NDArray

from caption_ray.benchmark import measuring
from caption_ray.config import Name, Parallel, Positive, Uri

SAMPLE_SECONDS = 5.0

WARM_UP = 0.2
"""Share of the run after which memory should be steady, as pools and caches are full."""

MIB = 2**20


@dataclass
class Memory:
    """Memory of a training run over time, with a plot of the curves."""

    minutes: Positive = 30.0
    """How long the run lasts."""
    num_cpus: Parallel = 2
    """CPUs that Ray may use."""
    arguments: Name = "shapes"
    """Arguments of jobs/train.py; the run is stopped when its time is up."""
    picture: Uri = "memory.png"
    """PNG file for the curves."""
    quick: bool = False
    """One minute."""


def run(options: Memory) -> None:
    minutes = 1.0 if options.quick else options.minutes
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=options.num_cpus, log_to_driver=False)
        address = ray.get_runtime_context().gcs_address
        job = Path(__file__).parents[2] / "jobs" / "train.py"
        command = [sys.executable, str(job), *options.arguments.split(), "--run.storage", folder,
                   "--train.epochs", "100000", "--run.tracker", "none"]  # fmt: skip
        training = subprocess.Popen(
            command, env={**os.environ, "RAY_ADDRESS": address}, stdout=subprocess.DEVNULL
        )
        try:
            samples = _watch(training, 60 * minutes)
        finally:
            training.send_signal(signal.SIGTERM)
            training.wait()
            ray.shutdown()
    _report(samples, options.picture)


def _watch(training: subprocess.Popen[bytes], seconds: float) -> dict[str, NDArray[np.float64]]:
    """Series of equal length: minutes, and MiB of each kind of memory."""
    start, rows = time.monotonic(), []
    while time.monotonic() < start + seconds:
        if training.poll() is not None:
            raise RuntimeError(f"training ended early, with {training.returncode}")
        rows.append({"minutes": (time.monotonic() - start) / 60, **_sample(training.pid)})
        time.sleep(SAMPLE_SECONDS)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _sample(driver: int) -> dict[str, float]:
    """Current MiB by kind. Private memory only, so that nothing counts twice: the memory that
    processes share is the object store, which has a line of its own."""
    of = {"driver": _private(psutil.Process(driver)), "training workers": 0.0, "data tasks": 0.0}
    of |= {"other actors and tasks": 0.0, "Ray's services": 0.0}
    for process in psutil.Process().children(recursive=True):
        if process.pid == driver:
            continue
        try:
            name = " ".join(process.cmdline()[:1]) or process.name()
            kind = "other actors and tasks" if name.startswith("ray::") else "Ray's services"
            if "RayTrainWorker" in name:
                kind = "training workers"
            elif "ReadTask" in name or "_read" in name or "Map" in name or "IDLE" in name:
                kind = "data tasks"
            of[kind] += _private(process)
        except psutil.NoSuchProcess:
            continue
    total = ray.cluster_resources()["object_store_memory"]
    left = ray.available_resources().get("object_store_memory", 0.0)
    of["object store"] = (total - left) / MIB
    return of


def _private(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss) / MIB


def _report(samples: dict[str, NDArray[np.float64]], picture: str) -> None:
    minutes = samples.pop("minutes")
    warm = minutes >= WARM_UP * minutes[-1]
    record: dict[str, object] = {"section": "memory", "minutes": round(float(minutes[-1]), 1)}
    print(f"{'MiB':22}{'median':>10}{'max':>10}{'growth/hour':>14}")
    for kind, series in samples.items():
        slope = float(np.polyfit(minutes[warm], series[warm], 1)[0]) * 60
        median, most = float(np.median(series[warm])), float(series.max())
        print(f"{kind:22}{median:10.0f}{most:10.0f}{slope:14.1f}")
        record[kind] = {"median": round(median), "max": round(most), "per_hour": round(slope, 1)}
    _draw(minutes, samples, picture)
    print(f"curves: {picture}")
    measuring.record(record)


def _draw(minutes: NDArray[np.float64], samples: dict[str, NDArray[np.float64]], to: str) -> None:
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for kind, series in samples.items():
        axes.plot(minutes, series, label=kind)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None), title="Memory of a training run")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(to, dpi=120)
