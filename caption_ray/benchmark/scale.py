"""Several workers compared to one, and to what this machine gives plain loops in parallel."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from caption_ray.benchmark import measuring, plain, runs, train
from caption_ray.config import Config, Count, Parallel, Uri


@dataclass
class Scale:
    """Ray Train with one worker and with several, each on its own GPU or on some CPU threads."""

    workers: Parallel = 2
    """Number of workers, when there are several."""
    threads: Parallel = 1
    """Threads of each worker, without a GPU."""
    pictures: Count = 2048
    """Pictures per worker in each measurement."""
    storage: Uri | None = None
    """URI of a folder that all nodes reach, for pictures and checkpoints, which stay there; None: a
    temporary one on this machine."""
    num_cpus: Parallel | None = None
    """CPUs that Ray may use; None: all of this machine."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds of 800 pictures."""


def run(options: Scale) -> None:
    rounds, pictures = (2, 800) if options.quick else (options.rounds, options.pictures)
    cores = options.num_cpus or len(os.sched_getaffinity(0))
    several, threads = options.workers, options.threads
    gpus = torch.cuda.device_count()
    names = ("plain loop", "plain loops side by side", "plain DDP")
    here = not gpus or gpus >= several  # otherwise plain loops would need other machines, too
    rates: dict[str, list[float]] = {"caption_ray, 1 worker": [], f"caption_ray, {several}": []}
    with (
        runs.folder(options.storage) as folder,
        tempfile.TemporaryDirectory() as local,
        runs.on_ray(cores),
        runs.processes(several if here else 1) as spawned,
    ):
        config, shards = runs.prepared(folder, several * pictures)

        def plainly(count: int, together: bool, number: int) -> float:
            rendezvous = str(Path(local, f"rendezvous-{number}")) if together else None
            own = replace(config, data=replace(config.data, max_images=count * pictures))
            places = [plain.Place(rank, count, rendezvous) for rank in range(count)]
            return _sum(_all(spawned, own, shards, places, threads))

        for number in range(rounds):
            for name, count, together in zip(
                names, (1, several, several), (False, False, True), strict=True
            ):
                if count == 1 or here:
                    rates.setdefault(name, []).append(plainly(count, together, number))
            for name, count in zip(rates, (1, several), strict=False):
                own = replace(
                    config,
                    data=replace(config.data, max_images=count * pictures),
                    train=replace(config.train, num_workers=count, threads=threads),
                )
                rates[name].append(runs.through_ray(own, cores)[0])
        parts: dict[str, float] = {}
        if here:
            rendezvous = str(Path(local, "rendezvous-profile"))
            places = [plain.Place(rank, several, rendezvous) for rank in range(several)]
            parts = _all(spawned, config, shards, places, threads, profiled=True)[0][1]
    title = f"scale: shapes, {config.train.batch_size} pictures a step and worker" + (
        "" if gpus else f", {threads} thread(s) each, {cores} cores"
    )
    found = measuring.report("scale", title, "images", rates, "caption_ray, 1 worker")
    if parts:
        parts = {name: ms for name, ms in parts.items() if name not in train.BESIDE}
        told = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
        print(f"plain DDP, ms per picture of one process (other: waiting for each other): {told}")
    whole = {name: round(ms, 3) for name, ms in parts.items()}
    measuring.record({**found, "workers": several, "ddp_ms_per_image": whole})


def _all(
    spawned: list[ProcessPoolExecutor],
    config: Config,
    shards: str,
    places: list[plain.Place],
    threads: int,
    profiled: bool = False,
) -> list[tuple[float, dict[str, float]]]:
    """Run `plain.train` in each process at the same time; returns all results."""
    running = [
        process.submit(plain.train, config, shards, place, threads, runs.WARM_UP, profiled)
        for process, place in zip(spawned, places, strict=False)
    ]
    return [future.result() for future in running]


def _sum(found: list[tuple[float, dict[str, float]]]) -> float:
    """Pictures per second of all processes together."""
    return sum(rate for rate, _ in found)
