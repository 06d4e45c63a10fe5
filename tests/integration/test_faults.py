"""From ingest to serving on a storage that injects faults: the results are as without faults."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import boto3
import own_ray
import pytest
from fault_proxy import FAULTS, FaultProxy, table
from safetensors.numpy import load

from caption_ray import config, storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.data.dataset import open_source
from caption_ray.data.formats import find_splits
from caption_ray.data.ingest import ingest, read_index
from caption_ray.data.locations import read_picture
from caption_ray.evaluation.evaluate import caption_split
from caption_ray.training import trainer

RATES = {fault: 0.01 if fault in ("hang", "trickle") else 0.03 for fault in FAULTS}
"""Share of requests by fault, a quarter in total; those that cost a timeout are rarer."""

RAYS_OWN = r"checkpoint_manager_snapshot\.json|\.validate_storage_marker"
"""Files that Ray Train itself writes through pyarrow, whose failures are not ours to retry."""

TIMEOUT_S = 400
PICTURES = 24


@pytest.fixture(scope="module")
def road(s3, coco_mini):
    """(bucket with COCO's zips, proxy, executor with its own Ray behind the proxy)."""
    bucket = "road"
    boto3.client("s3").create_bucket(Bucket=bucket)
    for file in coco_mini.iterdir():
        if not file.name.startswith("test"):
            storage.write_bytes(f"s3://{bucket}/source/{file.name}", file.read_bytes())
    proxy = FaultProxy(s3.endpoint_url, trickle_s=0.5, spare=RAYS_OWN)
    proxy.report = {}
    with proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv(storage.READ_TIMEOUT_VARIABLE, "3")
        patch.setenv("RAY_ADDRESS", "local")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=own_ray.start) as executor:

            def run(function, *arguments, **options):
                return executor.submit(function, *arguments, **options).result(TIMEOUT_S)

            yield f"s3://{bucket}", proxy, run
        print(f"\nFaults injected into {proxy.requests} requests\n{table(proxy.report)}")
    boto3.resource("s3").Bucket(bucket).objects.all().delete()
    boto3.client("s3").delete_bucket(Bucket=bucket)


@pytest.fixture
def faults(road, request):
    """`with faults():` injects faults into what runs inside, and reports them afterwards."""
    _, proxy, _ = road

    class Faults:
        def __enter__(self):
            proxy.injected.clear()
            proxy.rates = RATES

        def __exit__(self, kind, *_):
            proxy.rates = {}
            step = request.node.name.split("_")[2]
            for fault in FAULTS:
                proxy.report.setdefault(fault, {})[step] = proxy.injected[fault]
            proxy.report.setdefault("completed", {})[step] = "no" if kind else "yes"
            if kind is None:
                assert proxy.injected.total() >= 10, "hardly a fault was injected"

    return Faults


def _ingest(road, out, **changes):
    bucket, _, run = road
    options = {"image_size": 96, "images_per_shard": 20, "seed": 0, "splits": ("train", "val")}
    out = storage.join(bucket, out)
    run(ingest, storage.join(bucket, "source"), out, **options, progress=False)
    return out


def _contents(uri):
    return {file[len(uri) :]: storage.read_bytes(file) for file in storage.list_files(uri)}


@pytest.fixture(scope="module")
def shards(road):
    return _ingest(road, "shards")


def _train(road, shards, name):
    bucket, _, run = road
    preset = config.shapes()
    small = {"embedding_dim": 8, "hidden_dim": 16, "attention_dim": 8}
    settings = dataclasses.replace(
        preset,
        data=dataclasses.replace(
            preset.data, shards=shards, captions_per_image=2, max_images=PICTURES
        ),
        model=dataclasses.replace(
            preset.model,
            encoder=dataclasses.replace(preset.model.encoder, image_size=32),
            decoder=dataclasses.replace(preset.model.decoder, **small),
        ),
        search=dataclasses.replace(preset.search, max_length=8),
        train=dataclasses.replace(
            preset.train, epochs=2, batch_size=8, cpus_per_worker=0.5, deterministic=True,
            validation_images=20, checkpoint_every=2, log_every=2, sample_captions=0,
        ),
        run=config.RunConfig(storage=storage.join(bucket, "runs"), name=name, tracker="none"),
    )  # fmt: skip
    return run(trainer.train, settings)


@pytest.fixture(scope="module")
def undisturbed(road, shards):
    return _train(road, shards, "undisturbed")


def test_an_ingest_through_faults_gives_the_same_bytes(road, shards, faults):
    with faults():
        out = _ingest(road, "disturbed")
    assert read_index(out).left_out == []
    assert _contents(out) == _contents(shards)


def test_a_run_through_faults_learns_the_same_from_every_picture(road, shards, undisturbed, faults):
    with faults():
        finished = _train(road, shards, "disturbed")
    found = [run_folder.find(one.run, "latest") for one in (undisturbed, finished)]
    assert [checkpoint.load(uri).state.step for uri in found] == [2 * PICTURES // 8] * 2
    first, second = (load(storage.read_bytes(f"{uri}/{checkpoint.MODEL}")) for uri in found)
    assert all((first[name] == second[name]).all() for name in first)
    bad = [point["train/bad_images"] for point in finished.history if "train/bad_images" in point]
    assert bad == [0, 0]


def test_an_evaluation_through_faults_gives_the_same_captions(road, undisturbed, faults):
    bucket, _, run = road
    # raw pictures, so that each takes a request
    dataset = run(open_source, storage.join(bucket, "source"), seed=0)
    uri = run_folder.find(undisturbed.run, "best")
    expected = run(caption_split, run(run_folder.load, uri), dataset, "val", progress=False)
    with faults():
        found = run(caption_split, run(run_folder.load, uri), dataset, "val", progress=False)
    captions = [[(r["file"], r["caption"], r["error"]) for r in rows] for rows in (expected, found)]
    assert captions[0] == captions[1] and len(captions[0]) == 79


def test_an_endpoint_starts_through_faults_and_captions_as_before(road, undisturbed, faults):
    bucket, _, run = road
    record = find_splits(storage.join(bucket, "source"), splits=("val",))["val"].records[0]
    picture = read_picture(record.location)
    expected = run(own_ray.serve_once, undisturbed.run, picture)
    with faults():
        assert run(own_ray.serve_once, undisturbed.run, picture) == expected
