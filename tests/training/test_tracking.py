import json
import struct

import numpy as np
import pytest

from caption_ray import config
from caption_ray.training import tracking

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)


BLOCK, FULL, LAST = 32 * 1024, 1, 4


def _settings(tracker):
    preset = config.shapes()
    return config.Config(
        data=preset.data, model=preset.model, run=config.RunConfig(tracker=tracker, name="a-run")
    )


def _records(folder):
    """What the offline files hold: protocol buffers in LevelDB's log format, behind a header."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.rglob("*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = BLOCK - at % BLOCK
            if left < 7:  # the rest of a block that is too short for a record's header
                at += left
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (FULL, LAST):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def _history(folder):
    for record in _records(folder):
        if record.HasField("history"):
            yield {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }


def test_wandb_offline_files_hold_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = tracking.start(_settings("wandb"), tmp_path, None)
    tracker.log({"train/loss": 2.5}, 10)
    tracker.log_captions(PICTURES, ["a cat", "a dog"], ["a tabby", "a hound"], 10)
    tracker.log_bad_images(["a.jpg: there are no bytes", "b.jpg: 9 x 9: too many"], 10)
    tracker.finish()

    points = list(_history(tmp_path))
    assert {"train/loss": 2.5, "step": 10}.items() <= points[0].items()
    table = next(point for point in points if "captions/nrows" in point)
    assert (table["captions/_type"], table["captions/nrows"]) == ("table-file", 2)
    rows = json.loads(next(tmp_path.rglob("captions*.table.json")).read_text())
    bad = json.loads(next(tmp_path.rglob("bad_images*.table.json")).read_text())
    assert bad["data"] == [["a.jpg", "there are no bytes"], ["b.jpg", "9 x 9: too many"]]
    assert [row[1:] for row in rows["data"]] == [["a cat", "a tabby"], ["a dog", "a hound"]]
    assert len(list(tmp_path.rglob("*.png"))) == 2
    started = next(r.run for r in _records(tmp_path) if r.HasField("run"))
    assert started.display_name == "a-run"
    saved = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert saved["train"]["epochs"] == config.TrainConfig().epochs


def test_a_restart_continues_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = tracking.start(_settings("wandb"), tmp_path / "1", None)
    first.finish()
    second = tracking.start(_settings("wandb"), tmp_path / "2", first.id)
    second.finish()
    assert first.id is not None and second.id == first.id
    ids = {r.run.run_id for r in _records(tmp_path) if r.HasField("run")}
    assert ids == {first.id}


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tracking.start(_settings("tensorboard"), tmp_path, None)
    tracker.log({"val/loss": 1.25}, 7)
    tracker.log_captions(PICTURES, ["a", "b"], ["c", "d"], 7)
    tracker.log_bad_images(["a.jpg: empty"], 7)
    tracker.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    (point,) = events.Scalars("val/loss")
    assert (point.step, point.value) == (7, 1.25)
    (listed,) = events.Tensors("bad_images/text_summary")
    assert listed.tensor_proto.string_val == [b"a.jpg: empty"]
    assert events.Tags()["images"] == ["captions/0", "captions/1"]


def test_none_writes_nothing(tmp_path):
    tracker = tracking.start(_settings("none"), tmp_path, None)
    tracker.log({"x": 1.0}, 1)
    tracker.log_captions(PICTURES, ["a", "b"], ["c", "d"], 1)
    tracker.log_bad_images(["a.jpg: empty"], 1)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "mode"), [("", "offline"), ("0" * 40, "online")])
def test_without_a_key_wandb_works_offline(key, mode, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert tracking._has_key() == (mode == "online")
