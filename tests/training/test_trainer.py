"""Whole runs on a local Ray: small, but real. Those that need several runs are slow."""

import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
from patience import wait_until
from tiny_runs import (
    latest_of,
    losses_of,
    tiny_config,
    training_workers,
    weights_of,
    without_dropout,
)

from caption_ray import storage
from caption_ray.captioning import checkpoint, ownership, run_folder
from caption_ray.data.ingest import ingest
from caption_ray.training import trainer

pytestmark = pytest.mark.usefixtures("local_ray")


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
    losses = losses_of(undisturbed)
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_run_is_not_resumed_with_another_model(undisturbed, shards):
    runs, name = undisturbed.run.rsplit("/", 1)
    changed = tiny_config(shards, runs, name)
    decoder = dataclasses.replace(changed.model.decoder, hidden_dim=24)
    changed = dataclasses.replace(
        changed, model=dataclasses.replace(changed.model, decoder=decoder)
    )
    with pytest.raises(ValueError, match=r"differs in model; give another --run\.name"):
        trainer.train(changed)


def test_a_run_is_not_resumed_with_averaged_weights_that_it_did_not_have(undisturbed, shards):
    runs, name = undisturbed.run.rsplit("/", 1)
    with pytest.raises(ValueError, match=r"differs in train\.ema-decay, which was 0\.0; give "):
        trainer.train(tiny_config(shards, runs, name, ema_decay=0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_workers": 9},
            r"num-workers is 9: 9 workers need 4\.5 CPUs, of which there are 4;",
        ),
        ({"num_workers": 2, "cpus_per_worker": 3}, "2 workers need 6 CPUs"),
        ({"num_workers": 9, "min_workers": 9}, "min-workers is 9: 9 workers need 4.5"),
        ({"num_workers": 2, "use_gpu": True}, "2 workers need 2 GPUs, of which there are 0"),
    ],
)
def test_more_workers_than_this_machine_can_have_are_refused(shards, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_config(shards, tmp_path, "large", **settings))
    assert not any(tmp_path.iterdir())


def test_decoding_on_a_gpu_needs_one_before_anything_is_written(shards, tmp_path):
    settings = tiny_config(shards, tmp_path, "none")
    data = dataclasses.replace(settings.data, decode="device")
    with pytest.raises(ValueError, match=r"--data\.decode is 'device': .*no GPU"):
        trainer.train(dataclasses.replace(settings, data=data))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_not_resumed_on_a_data_set_that_changed_under_its_uri(
    undisturbed, scenes, shards, tmp_path
):
    data, runs = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "runs"
    settings = tiny_config(str(data), runs, "again", epochs=1)
    trainer.train(settings)
    shutil.rmtree(data)
    # the same pictures and words, but picture 7 is another one than before
    ingest(
        str(scenes), str(data), image_size=None, images_per_shard=15, seed=1,
        splits=("train", "val"), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"differs in the data set, which changed since;"):
        trainer.train(settings)


@pytest.mark.slow
def test_two_workers_learn_like_one_with_twice_the_batch(two_workers, shards, tmp_path):
    one = trainer.train(without_dropout(tiny_config(shards, tmp_path, "one", batch_size=10)))
    # the two see the same pictures in an epoch, but not in the same steps
    np.testing.assert_allclose(losses_of(one), losses_of(two_workers), rtol=0.02)


@pytest.mark.slow
def test_an_averaged_run_that_stopped_goes_on_as_if_it_had_not(shards, tmp_path):
    recipe = {"ema_decay": 0.9, "scheduled_sampling": 0.5, "scheduled_sampling_epochs": 1,
              "label_smoothing": 0.1, "schedule": "constant", "checkpoint_every": 5}  # fmt: skip
    whole = trainer.train(tiny_config(shards, tmp_path, "whole", epochs=2, **recipe))
    trainer.train(tiny_config(shards, tmp_path, "parts", epochs=1, **recipe))
    parts = trainer.train(tiny_config(shards, tmp_path, "parts", epochs=2, **recipe))
    expected, weights = weights_of(latest_of(whole)), weights_of(latest_of(parts))
    for name, weight in expected.items():
        assert np.array_equal(weight, weights[name]), name
    steps = [point["step"] for point in parts.history if "val/loss" in point]
    assert steps == [8, 16], "the history of the first part was not kept"


@pytest.mark.slow
def test_the_self_critical_stage_goes_on_from_a_run(undisturbed, shards, tmp_path):
    stage = {"stage": "self-critical", "start_from": undisturbed.run, "epochs": 1}
    finished = trainer.train(tiny_config(shards, tmp_path, "second", **stage))
    assert any(0 <= point.get("train/reward", -1) <= 10 for point in finished.history)
    assert any("train/reward_wait_share" in point for point in finished.history)
    started, ended = checkpoint.load(undisturbed.checkpoint), checkpoint.load(latest_of(finished))
    assert ended.vocabulary.words == started.vocabulary.words
    assert ended.state.step == 8


def test_the_self_critical_stage_needs_a_captioner_like_its_own(undisturbed, shards, tmp_path):
    with pytest.raises(ValueError, match="name its run as --train.start-from"):
        trainer.train(tiny_config(shards, tmp_path, "alone", stage="self-critical"))
    settings = tiny_config(shards, tmp_path, "other", start_from=undisturbed.run)
    decoder = dataclasses.replace(settings.model.decoder, hidden_dim=24)
    other = dataclasses.replace(
        settings, model=dataclasses.replace(settings.model, decoder=decoder)
    )
    with pytest.raises(ValueError, match="decoder.hidden_dim 16 != 24"):
        trainer.train(other)


@pytest.mark.slow
def test_a_run_stops_when_its_captions_no_longer_improve(shards, tmp_path):
    rates = {"learning_rate": 1e-9, "encoder_learning_rate": 1e-9, "schedule": "constant"}
    finished = trainer.train(tiny_config(shards, tmp_path, "stale", epochs=12, patience=1, **rates))
    validated = [point for point in finished.history if "val/step" in point]
    assert 2 <= len(validated) < 12
    assert checkpoint.load(latest_of(finished)).state.epoch < 12


@pytest.mark.slow
def test_a_diverging_run_stops_and_says_where(shards, tmp_path):
    rates = {"learning_rate": 1e9, "encoder_learning_rate": 1e9}
    broken = tiny_config(shards, tmp_path, "broken", max_failures=0, **rates)
    with pytest.raises(trainer.RunError, match=r"not finite at step \d+ \(epoch 1\)"):
        trainer.train(broken)
    assert not storage.exists(storage.join(str(tmp_path), "broken", "latest.json"))


def _raw(shards, source, runs, name, **data):
    settings = tiny_config(shards, runs, name, epochs=1)
    changed = dataclasses.replace(settings.data, shards=None, source=str(source), **data)
    return dataclasses.replace(settings, data=changed)


def test_raw_pictures_train_without_ingest_and_a_few_bad_ones_are_skipped(scenes, shards, tmp_path):
    source = shutil.copytree(scenes, tmp_path / "source")
    sorted((source / "train").iterdir())[0].write_bytes(b"broken")
    finished = trainer.train(_raw(shards, source, tmp_path, "raw", max_bad_images=0.05))
    assert checkpoint.load(latest_of(finished)).state.step == 8
    assert [p["train/bad_images"] for p in finished.history if "train/bad_images" in p] == [1]


@pytest.mark.slow
def test_too_many_bad_pictures_stop_the_run_and_are_named(scenes, shards, tmp_path):
    source = shutil.copytree(scenes, tmp_path / "source")
    broken = sorted((source / "train").iterdir())[:3]
    for file in broken:
        file.write_bytes(b"broken")
    with pytest.raises(trainer.RunError, match="--data.max-bad-images 0.05") as error:
        trainer.train(_raw(shards, source, tmp_path, "bad", max_bad_images=0.05))
    assert all(file.name in str(error.value) for file in broken)


# Several starts of a run --------------------------------------------------------------------------


def _start(settings):
    """A training on another thread, and what becomes of it."""
    ended = []

    def train():
        try:
            ended.append(trainer.train(settings))
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    return thread, ended


@pytest.mark.slow
def test_a_run_that_goes_on_is_refused_to_a_second_start_until_that_takes_it_over(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.5)
    run = str(tmp_path / "shared")
    thread, ended = _start(tiny_config(shards, tmp_path, "shared", epochs=1000, max_failures=0))
    wait_until(lambda: run_folder.has_begun(run) or ended)
    second = tiny_config(shards, tmp_path, "shared", epochs=1)
    with pytest.raises(ValueError, match=rf"belongs to process {os.getpid()} on .*take-over"):
        trainer.train(second)
    assert thread.is_alive() and not ended
    epochs = checkpoint.read_state(run_folder.find(run, "latest")).epoch + 20
    second = tiny_config(shards, tmp_path, "shared", epochs=epochs)
    taking = dataclasses.replace(second.run, take_over=True)
    finished = trainer.train(dataclasses.replace(second, run=taking))
    thread.join(240)
    (error,) = ended
    assert isinstance(error, trainer.RunError)
    assert f"taken over by process {os.getpid()}" in str(error)
    assert checkpoint.load(latest_of(finished)).state.epoch == epochs
    checkpoint.load(run_folder.find(run))
    assert not storage.exists(storage.join(run, ownership.OWNER))
    assert not run_folder.read_config(run).run.take_over, "for the next start to inherit"


@pytest.mark.slow
def test_of_two_workers_one_that_cannot_go_on_ends_the_run_and_the_other(shards, tmp_path, capfd):
    rates = {"learning_rate": 1e9, "encoder_learning_rate": 1e9, "max_failures": 3}
    with pytest.raises(trainer.RunError, match="NonFiniteLoss"):
        trainer.train(tiny_config(shards, tmp_path, "diverges", num_workers=2, **rates))
    told = capfd.readouterr()
    assert "Traceback" not in told.out + told.err
    # Ray Train starts them once more, after which nobody waits for them
    wait_until(lambda: not list(training_workers()), 60, "the workers to end")


@pytest.mark.slow
def test_a_start_that_fails_or_was_killed_locks_nobody_out(shards, tmp_path, capfd):
    run = tmp_path / "again"
    rates = {"learning_rate": 1e9, "encoder_learning_rate": 1e9, "max_failures": 0}
    with pytest.raises(trainer.RunError):
        trainer.train(tiny_config(shards, tmp_path, "again", **rates))
    assert not (run / ownership.OWNER).exists()
    dead = dataclasses.replace(ownership._myself(None), id="dead", started=1.0)
    (run / ownership.OWNER).write_bytes(ownership._to_json(dead))
    capfd.readouterr()
    trainer.train(tiny_config(shards, tmp_path, "again", epochs=1))
    told = capfd.readouterr().out
    assert "Taking the run" in told and "Waiting up to" not in told
    assert not (run / ownership.OWNER).exists()


@pytest.mark.slow
def test_where_captions_say_nothing_the_validation_loss_decides(shards, tmp_path, capfd):
    """Of a single picture CIDEr-D is always 0."""
    settings = {"validation_images": 1, "epochs": 12, "keep_checkpoints": 1, "patience": 2}
    rates = {"learning_rate": 3e-2, "encoder_learning_rate": 3e-2, "schedule": "constant"}
    finished = trainer.train(tiny_config(shards, tmp_path, "mute", **settings, **rates))
    losses = {p["step"]: p["val/loss"] for p in finished.history if "val/loss" in p}
    validated = [p for p in finished.history if "val/step" in p]
    assert {p[run_folder.CRITERION] for p in validated} == {0.0}
    considered = {p["val/step"]: losses[p["val/step"]] for p in validated}
    best = checkpoint.read_state(finished.checkpoint)
    assert best.step == min(considered, key=considered.get)
    told = capfd.readouterr().out
    assert told.count("val/loss decides which checkpoint is the best") == 1
    if len(validated) < 12:
        assert "No better val/loss in 2 validations: stopping" in told
