"""Features instead of pictures: the same training, and never stale ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from caption_ray import config, storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.data import feature_shards
from caption_ray.data.dataset import FeatureFile, ShardFile, open_shards
from caption_ray.data.pipeline import batches
from caption_ray.data.plan import plan_epoch
from caption_ray.data.preparation import Preparation
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.encoder import build_encoder, to_tensor
from caption_ray.training import feature_cache, trainer

pytestmark = pytest.mark.usefixtures("local_ray")

ENCODER = config.EncoderConfig(name="small", weights="none", trainable_from="all", image_size=32)
WHOLE = {"train": None, "val": None}


def _encoder(seed=0, **changes):
    chosen = dataclasses.replace(ENCODER, **changes)
    torch.manual_seed(seed)
    return build_encoder(chosen, None).eval(), chosen


def _cached(dataset, limits=WHOLE, seed=0, **changes):
    encoder, chosen = _encoder(seed, **changes)
    return feature_cache.with_features(dataset, encoder, chosen, limits=limits, progress=False)


@pytest.fixture(scope="module")
def dataset(shards, tmp_path_factory):
    """The shards in a folder where features may lie, too."""
    own = tmp_path_factory.mktemp("own")
    storage.upload(Path(shards), str(own))
    return open_shards(str(own))


@pytest.fixture(scope="module")
def cached(dataset):
    """The same with features, of the first shard only and then of all."""
    some = _cached(dataset, {"train": 10, "val": None})
    first = [type(unit) for unit in some.splits["train"]]
    assert first == [FeatureFile, ShardFile, ShardFile]
    return _cached(dataset)


def _folder(dataset):
    (folder,) = storage.list_folders(storage.join(dataset.uri, "features"))
    return Path(dataset.uri, "features", folder)


def _batches(dataset, prepare):
    slices = plan_epoch(dataset.rows("train"), rank=0, world_size=1, shuffle=(0, 1))
    units = dataset.splits["train"]
    return list(batches(units, slices, prepare, batch_size=8, cpus=2, keep_order=True))


def test_what_is_written_is_read_back():
    rng = np.random.default_rng(0)
    regions = rng.normal(size=(3, 4, 5)).astype(np.float16)
    captions = [["a dog", "ein Hünd"], [], ["x"]]
    data = feature_shards.to_bytes(
        regions, np.array([7, 8, 9]), captions, ["", "", "b.jpg: corrupt"]
    )
    rows = feature_shards.from_bytes(data)
    assert np.array_equal(np.stack([row["regions"] for row in rows]), regions)
    assert [row["captions"] for row in rows] == captions
    assert [row["image_id"] for row in rows] == [7, 8, 9]
    assert [row["error"] for row in rows] == [None, None, "b.jpg: corrupt"]
    assert rows[0]["regions"].base is not None, "a view, not a copy"


def test_batches_hold_the_encoders_own_output(dataset, cached):
    assert all(isinstance(u, FeatureFile) for split in cached.splits.values() for u in split)
    vocabulary = Vocabulary.from_counts(dataset.word_counts, 1, None)
    data = dataclasses.replace(config.shapes().data, captions_per_image=2)
    prepare = Preparation(ENCODER, data, vocabulary, (0, 1), with_captions=True)
    encoder, _ = _encoder()
    seen = 0
    for pictures, known in zip(_batches(dataset, prepare), _batches(cached, prepare), strict=True):
        assert known.inputs.dtype == np.float16
        with torch.inference_mode():
            expected = encoder(to_tensor(pictures.inputs)).numpy()
        np.testing.assert_allclose(known.inputs, expected, rtol=1e-3, atol=1e-4)
        assert np.array_equal(known.tokens, pictures.tokens)
        assert np.array_equal(known.numbers, pictures.numbers)
        assert np.array_equal(known.image_ids, pictures.image_ids)
        assert known.captions == pictures.captions
        seen += len(known.numbers)
    assert seen == 40


def test_features_are_made_once(dataset, cached, monkeypatch):
    monkeypatch.setattr(feature_cache, "_encode", lambda *_: pytest.fail("encoded again"))
    assert _cached(dataset).splits == cached.splits


def test_whatever_features_depend_on_gives_them_another_folder(dataset):
    def key(dataset, seed=0, **changes):
        return feature_cache._key(feature_cache._about(dataset, *_encoder(seed, **changes)))

    (unit,) = dataset.splits["val"]
    shard = dataclasses.replace(unit.shard, checksum="0" * 64)
    other_pictures = dataclasses.replace(
        dataset, splits={**dataset.splits, "val": [ShardFile(unit.uri, shard)]}
    )
    keys = [
        key(dataset),
        key(dataset, seed=1),
        key(dataset, image_size=48),
        key(dataset, image_fit="crop"),
        key(dataset, grid=1),
        key(other_pictures),
        key(dataclasses.replace(dataset, digest="another order")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(dataset) == keys[0]
    # which says how it trains, not what it makes of a picture
    assert key(dataset, batch_norm="train") == keys[0]


def test_a_job_that_died_is_completed_byte_for_byte(dataset, cached):
    whole = {file: file.read_bytes() for file in _folder(dataset).rglob("*") if file.is_file()}
    receipts = sorted(_folder(dataset).glob("train/*.json"))
    receipts[1].unlink()  # killed between a shard and its receipt
    receipts[2].unlink()  # and before another shard
    next(_folder(dataset).glob("train/00002-*.arrow")).unlink()
    assert _cached(dataset).splits == cached.splits
    assert {file: file.read_bytes() for file in whole} == whole


def test_a_damaged_feature_shard_is_named(cached, tmp_path):
    unit = cached.splits["val"][0]
    data = bytearray(Path(unit.uri).read_bytes())
    data[len(data) // 2] ^= 1
    damaged = dataclasses.replace(unit, uri=str(tmp_path / "damaged.arrow"))
    Path(damaged.uri).write_bytes(bytes(data))
    with pytest.raises(storage.DamagedError, match=r"damaged\.arrow.*delete it"):
        damaged.read()


def test_features_that_float16_cannot_hold_are_refused(dataset):
    encoder, chosen = _encoder()
    with torch.no_grad():
        encoder.std.fill_(1e-9)
    with pytest.raises(ValueError, match="not finite in float16"):
        feature_cache.with_features(dataset, encoder, chosen, limits={"val": None}, progress=False)


def test_ingest_makes_the_features_that_training_reads(dataset, tmp_path, monkeypatch):
    encoder, chosen = _encoder(seed=3)
    file = str(tmp_path / "backbone.pth")
    torch.save(encoder.backbone.state_dict(), file)
    frozen = dataclasses.replace(chosen, weights=file, trainable_from="none")
    assert feature_cache.encode_shards(dataset.uri, frozen) == {"train": 40, "val": 12}
    monkeypatch.setattr(feature_cache, "_encode", lambda *_: pytest.fail("encoded again"))
    run = _config(dataset.uri, tmp_path, "run", None)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, encoder=frozen))
    assert feature_cache.is_wanted(run)
    known = trainer._with_features(run, dataset, 10, None)
    assert all(isinstance(unit, FeatureFile) for unit in known.splits["train"])


def test_features_of_random_weights_are_refused(dataset):
    with pytest.raises(ValueError, match="--encoder.weights is 'none'"):
        feature_cache.encode_shards(dataset.uri, ENCODER)


# Training -------------------------------------------------------------------------------------


def _config(shards, runs, name, start, **changes):
    preset = config.shapes()
    data = {"shards": shards, "captions_per_image": 2, **changes.pop("data", {})}
    train = {
        "epochs": 2,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 4,
        "log_every": 3,
        "cpus_per_worker": 0.5,
        "deterministic": True,
        "sample_captions": 2,
        "start_from": start,
        **changes,
    }
    encoder = dataclasses.replace(preset.model.encoder, image_size=32, trainable_from="none")
    decoder = dataclasses.replace(
        preset.model.decoder, embedding_dim=8, hidden_dim=16, attention_dim=8, dropout=0.0
    )
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, **data),
        model=config.ModelConfig(encoder, decoder),
        train=dataclasses.replace(preset.train, **train),
        run=config.RunConfig(storage=str(runs), name=name, tracker="none"),
    )


def _losses(finished):
    return [point["val/loss"] for point in finished.history if "val/loss" in point]


def _weights(finished):
    return load_file(Path(run_folder.find(finished.run, "latest"), checkpoint.MODEL))


@pytest.fixture(scope="module")
def run_on_features(dataset, tiny_run, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    settings = {"checkpoint_every": 3, "keep_checkpoints": 100}
    return trainer.train(_config(dataset.uri, runs, "features", tiny_run, **settings))


@pytest.mark.slow
def test_training_from_features_is_training_from_pictures(
    dataset, tiny_run, run_on_features, tmp_path
):
    off = _config(dataset.uri, tmp_path, "pictures", tiny_run, data={"features": "off"})
    pictures = trainer.train(off)
    # float16's rounding
    np.testing.assert_allclose(_losses(run_on_features), _losses(pictures), rtol=2e-3)
    expected, weights = _weights(pictures), _weights(run_on_features)
    for name, weight in expected.items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-3, err_msg=name)
    frozen = [name for name in expected if name.startswith("encoder.")]
    assert frozen and all(np.array_equal(weights[name], expected[name]) for name in frozen)


@pytest.mark.slow
def test_a_run_on_features_goes_on_within_an_epoch(dataset, tiny_run, run_on_features, tmp_path):
    storage.upload(Path(run_on_features.run), str(tmp_path / "cut"))
    for folder in (tmp_path / "cut").glob(f"{run_folder.PREFIX}*"):  # it died in step 10 of 16
        if run_folder.step_of(folder.name) > 9:
            storage.delete(str(folder))
    pointer = tmp_path / "cut" / "latest.json"
    at = {"checkpoint": run_folder.folder_name(9), "step": 9}
    pointer.write_text(json.dumps({**json.loads(pointer.read_text()), **at}))
    resumed = trainer.train(_config(dataset.uri, tmp_path, "cut", tiny_run))
    expected, weights = _weights(run_on_features), _weights(resumed)
    assert all(np.array_equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("encoder", "data", "reason"),
    [
        ({"trainable_from": "stage4"}, {}, "the encoder trains .*trainable-from stage4"),
        ({}, {"flip": True}, "--data.no-flip turns that off"),
        ({}, {"min_crop": 0.8}, "--data.min-crop 0.8"),
        ({}, {"shards": None, "source": "somewhere"}, "no digests"),
    ],
)
def test_features_that_would_differ_from_pictures_are_refused_or_not_used(encoder, data, reason):
    def chosen(features, epochs=2):
        base = _config("shards", "runs", "x", "start", epochs=epochs, data={**data})
        return dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, features=features),
            model=dataclasses.replace(
                base.model, encoder=dataclasses.replace(base.model.encoder, **encoder)
            ),
        )

    with pytest.raises(ValueError, match=rf"--data.features is 'on', but .*{reason}"):
        feature_cache.is_wanted(chosen("on"))
    assert not feature_cache.is_wanted(chosen("auto"))
    assert not feature_cache.is_wanted(chosen("off"))


def test_features_are_used_by_themselves_where_they_pay():
    plain = _config("shards", "runs", "x", "start")
    assert feature_cache.is_wanted(plain)
    once = dataclasses.replace(plain, train=dataclasses.replace(plain.train, epochs=1))
    assert not feature_cache.is_wanted(once)
    assert feature_cache.is_wanted(config.seed())
    for ingested in (False, True):
        data = dataclasses.replace(config.seed().data, source="my-pictures", ingest=ingested)
        of_folder = dataclasses.replace(config.seed(), data=data)
        assert feature_cache.is_wanted(of_folder) == ingested
    assert feature_cache.is_wanted(config.coco_self_critical())
    assert not feature_cache.is_wanted(config.coco())
    assert not feature_cache.is_wanted(config.shapes())
