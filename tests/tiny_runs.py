"""Runs of the tiny captioner that tests train: seconds each, but real."""

import dataclasses
import os

import psutil
from safetensors.numpy import load_file

from caption_ray import config
from caption_ray.captioning import checkpoint, run_folder


def tiny_config(shards, runs, name, **train):
    preset = config.shapes()
    defaults = {
        "epochs": 3,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "encoder_learning_rate": 1e-3,
        "warmup_steps": 4,
        "log_every": 3,
        "cpus_per_worker": 0.5,
        "deterministic": True,
        "sample_captions": 2,
    }
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, shards=shards, captions_per_image=2),
        model=dataclasses.replace(
            preset.model,
            encoder=dataclasses.replace(preset.model.encoder, image_size=32),
            decoder=dataclasses.replace(
                preset.model.decoder, embedding_dim=8, hidden_dim=16, attention_dim=8
            ),
        ),
        train=dataclasses.replace(preset.train, **{**defaults, **train}),
        run=config.RunConfig(storage=str(runs), name=name, tracker="none"),
    )


def weights_of(uri):
    return load_file(os.path.join(uri, checkpoint.MODEL))


def latest_of(finished):
    return run_folder.find(finished.run, "latest")


def losses_of(finished):
    """Of each validation."""
    return [point["val/loss"] for point in finished.history if "val/loss" in point]


def without_dropout(settings):
    """Its draws differ between one worker and two."""
    decoder = dataclasses.replace(settings.model.decoder, dropout=0.0)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, decoder=decoder))


def training_workers():
    """The process ids of the training workers of this process's Ray."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                yield process.pid
        except psutil.NoSuchProcess:
            pass
