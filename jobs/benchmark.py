"""Measure caption_ray side by side with simpler ways to do the same, in one run on one machine.

Each section prints a table of ratios to baselines that are measured in turn with it, and one line
of JSON. `--quick` takes a minute or two, the full measurement several times that.
"""

import os

# before torch is loaded: its threads must not spin while other processes want the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from caption_ray import command
from caption_ray.benchmark import (
    cache,
    checkpoint,
    decode,
    epochs,
    memory,
    model,
    pipeline,
    scale,
    search,
    serve,
    train,
)
from caption_ray.config import parse_arguments

SECTIONS = {
    "decode": (decode.Decode, decode.run),
    "pipeline": (pipeline.Pipeline, pipeline.run),
    "model": (model.Model, model.run),
    "train": (train.Train, train.run),
    "scale": (scale.Scale, scale.run),
    "cache": (cache.Cache, cache.run),
    "search": (search.Search, search.run),
    "serve": (serve.Serve, serve.run),
    "checkpoint": (checkpoint.Checkpoint, checkpoint.run),
    "epochs": (epochs.Epochs, epochs.run),
    "memory": (memory.Memory, memory.run),
}


def main() -> None:
    kinds = {name: kind for name, (kind, _) in SECTIONS.items()}
    options = parse_arguments(kinds, description=__doc__)
    for kind, run in SECTIONS.values():
        if isinstance(options, kind):
            run(options)  # type: ignore[operator]


if __name__ == "__main__":
    command.run(main)
