import shutil
from pathlib import Path

import pytest

from caption_ray import storage
from caption_ray.data import shards as format
from caption_ray.data import transforms
from caption_ray.data.ingest import RECEIPTS, ensure_ingested, ingest, read_index
from caption_ray.data.ptb import tokenize

pytestmark = pytest.mark.usefixtures("local_ray")


def _ingest(source, out, **changes):
    settings = {
        "image_size": None,
        "images_per_shard": 15,
        "seed": 0,
        "splits": ("train", "val"),
        "progress": False,
    }
    return ingest(str(source), str(out), **{**settings, **changes})


def _rows(out, index, split):
    return [
        row
        for shard in index.shards(split)
        for row in format.from_bytes(Path(out, shard.file).read_bytes()).to_pylist()
    ]


def _files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_every_picture_is_in_one_shard_with_its_captions(scenes, shards):
    index = read_index(shards)
    for split, count in {"train": 40, "val": 12}.items():
        rows = _rows(shards, index, split)
        assert len({row["image_id"] for row in rows}) == len(rows) == count
        for row in rows:
            assert row["image"] == (scenes / split / row["file_name"]).read_bytes()
            assert len(row["captions"]) == 5
            assert 1 <= len(row["objects"]) <= 3
    assert index.left_out == []


def test_what_training_ingests_is_written_once_and_anew_when_it_changed(scenes, tmp_path, capsys):
    source = shutil.copytree(scenes, tmp_path / "mine")
    first = ensure_ingested(str(source), str(tmp_path / "runs"), 64)
    assert (
        first.startswith(f"{tmp_path}/runs/data/mine-") and "Ingesting" in capsys.readouterr().out
    )
    assert read_index(first).rows("train") == [40] and read_index(first).image_size == 64
    before = _files(first)
    assert ensure_ingested(str(source), str(tmp_path / "runs"), 64) == first
    assert _files(first) == before and "Ingesting" not in capsys.readouterr().out

    (annotations,) = source.glob("annotations/captions_train*.json")
    annotations.write_text(annotations.read_text().replace("red", "crimson"))
    second = ensure_ingested(str(source), str(tmp_path / "runs"), 64)
    assert second != first and _files(first) == before
    assert "crimson" in read_index(second).word_counts


def test_the_index_knows_rows_bytes_and_digest_of_every_shard(shards):
    index = read_index(shards)
    for split in index.splits:
        for shard in index.shards(split):
            data = Path(shards, shard.file).read_bytes()
            assert (shard.bytes, shard.checksum) == (len(data), storage.checksum(data))
            assert format.from_bytes(data).num_rows == shard.rows <= 15


def test_shards_are_shuffled(shards):
    ids = [row["image_id"] for row in _rows(shards, read_index(shards), "train")]
    assert ids != sorted(ids)


def test_words_are_counted_over_the_training_captions(shards):
    index = read_index(shards)
    words = [w for r in _rows(shards, index, "train") for c in r["captions"] for w in tokenize(c)]
    assert index.word_counts == {word: words.count(word) for word in set(words)}


def test_an_ingest_that_died_is_completed_to_the_same_bytes(scenes, shards, tmp_path, monkeypatch):
    real = storage.write_bytes

    def fail_at_index(uri, data):
        if uri.endswith("index.json"):
            raise storage.StorageError("power cut")
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", fail_at_index)
    with pytest.raises(storage.StorageError, match="power cut"):
        _ingest(scenes, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(ValueError, match="no complete data set; run jobs/ingest.py"):
        read_index(str(tmp_path / "out"))
    # as if the last shard had not been written either
    receipts = sorted((tmp_path / "out" / RECEIPTS).rglob("*.json"))
    receipts[-1].unlink()
    kept = receipts[0].stat().st_mtime_ns, (tmp_path / "out/train/00000-of-00003.parquet").stat()

    _ingest(scenes, tmp_path / "out")
    again = (tmp_path / "out/train/00000-of-00003.parquet").stat()
    assert again.st_mtime_ns == kept[1].st_mtime_ns  # what had a receipt was not written anew
    assert _files(tmp_path / "out") == _files(shards)


def test_ingesting_again_changes_nothing(scenes, shards):
    before = _files(shards)
    assert _ingest(scenes, shards) == read_index(shards)
    assert _files(shards) == before


def test_another_data_set_in_the_same_place_is_refused(scenes, shards):
    with pytest.raises(ValueError, match=r"holds another data set .* choose an empty folder"):
        _ingest(scenes, shards, image_size=32)


def test_what_cannot_be_used_is_left_out_with_the_reason(scenes, tmp_path):
    source = shutil.copytree(scenes, tmp_path / "source")
    files = sorted((source / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:300])
    files[3].write_text("<html>not found</html>")
    index = _ingest(source, tmp_path / "out")
    reasons = {entry.file_name: entry.reason for entry in index.left_out}
    assert set(reasons) == {file.name for file in files[:4]}
    assert reasons[files[0].name] == "missing"
    assert all(reasons[file.name].startswith("corrupt: ") for file in files[1:4])
    kept = {row["file_name"] for row in _rows(tmp_path / "out", index, "train")}
    assert kept == {file.name for file in files[4:]}


def test_larger_pictures_are_shrunk_to_the_shorter_side(coco_mini, tmp_path):
    index = _ingest(coco_mini, tmp_path / "out", image_size=128, splits=("val",))
    assert index.image_size == 128
    rows = _rows(tmp_path / "out", index, "val")
    assert len(rows) == 79
    for row in rows:
        height, width, _ = transforms.decode(row["image"]).shape
        assert min(height, width) == 128
        assert width / height == pytest.approx(row["width"] / row["height"], rel=0.02)
    # smaller than the originals by far, that is the purpose
    assert sum(shard.bytes for shard in index.shards("val")) < 12_765_205 / 5


def test_receipts_do_not_vouch_for_shards_that_another_plan_replaced(scenes, shards, tmp_path):
    def interrupted(**changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("caption_ray.data.ingest.Index.to_json", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                _ingest(scenes, tmp_path, **changes)

    interrupted()
    interrupted(seed=1)  # other pictures under the same names
    interrupted(seed=1, images_per_shard=7)  # names that the first plan does not have
    _ingest(scenes, tmp_path)
    assert _files(tmp_path) == _files(shards)


def test_a_receipt_without_its_shard_is_not_believed(scenes, shards, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caption_ray.data.ingest.Index.to_json", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _ingest(scenes, tmp_path)
    first, second, *_ = sorted((tmp_path / "train").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    receipt = next((tmp_path / RECEIPTS).rglob("00002*.json"))
    receipt.write_text("{")
    (tmp_path / "train" / ".00000-of-00003.parquet.x1.part").write_bytes(b"half")
    _ingest(scenes, tmp_path)
    assert _files(tmp_path) == _files(shards)
