import dataclasses
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.data import ExecutionResources

from caption_ray import config, ray_internals, storage
from caption_ray.data import shards as shard_format
from caption_ray.data import transforms
from caption_ray.data.dataset import ShardFile, open_shards, open_source
from caption_ray.data.pipeline import batches
from caption_ray.data.plan import ShardSlice, plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.read_tasks import _read_slice
from caption_ray.data.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("local_ray")


def _preparation(dataset, augment=None, **changes):
    preset = config.shapes()
    return Preparation(
        dataclasses.replace(preset.model.encoder, image_size=48),
        dataclasses.replace(preset.data, **{"captions_per_image": 5, **changes}),
        Vocabulary.from_counts(dataset.word_counts, 1, None),
        augment,
    )


def _epoch(dataset, split="train", *, rank=0, world_size=1, shuffle=(0, 0), threads=0, **changes):
    slices = plan_epoch(dataset.rows(split), rank=rank, world_size=world_size, shuffle=shuffle)
    prepare = _preparation(dataset, shuffle, **changes)
    return list(
        batches(
            dataset.splits[split],
            slices,
            prepare,
            batch_size=8,
            cpus=2,
            keep_order=True,
            decode_threads=threads,
        )
    )


def _numbers(epoch):
    return [int(number) for batch in epoch for number in batch.numbers]


def test_every_picture_exactly_once_over_two_workers(shards):
    dataset = open_shards(shards)
    shares = [_epoch(dataset, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(_numbers(shares[0]) + _numbers(shares[1])) == list(range(40))
    for share in shares:
        assert [len(batch.numbers) for batch in share] == [8, 8, 4]


def test_order_follows_the_plan_and_changes_with_the_epoch(shards):
    dataset = open_shards(shards)
    planned = [
        shard_slice.first + int(row)
        for shard_slice in plan_epoch(dataset.rows("train"), rank=0, world_size=1, shuffle=(0, 1))
        for row in shard_slice.rows
    ]
    assert _numbers(_epoch(dataset, shuffle=(0, 1))) == planned
    assert _numbers(_epoch(dataset, shuffle=(0, 2))) != planned


def test_batches_hold_the_pictures_and_captions_of_their_rows(shards, scenes):
    dataset = open_shards(shards)
    rows = [row for unit in dataset.splits["val"] for row in unit.read()]
    vocabulary = Vocabulary.from_counts(dataset.word_counts, 1, None)
    seen = 0
    for batch in _epoch(dataset, "val", shuffle=None):
        assert batch.inputs.dtype == np.uint8 and batch.inputs.shape[1:] == (48, 48, 3)
        assert batch.tokens.dtype == np.int32 and batch.tokens.shape[1:] == (5, 40)
        for image, tokens, number in zip(batch.inputs, batch.tokens, batch.numbers, strict=True):
            row = rows[number]
            file = Path(scenes, "val", row["file_name"])
            square = transforms.fit(transforms.decode(file.read_bytes()), 48, "stretch")
            assert np.array_equal(image, square)
            assert [vocabulary.decode(line) for line in tokens.tolist()] == row["captions"]
            seen += 1
    assert seen == 12


def test_raw_pictures_stream_like_shards(shards, scenes):
    raw, sharded = open_source(str(scenes), seed=0), open_shards(shards)
    assert raw.word_counts == sharded.word_counts
    pictures = [
        {
            int(image_id): (image.tobytes(), tokens.tobytes())
            for batch in _epoch(dataset, "val", shuffle=None)
            for image_id, image, tokens in zip(
                batch.image_ids, batch.inputs, batch.tokens, strict=True
            )
        }
        for dataset in (raw, sharded)
    ]
    assert len(pictures[0]) == 12
    assert pictures[0] == pictures[1]


def test_near_and_far_decoding_give_the_same_batches(shards):
    dataset = open_shards(shards)
    changes = {"min_crop": 0.5, "flip": True, "captions_per_image": 2}
    far, near = (_epoch(dataset, shuffle=(0, 3), threads=n, **changes) for n in (0, 2))
    for one, other in zip(far, near, strict=True):
        for name in ("inputs", "tokens", "numbers", "image_ids"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert one.errors == other.errors and one.captions == other.captions


def test_a_reader_that_stops_early_leaves_no_decoding_threads(shards):
    dataset = open_shards(shards)
    slices = plan_epoch(dataset.rows("train"), rank=0, world_size=1, shuffle=None)
    prepare, settings = _preparation(dataset), {"batch_size": 4, "cpus": 1, "keep_order": True}
    stream = batches(dataset.splits["train"], slices, prepare, **settings, decode_threads=2)
    assert len(next(stream).inputs) == 4
    stream.close()
    left = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    for thread in left:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.parametrize("threads", [0, 2], ids=["far", "near"])
def test_unreadable_raw_pictures_are_named_and_weigh_nothing(scenes, tmp_path, threads):
    source = shutil.copytree(scenes, tmp_path / "source")
    files = sorted((source / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"no picture")
    epoch = _epoch(open_source(str(source), seed=0), threads=threads)
    assert sorted(_numbers(epoch)) == list(range(40))
    errors = sorted(error for batch in epoch for error in batch.errors)
    assert [error.split(":")[0] for error in errors] == [files[0].name, files[1].name]
    blank = [t for b in epoch for t in b.tokens if not t.any()]
    assert len(blank) == 2


def test_a_shard_that_is_not_what_the_index_names_stops_the_epoch(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    shard = sorted((copy / "train").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(Exception, match=r"parquet: .* not what the index names"):
        _epoch(open_shards(str(copy)))


def test_more_captions_than_places_are_drawn_anew_each_epoch(shards):
    dataset = open_shards(shards)

    def chosen(epoch):
        return {
            int(number): tokens.tobytes()
            for batch in _epoch(dataset, shuffle=(0, epoch), captions_per_image=2)
            for number, tokens in zip(batch.numbers, batch.tokens, strict=True)
        }

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


def test_augmentation_is_a_function_of_seed_epoch_and_picture(shards):
    dataset = open_shards(shards)

    def images(epoch, **changes):
        return {
            int(number): image.tobytes()
            for batch in _epoch(dataset, shuffle=(0, epoch), min_crop=0.5, **changes)
            for number, image in zip(batch.numbers, batch.inputs, strict=True)
        }

    assert images(0) == images(0)
    assert images(0) != images(1)


def test_a_split_that_is_not_there_names_those_that_are(shards):
    with pytest.raises(ValueError, match=r"no split 'test'; it has train, val"):
        open_shards(shards).rows("test")


def test_no_index_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"index\.json: no index.*jobs/ingest\.py --out"):
        open_shards(str(tmp_path))
    storage.write_bytes(str(tmp_path / "index.json"), b'{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        open_shards(str(tmp_path))


def test_ray_data_does_not_spin_while_the_reader_has_enough(monkeypatch):
    steps = []
    pause = ray_internals.UnhurriedExecution.on_execution_step

    def noted(self, executor):
        pause(self, executor)
        steps.append(time.monotonic())

    monkeypatch.setattr(ray_internals.UnhurriedExecution, "on_execution_step", noted)
    context = ray.data.DataContext.get_current().copy()
    limits = ExecutionResources.for_limits(cpu=1, object_store_memory=40e6)
    context.execution_options.resource_limits = limits
    blocks = 40
    with ray.data.DataContext.current(context):
        dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
            lambda rows: {"image": np.zeros((50, 300_000), np.uint8)}, batch_size=None
        )
        seen = 0
        for batch in dataset.iter_batches(batch_size=64):
            seen += len(batch["image"])
            time.sleep(0.1)  # a training step
    assert seen == 50 * blocks
    pauses = (steps[-1] - steps[0]) / ray_internals.DATA_STEP_SECONDS
    assert pauses > 50, "it was over before it could spin"
    assert len(steps) < pauses + 5 * blocks


def test_reading_for_near_decoding_loads_no_torch(shards):
    """Each read task's process would take 250 MiB more, and a second longer to start."""
    dataset = open_shards(shards)
    unit, prepare = dataset.splits["val"][0], ray.put(_preparation(dataset))

    @ray.remote(runtime_env={"env_vars": {"A_PROCESS": "of its own"}})
    def read(prepare):
        shard_slice = ShardSlice(0, np.arange(unit.rows), 0)
        rows = sum(len(block) for block in _read_slice(unit, shard_slice, *prepare, False, 4))
        return rows, sorted({"torch", "pyarrow"} & set(sys.modules))

    assert ray.get(read.remote([prepare])) == (unit.rows, ["pyarrow"])


def test_reading_does_not_run_far_ahead_of_a_slow_trainer(shards, tmp_path):
    dataset = open_shards(shards)
    row = dataset.splits["train"][0].read()[0]
    row["image"] += bytes(4 * 2**20)  # decoders do not mind what follows a picture
    data = shard_format.to_bytes([row] * 8)
    units = []
    for number in range(24):  # 800 MB
        file = tmp_path / f"{number}.parquet"
        file.write_bytes(data)
        shard = shard_format.Shard(file.name, 8, len(data), storage.checksum(data))
        units.append(ShardFile(str(file), shard))
    slices = plan_epoch([unit.rows for unit in units], rank=0, world_size=1, shuffle=(0, 0))

    def in_store():
        return (
            ray.cluster_resources()["object_store_memory"]
            - ray.available_resources()["object_store_memory"]
        )

    before = in_store()
    stream = batches(
        units, slices, _preparation(dataset), batch_size=8, cpus=2, keep_order=True,
        decode_threads=2,
    )  # fmt: skip
    seen, most = len(next(stream).numbers), 0
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        most = max(most, in_store() - before)
        time.sleep(0.2)
    assert most < 400 * 2**20
    assert seen + sum(len(batch.numbers) for batch in stream) == 8 * 24
