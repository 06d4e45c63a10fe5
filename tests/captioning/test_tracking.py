import io
import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caption_ray import config
from caption_ray.captioning import tracking

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def _jpeg(level):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


def _level(file):
    return round(np.asarray(Image.open(file)).mean())


TABLE = tracking.Table(
    ["which", "picture", "caption", "score"],
    [["best", _jpeg(250), "a cat", 1.5], ["worst", _jpeg(5), "a dog", 0.25]],
)

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
    tracker.finish()

    points = list(_history(tmp_path))
    assert {"train/loss": 2.5, "step": 10}.items() <= points[0].items()
    table = next(point for point in points if "captions/nrows" in point)
    assert (table["captions/_type"], table["captions/nrows"]) == ("table-file", 2)
    rows = json.loads(next(tmp_path.rglob("*.table.json")).read_text())
    assert [row[1:] for row in rows["data"]] == [["a cat", "a tabby"], ["a dog", "a hound"]]
    assert len(list(tmp_path.rglob("*.png"))) == 2
    started = next(r.run for r in _records(tmp_path) if r.HasField("run"))
    assert started.display_name == "a-run"
    saved = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert saved["train"]["epochs"] == config.TrainConfig().epochs


def test_wandb_offline_files_hold_a_table_and_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = tracking.start(_settings("wandb"), tmp_path, None)
    tracker.log_table("val/captions", TABLE, 7)
    tracker.finish()

    (point,) = (point for point in _history(tmp_path) if "val/captions/_type" in point)
    assert (point["val/captions/_type"], point["val/captions/nrows"]) == ("table-file", 2)
    assert point["step"] == 7 and point["val/captions/pictures/count"] == 2
    (sent,) = (r.artifact for r in _records(tmp_path) if r.HasField("artifact"))
    files = {entry.path: Path(entry.local_path) for entry in sent.manifest.contents}
    table = json.loads(files["val/captions.table.json"].read_text())
    assert table["columns"] == TABLE.columns
    rows = [[which, caption, score] for which, _, caption, score in table["data"]]
    assert rows == [["best", "a cat", 1.5], ["worst", "a dog", 0.25]]
    of_table = [files[row[1]["path"]] for row in table["data"]]
    of_run = sorted(tmp_path.rglob("*.png"), key=_level, reverse=True)
    assert [_level(file) for file in of_table] == [_level(file) for file in of_run] == [250, 5]


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
    tracker.log_table("val/captions", TABLE, 8)
    tracker.finish()
    events = EventAccumulator(str(tmp_path)).Reload()
    (point,) = events.Scalars("val/loss")
    assert (point.step, point.value) == (7, 1.25)
    pictures = [f"val/captions/{row}/picture" for row in (0, 1)]
    assert events.Tags()["images"] == ["captions/0", "captions/1", *pictures]
    (shown,) = events.Images(pictures[1])
    assert (shown.step, shown.width, shown.height) == (8, 8, 6)
    (said,) = events.Tensors("val/captions/1/text_summary")
    assert said.tensor_proto.string_val[0] == b"which: worst  \ncaption: a dog  \nscore: 0.25"


def test_none_writes_nothing(tmp_path):
    tracker = tracking.start(_settings("none"), tmp_path, None)
    tracker.log({"x": 1.0}, 1)
    tracker.log_captions(PICTURES, ["a", "b"], ["c", "d"], 1)
    tracker.log_table("captions", TABLE, 1)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "mode"), [("", "offline"), ("0" * 40, "online")])
def test_without_a_key_wandb_works_offline(key, mode, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert tracking._has_key() == (mode == "online")


def _use(tracker):
    """All that training does with it."""
    tracker.log({"train/loss": 2.5}, 10)
    tracker.log_captions(PICTURES, ["a cat", "a dog"], ["a tabby", "a hound"], 10)
    tracker.log_table("val/captions", TABLE, 10)
    tracker.finish()


def test_with_a_key_that_is_refused_wandb_goes_on_offline_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody is there
    said = []
    tracker = tracking.start(_settings("wandb"), tmp_path, None, said.append)
    _use(tracker)
    (line,) = said
    assert line.startswith("Weights & Biases goes on offline: ") and "\n" not in line
    synced = Path(line.rpartition("wandb sync ")[2])
    assert list(synced.glob("*.wandb")) and tracker.id is not None
    assert {"train/loss": 2.5, "step": 10}.items() <= next(_history(tmp_path)).items()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_tracker_that_cannot_write_is_left_off(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "file").touch()
    said = []
    tracker = tracking.start(_settings(kind), tmp_path / "file" / "run", "an-id", said.append)
    _use(tracker)
    (line,) = said
    assert line.startswith("Tracking stops, the run goes on: NotADirectoryError: ")
    assert tracker.id == "an-id", "a restarted run may find its page again"


class _Fails:
    """A tracker whose service dies after a while."""

    id, kept = "an-id", "to send what it has: wandb sync X"

    def __init__(self, finish=lambda: None):
        self.calls, self.finish = [], finish

    def log(self, metrics, step):
        self.calls.append(step)
        if step > 1:
            raise BrokenPipeError("the service\nis gone")

    def log_captions(self, *_):
        raise AssertionError("not asked any more")

    log_table = log_captions


def test_a_tracker_that_dies_is_told_once_and_left_alone():
    said, inner = [], _Fails()
    tracker = tracking._Guarded(lambda: inner, None, said.append)
    tracker.log({}, 1)
    assert said == [] and tracker.id == "an-id"
    tracker.log({}, 2)
    _use(tracker)
    told = "BrokenPipeError: the service is gone; to send what it has: wandb sync X"
    assert said == [f"Tracking stops, the run goes on: {told}"]
    assert inner.calls == [1, 2]


def test_a_tracker_that_hangs_at_its_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    released, said = threading.Event(), []
    tracker = tracking._Guarded(lambda: _Fails(released.wait), None, said.append)
    tracker.finish()
    released.set()
    (line,) = said
    assert "it did not finish within 0 s; to send what it has" in line


def test_a_tracker_that_fails_at_its_end_is_told():
    said = []
    tracking._Guarded(lambda: _Fails(lambda: 1 / 0), None, said.append).finish()
    assert said == ["Tracking stops, the run goes on: ZeroDivisionError: division by zero; "
                    "to send what it has: wandb sync X"]  # fmt: skip
