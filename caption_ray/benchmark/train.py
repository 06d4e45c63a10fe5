"""Training through Ray compared to a plain loop, and where the time of a step goes."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

from caption_ray.benchmark import measuring, plain, runs
from caption_ray.config import Count, Parallel, Uri

BESIDE = ("read", "decode", "batch")
"""Parts that the DataLoader's processes do meanwhile."""


@dataclass
class Train:
    """An epoch of `shapes` through Ray Train and Ray Data, compared to a plain loop with torch's
    DataLoader."""

    pictures: Count = 4096
    """Pictures per epoch."""
    storage: Uri | None = None
    """URI of a folder that all nodes reach, for pictures and checkpoints, which stay there; None: a
    temporary one on this machine."""
    num_cpus: Parallel | None = None
    """CPUs that Ray may use; None: all of this machine."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds of 1600 pictures."""


def run(options: Train) -> None:
    rounds, pictures = (2, 1600) if options.quick else (options.rounds, options.pictures)
    cores = options.num_cpus or len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {"plain loop": [], "caption_ray": []}
    shares: dict[str, list[float]] = {}
    with runs.folder(options.storage) as folder, runs.on_ray(cores), runs.processes(1) as spawned:
        config, shards = runs.prepared(folder, pictures)

        def plainly(profiled: bool = False) -> tuple[float, dict[str, float]]:
            place = plain.Place()
            arguments = (config, shards, place, cores, runs.WARM_UP, profiled)
            return spawned[0].submit(plain.train, *arguments).result()

        for _ in range(rounds):
            rates["plain loop"].append(plainly()[0])
            rate, waited = runs.through_ray(config, cores)
            rates["caption_ray"].append(rate)
            for what, share in waited.items():
                shares.setdefault(what, []).append(share)
        _, parts = plainly(profiled=True)
    batch = config.train.batch_size
    title = f"train: shapes, {pictures} pictures, {batch} a step, {cores} cores"
    found = measuring.report("train", title, "images", rates, "plain loop")
    told = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items() if part not in BESIDE)
    print(f"plain loop, ms per picture: {told}")
    told = ", ".join(f"{part} {parts[part]:.2f}" for part in BESIDE)
    print(f"meanwhile in its DataLoader, ms per picture: {told}")
    waits = {what: statistics.median(values) for what, values in shares.items()}
    told = ", ".join(f"{100 * share:.1f} % for {what}" for what, share in waits.items())
    print(f"caption_ray waits {told}")
    measuring.record({
        **found,
        "ms_per_image": {part: round(ms, 3) for part, ms in parts.items()},
        "waits": {what: round(share, 4) for what, share in waits.items()},
    })  # fmt: skip
