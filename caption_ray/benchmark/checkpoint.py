"""What a checkpoint costs training if its upload runs in the background, and if training waits."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from caption_ray import config, storage
from caption_ray.benchmark import measuring
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.config import Count, Uri
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.training import loop


@dataclass
class Checkpoint:
    """A checkpoint's cost in training time: with none, asynchronous, and synchronous uploads."""

    preset: Literal["shapes", "coco"] = "shapes"
    """Preset whose captioner is trained, from random weights on random pictures."""
    storage: Uri | None = None
    """URI of a folder for the checkpoints, which stay there; None: a temporary one on this
    machine."""
    steps: Count = 24
    """Steps of each measurement, with one checkpoint after a third of them."""
    batch_size: Count = 32
    """Pictures per step."""
    rounds: Count = 5
    """Rounds of measurement."""
    quick: bool = False
    """Two rounds."""


def run(options: Checkpoint) -> None:
    with tempfile.TemporaryDirectory() as local:
        target = storage.join(storage.resolve(options.storage or local), "benchmark-checkpoints")
        _measure(options, Path(local), target)


def _measure(options: Checkpoint, local: Path, target: str) -> None:
    preset = config.shapes() if options.preset == "shapes" else config.coco()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = Vocabulary([f"word{number}" for number in range(9000)])
    torch.manual_seed(0)
    captioner = build_captioner(preset.model, len(vocabulary), None, pretrained=False).to(device)
    settings = preset.train
    optimizer = torch.optim.AdamW(
        captioner.parameter_groups(settings.learning_rate, settings.encoder_learning_rate, 0.0),
        fused=True,
    )
    rng = np.random.default_rng(0)
    size = preset.model.encoder.image_size
    example = loop.to_device(
        rng.integers(0, 256, (options.batch_size, size, size, 3), np.uint8),
        rng.integers(3, len(vocabulary), (options.batch_size, 5, 12), np.int32),
        size,
        device,
    )
    blocked: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    committed = 0

    def save() -> None:
        nonlocal committed
        committed += 1
        state = checkpoint.State(committed, 0, committed, {}, None)
        folder = local / f"saved-{committed}"
        extra = {"optimizer": optimizer.state_dict()}
        checkpoint.save(
            folder, captioner, vocabulary, preset.model, preset.search, state, extra,
            Ledger([500] * 240),
        )  # fmt: skip

        def commit() -> None:
            run_folder.commit(folder, target, state, keep=2)

        uploads.append(threading.Thread(target=commit))

    def steps(mode: str | None) -> float:
        for number in range(options.steps):
            loop.train_step(captioner, example, optimizer, replace(settings, accumulation=1))
            if mode is not None and number == options.steps // 3:
                measuring.synchronize()
                start = time.perf_counter()
                save()
                uploads[-1].start()
                if mode == "synchronous":
                    uploads[-1].join()
                blocked[mode].append(time.perf_counter() - start)
        return options.steps

    uploads: list[threading.Thread] = []
    seconds: dict[str, list[float]] = {"none": [], **{mode: [] for mode in blocked}}
    rounds = 2 if options.quick else options.rounds
    for number in range(1 + rounds):
        for mode, found in seconds.items():
            rate = measuring.in_turn({mode: lambda: steps(None if mode == "none" else mode)}, 1, 0)  # noqa: B023
            for upload in uploads:  # its effect on later steps is not measured
                upload.join()
            if number > 0:
                found.append(options.steps / rate[mode][0])
    weights = sum(file.stat().st_size for file in (local / "saved-1").iterdir()) / 2**20
    step = statistics.median(seconds["none"]) / options.steps
    interval = settings.checkpoint_seconds or 600.0
    print(f"\n{options.preset}: a checkpoint of {weights:.0f} MiB, a step of {step:.3f} s; cost of "
          f"one every {interval:.0f} s (--train.checkpoint-seconds)")  # fmt: skip
    print(f"{'':14}{'training waits, s':>20}{'total cost, s':>20}{'% of step time':>18}")
    ways = {}
    for mode in blocked:
        costs = [a - b for a, b in zip(seconds[mode], seconds["none"], strict=True)]
        share = 100 * statistics.median(costs) / interval
        waits = blocked[mode][1:]
        print(f"{mode:14}{measuring.spread(waits, '.2f'):>20}"
              f"{measuring.spread(costs, '.2f'):>20}{share:18.2f}")  # fmt: skip
        ways[mode] = {
            "waits_s": round(statistics.median(waits), 3),
            "costs_s": round(statistics.median(costs), 3),
            "percent": round(share, 3),
        }
    measuring.record({"section": "checkpoint", "preset": options.preset, "ways": ways})
