"""The plain loop that training through Ray is compared to does the same work."""

import dataclasses

import pytest

from caption_ray import config
from caption_ray.benchmark import plain, runs
from caption_ray.data.dataset import open_shards
from caption_ray.data.plan import plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.vocabulary import Vocabulary


def _tiny(batch_size):
    preset = config.shapes()
    encoder = dataclasses.replace(preset.model.encoder, image_size=32)
    decoder = dataclasses.replace(
        preset.model.decoder, embedding_dim=8, hidden_dim=16, attention_dim=8
    )
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, encoder=encoder, decoder=decoder),
        train=dataclasses.replace(preset.train, batch_size=batch_size),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loader_brings_every_picture_once_as_ours_prepares_it(shards, workers):
    dataset, settings = open_shards(shards), _tiny(7)
    units = dataset.splits["train"]
    slices = plan_epoch([unit.rows for unit in units], rank=0, world_size=1, shuffle=(0, 0))
    words = Vocabulary.from_counts(dataset.word_counts, 1, None)
    prepare = Preparation(settings.model.encoder, settings.data, words, (0, 0))
    epoch = plain.Epoch(units, slices, prepare)
    expected = sorted(
        prepare(row, shard_slice.first + int(number))["inputs"].tobytes()
        for shard_slice in slices
        for number, row in zip(shard_slice.rows, epoch.read(shard_slice), strict=True)
    )
    found = [
        image.numpy().tobytes()
        for images, tokens in plain.Shards(epoch, 7).loader(workers)
        for image in images
    ]
    assert sorted(found) == expected


def test_the_parts_of_a_step_are_the_whole_of_it(shards):
    rate, parts = plain.train(_tiny(4), shards, plain.Place(), 1, warm_up=2, profiled=True)
    during = {part: ms for part, ms in parts.items() if part not in ("read", "decode", "batch")}
    assert set(during) == {"wait", "transfer", "forward", "backward", "optimizer", "other"}
    assert sum(during.values()) == pytest.approx(1000 / rate, rel=0.02)
    assert all(parts[part] > 0 for part in ("read", "decode", "batch"))


def test_all_reduce_is_what_it_adds_to_a_backward_pass():
    laps = plain.Laps()
    laps.of.update({"forward": 3.0, "backward": 2.0, plain.SHARED_BACKWARD: 9.0})
    assert laps.per_picture(images=1000, all_reduced=600) == {
        "forward": 3.0, "backward": 5.0, "all-reduce": 10.0
    }  # fmt: skip


@pytest.mark.slow
def test_processes_that_train_together_tell_what_their_all_reduce_took(shards, tmp_path):
    rendezvous = str(tmp_path / "rendezvous")
    with runs.processes(2) as processes:
        running = [
            process.submit(
                plain.train, _tiny(4), shards, plain.Place(rank, 2, rendezvous), 1, 1, True
            )
            for rank, process in enumerate(processes)
        ]
        for future in running:
            rate, parts = future.result(120)
            assert rate > 0 and parts["backward"] > 0
            assert {"wait", "transfer", "forward", "optimizer", "other", "all-reduce"} < set(parts)
