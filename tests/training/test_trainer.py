"""Whole runs on a local Ray: small, but real."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from caption_ray import config, storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.data.ingest import ingest
from caption_ray.training import trainer

pytestmark = pytest.mark.usefixtures("local_ray")

KILLS = sorted(int(step) for step in np.random.default_rng(7).choice(22, 3, replace=False) + 1)
"""Steps of 24, three epochs, at which a worker is killed."""


def _config(shards, runs, name, **train):
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


def _weights(uri):
    return load_file(os.path.join(uri, checkpoint.MODEL))


def _latest(finished):
    return run_folder.find(finished.run, "latest")


def _losses(finished):
    """Of each validation."""
    return [point["val/loss"] for point in finished.history if "val/loss" in point]


def _workers():
    """The training workers of this process's Ray."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                yield process.pid
        except psutil.NoSuchProcess:
            pass


def _kill_a_worker_at(steps, pointer):
    """Send SIGKILL to a training worker each time that the run's newest checkpoint has reached the
    next of `steps`; returns the ids of those killed, and the thread that does it."""

    def reached(step):
        return pointer.exists() and json.loads(pointer.read_text())["step"] >= step

    def watch():
        for step in steps:
            while not (reached(step) and (alive := set(_workers()) - set(killed))):
                time.sleep(0.02)
            killed.append(min(alive))
            os.kill(killed[-1], signal.SIGKILL)

    killed: list[int] = []
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return killed, thread


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return trainer.train(_config(shards, runs, "undisturbed"))


def test_a_run_leaves_checkpoints_pointers_history_and_configuration(undisturbed):
    run = undisturbed.run
    kept = [name for name in storage.list_folders(run) if name.startswith(run_folder.PREFIX)]
    assert kept[-2:] == [run_folder.folder_name(n) for n in (16, 24)]
    assert json.loads(storage.read_text(storage.join(run, "latest.json")))["step"] == 24
    loaded = checkpoint.load(undisturbed.checkpoint)
    best = json.loads(storage.read_text(storage.join(run, "best.json")))
    scores = {p["val/step"]: p["val/CIDEr-D"] for p in undisturbed.history if "val/step" in p}
    assert list(scores) == [8, 16, 24], "each epoch was validated while training went on"
    assert best["metrics"]["val/CIDEr-D"] == max(scores.values()) == scores[loaded.state.step]
    assert json.loads(storage.read_text(storage.join(run, "config.json")))["train"]["epochs"] == 3
    steps = [point["step"] for point in undisturbed.history]
    assert steps == sorted(steps) and steps[-1] == 24
    for metric in ("loss", "loss_padded", "learning_rate", "grad_norm", "images_per_second",
                   "data_wait_share"):  # fmt: skip
        assert any(f"train/{metric}" in point for point in undisturbed.history)
    losses = _losses(undisturbed)
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_run_whose_worker_was_killed_thrice_ends_as_if_nothing_had_happened(
    undisturbed, shards, tmp_path
):
    # more often than max_failures in all, but each time the run had got further
    run = _config(shards, tmp_path, "killed", checkpoint_every=1, max_failures=1)
    killed, watcher = _kill_a_worker_at(KILLS, tmp_path / "killed" / "latest.json")
    finished = trainer.train(run)
    watcher.join(timeout=10)
    assert len(killed) == 3
    expected, weights = _weights(_latest(undisturbed)), _weights(_latest(finished))
    for name, weight in expected.items():
        assert np.array_equal(weight, weights[name]), name
    steps = [point["step"] for point in finished.history if "val/loss" in point]
    assert steps == [8, 16, 24]


def _without_dropout(settings):
    """Its draws differ between one worker and two."""
    decoder = dataclasses.replace(settings.model.decoder, dropout=0.0)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, decoder=decoder))


@pytest.fixture(scope="module")
def two_workers(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return trainer.train(_without_dropout(_config(shards, runs, "two", num_workers=2)))


def test_two_workers_of_which_one_is_killed_thrice_learn_from_every_picture_once(
    two_workers, shards, tmp_path
):
    settings = {"num_workers": 2, "checkpoint_every": 1, "keep_checkpoints": 100}
    killed, watcher = _kill_a_worker_at((1, 5, 10), tmp_path / "killed" / "latest.json")
    finished = trainer.train(_without_dropout(_config(shards, tmp_path, "killed", **settings)))
    watcher.join(timeout=10)
    assert len(killed) == 3
    for folder in sorted((tmp_path / "killed").glob(f"{run_folder.PREFIX}*/")):
        state = json.loads((folder / checkpoint.STATE).read_text())
        seen = np.load(folder / checkpoint.LEDGER).sum()
        assert state["pictures"] == state["epoch"] * 40 + seen
    assert (state["epoch"], state["pictures"]) == (3, 120)
    # the order in which they are learnt from differs after a restart, hence the tolerance
    np.testing.assert_allclose(_losses(two_workers), _losses(finished), rtol=0.03)


def test_a_run_is_not_resumed_with_another_model(undisturbed, shards):
    runs, name = undisturbed.run.rsplit("/", 1)
    changed = _config(shards, runs, name)
    decoder = dataclasses.replace(changed.model.decoder, hidden_dim=24)
    changed = dataclasses.replace(
        changed, model=dataclasses.replace(changed.model, decoder=decoder)
    )
    with pytest.raises(ValueError, match=r"differs in model; give another --run\.name"):
        trainer.train(changed)


def test_decoding_on_a_gpu_needs_one_before_anything_is_written(shards, tmp_path):
    settings = _config(shards, tmp_path, "none")
    data = dataclasses.replace(settings.data, decode="device")
    with pytest.raises(ValueError, match=r"--data\.decode is 'device': .*no GPU"):
        trainer.train(dataclasses.replace(settings, data=data))
    assert not any(tmp_path.iterdir())


def test_a_run_is_not_resumed_on_a_data_set_that_changed_under_its_uri(
    undisturbed, scenes, shards, tmp_path
):
    data, runs = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "runs"
    settings = _config(str(data), runs, "again", epochs=1)
    trainer.train(settings)
    shutil.rmtree(data)
    # the same pictures and words, but picture 7 is another one than before
    ingest(
        str(scenes), str(data), image_size=None, images_per_shard=15, seed=1,
        splits=("train", "val"), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"differs in the data set, which changed since;"):
        trainer.train(settings)


def test_two_workers_learn_like_one_with_twice_the_batch(two_workers, shards, tmp_path):
    one = trainer.train(_without_dropout(_config(shards, tmp_path, "one", batch_size=10)))
    # the two see the same pictures in an epoch, but not in the same steps
    np.testing.assert_allclose(_losses(one), _losses(two_workers), rtol=0.02)


def test_an_averaged_run_that_stopped_goes_on_as_if_it_had_not(shards, tmp_path):
    recipe = {"ema_decay": 0.9, "scheduled_sampling": 0.5, "scheduled_sampling_epochs": 1,
              "label_smoothing": 0.1, "schedule": "constant", "checkpoint_every": 5}  # fmt: skip
    whole = trainer.train(_config(shards, tmp_path, "whole", epochs=2, **recipe))
    trainer.train(_config(shards, tmp_path, "parts", epochs=1, **recipe))
    parts = trainer.train(_config(shards, tmp_path, "parts", epochs=2, **recipe))
    expected, weights = _weights(_latest(whole)), _weights(_latest(parts))
    for name, weight in expected.items():
        assert np.array_equal(weight, weights[name]), name
    steps = [point["step"] for point in parts.history if "val/loss" in point]
    assert steps == [8, 16], "the history of the first part was not kept"


def test_the_self_critical_stage_goes_on_from_a_run(undisturbed, shards, tmp_path):
    stage = {"stage": "self-critical", "start_from": undisturbed.run, "epochs": 1}
    finished = trainer.train(_config(shards, tmp_path, "second", **stage))
    assert any(0 <= point.get("train/reward", -1) <= 10 for point in finished.history)
    assert any("train/reward_wait_share" in point for point in finished.history)
    started, ended = checkpoint.load(undisturbed.checkpoint), checkpoint.load(_latest(finished))
    assert ended.vocabulary.words == started.vocabulary.words
    assert ended.state.step == 8


def test_the_self_critical_stage_needs_a_captioner_like_its_own(undisturbed, shards, tmp_path):
    with pytest.raises(ValueError, match="name its run as --train.start-from"):
        trainer.train(_config(shards, tmp_path, "alone", stage="self-critical"))
    settings = _config(shards, tmp_path, "other", start_from=undisturbed.run)
    decoder = dataclasses.replace(settings.model.decoder, hidden_dim=24)
    other = dataclasses.replace(
        settings, model=dataclasses.replace(settings.model, decoder=decoder)
    )
    with pytest.raises(ValueError, match="decoder.hidden_dim 16 != 24"):
        trainer.train(other)


def test_a_run_stops_when_its_captions_no_longer_improve(shards, tmp_path):
    rates = {"learning_rate": 1e-9, "encoder_learning_rate": 1e-9, "schedule": "constant"}
    finished = trainer.train(_config(shards, tmp_path, "stale", epochs=12, patience=1, **rates))
    validated = [point for point in finished.history if "val/step" in point]
    assert 2 <= len(validated) < 12
    assert checkpoint.load(_latest(finished)).state.epoch < 12


def test_a_diverging_run_stops_and_says_where(shards, tmp_path):
    rates = {"learning_rate": 1e30, "encoder_learning_rate": 1e30}
    broken = _config(shards, tmp_path, "broken", max_failures=0, **rates)
    with pytest.raises(trainer.RunError, match=r"not finite at step \d+ \(epoch 1\)"):
        trainer.train(broken)
    assert not storage.exists(storage.join(str(tmp_path), "broken", "latest.json"))


def _raw(shards, source, runs, name, **data):
    settings = _config(shards, runs, name, epochs=1)
    changed = dataclasses.replace(settings.data, shards=None, source=str(source), **data)
    return dataclasses.replace(settings, data=changed)


def test_raw_pictures_train_without_ingest_and_a_few_bad_ones_are_skipped(scenes, shards, tmp_path):
    source = shutil.copytree(scenes, tmp_path / "source")
    sorted((source / "train").iterdir())[0].write_bytes(b"broken")
    finished = trainer.train(_raw(shards, source, tmp_path, "raw", max_bad_images=0.05))
    assert checkpoint.load(_latest(finished)).state.step == 8
    assert [p["train/bad_images"] for p in finished.history if "train/bad_images" in p] == [1]


def test_too_many_bad_pictures_stop_the_run_and_are_named(scenes, shards, tmp_path):
    source = shutil.copytree(scenes, tmp_path / "source")
    broken = sorted((source / "train").iterdir())[:3]
    for file in broken:
        file.write_bytes(b"broken")
    with pytest.raises(trainer.RunError, match="--data.max-bad-images 0.05") as error:
        trainer.train(_raw(shards, source, tmp_path, "bad", max_bad_images=0.05))
    assert all(file.name in str(error.value) for file in broken)
