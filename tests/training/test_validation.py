"""What Ray Train runs on a checkpoint while training goes on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import ray

from caption_ray import storage
from caption_ray.captioning import checkpoint, metrics, ownership, run_folder
from caption_ray.data.dataset import open_shards
from caption_ray.evaluation import evaluate
from caption_ray.training import validation


@pytest.fixture
def saved(tiny_run, tmp_path):
    """The URI of the only checkpoint of a run, which waits for its validation."""
    run = str(tmp_path / "run")
    storage.upload(tiny_run, run)
    uri = run_folder.find(run)
    storage.write_bytes(storage.join(uri, run_folder.TO_VALIDATE), b"")
    return uri


def _validate(uri, shards, limit=None):
    known = SimpleNamespace(path=f"as/ray/knows/it/{storage.name(uri)}")
    run = storage.parent(uri)
    storage.write_bytes(storage.join(run, ownership.OWNER), b'{"id": "us"}')
    claim = ownership.Claim(run, "us")
    return validation.validate(known, claim, ray.put(open_shards(shards)), limit, threads=1)


def test_it_finds_what_the_evaluation_of_the_split_finds(saved, shards, local_ray):
    found = _validate(saved, shards)
    loaded = checkpoint.load(saved)
    search = loaded.search
    greedy = search.__class__(beam_size=1, max_length=search.max_length)
    records = evaluate.caption_split(
        loaded, open_shards(shards), "val", search=greedy, progress=False
    )
    expected = metrics.score(
        [record["caption"] for record in records], [record["references"] for record in records]
    ).corpus
    for name in validation.METRICS:
        assert found[f"val/{name}"] == pytest.approx(expected[name])


def test_what_it_found_lies_in_the_run_and_the_checkpoint_no_longer_waits(saved, shards, local_ray):
    found = _validate(saved, shards, limit=5)
    run, name = storage.parent(saved), storage.name(saved)
    assert run_folder.read_validations(run) == {name: found}
    assert run_folder.read_validations(run, {name}) == {}
    assert not storage.exists(storage.join(saved, run_folder.TO_VALIDATE))
    best = json.loads(storage.read_text(storage.join(run, "best.json")))
    assert best["checkpoint"] == name
    assert best["metrics"][run_folder.CRITERION] == found[run_folder.CRITERION]


def test_an_error_is_written_down_before_it_is_raised(saved, shards, local_ray):
    storage.write_bytes(storage.join(saved, checkpoint.MODEL), b"broken")
    with pytest.raises(checkpoint.CheckpointError):
        _validate(saved, shards)
    (report,) = run_folder.read_validations(storage.parent(saved)).values()
    assert "CheckpointError" in report["error"] and checkpoint.MODEL in report["error"]
    assert not storage.exists(storage.join(saved, run_folder.TO_VALIDATE))


def test_staleness_counts_validations_since_the_best():
    def history(*scores):
        return [{"step": 1.0, "train/loss": 2.0}, *({run_folder.CRITERION: s} for s in scores)]

    assert validation.stale(history()) == 0
    assert validation.stale(history(0.3)) == 0
    assert validation.stale(history(0.1, 0.3, 0.2)) == 1
    assert validation.stale(history(0.1, 0.3, 0.3, 0.2)) == 2  # no better is not better


def test_where_all_captions_score_the_same_staleness_counts_by_the_loss():
    def history(*found):
        """(CIDEr-D, loss) of each epoch; what a validation finds is noted in a later one."""
        epochs = [{"step": 8.0 * n, run_folder.LOSS: loss} for n, (_, loss) in enumerate(found)]
        noted = [
            {"step": 8.0 * n + 8, "val/step": 8.0 * n, run_folder.CRITERION: score}
            for n, (score, _) in enumerate(found)
        ]
        return epochs + noted

    constant = history((0.0, 3.0), (0.0, 2.0), (0.0, 2.5), (0.0, 2.1))
    assert validation.stale(constant) == 2
    assert validation.criterion(constant) == run_folder.LOSS
    telling = history((0.0, 3.0), (0.1, 2.0), (0.0, 1.0))
    assert validation.stale(telling) == 1
    assert validation.criterion(telling) == run_folder.CRITERION
    assert validation.criterion(history((0.0, 3.0))) == run_folder.CRITERION
