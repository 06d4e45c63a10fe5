"""Sources as the world has them: every flaw gives its stated error, or its line in the index."""

import io
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running_jobs import run_job

from caption_ray.data import locations, transforms
from caption_ray.data import shards as format
from caption_ray.data.formats import coco_layout, find_splits
from caption_ray.data.ingest import ingest, read_index


def _picture(width, height, kind="JPEG"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _png_that_claims(width, height):
    def chunk(kind, body):
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def _layout(folder, pictures, **changes):
    """A source with one split; `pictures`: name -> bytes."""
    (folder / "train").mkdir(parents=True)
    for name, data in pictures.items():
        (folder / "train" / name).write_bytes(data)
    images = [{"id": i, "file_name": name} for i, name in enumerate(pictures)]
    captions = [{"id": i, "image_id": i, "caption": "a picture"} for i in range(len(images))]
    values = {"images": images, "annotations": captions, **changes}
    (folder / "captions_train.json").write_text(json.dumps(values))
    return str(folder)


def _ingest(source, out, **changes):
    settings = {"image_size": 64, "images_per_shard": 5, "seed": 0, "splits": ("train",)}
    return ingest(source, str(out), **{**settings, **changes}, progress=False)


def _rows(out, index):
    return {
        row["file_name"]: row
        for shard in index.shards("train")
        for row in format.from_bytes(Path(out, shard.file).read_bytes()).to_pylist()
    }


@pytest.mark.usefixtures("local_ray")
def test_pictures_of_every_kind_are_kept_or_left_out_with_the_reason(tmp_path):
    whole = _picture(40, 30)
    good = {
        "good.jpg": whole,
        "one-pixel.png": _picture(1, 1, "PNG"),
        "line.png": _picture(20_000, 1, "PNG"),
        "wrong-extension.jpg": _picture(40, 30, "PNG"),
        "no-extension": whole,
    }
    bad = {
        "empty.jpg": (b"", "there are no bytes"),
        "cut.jpg": (whole[: len(whole) // 2], "cannot be decoded"),
        "page.jpg": (b"<html>not found</html>", "no picture in an accepted format"),
        "bomb.png": (_png_that_claims(50_000, 50_000), "pixels"),
        "short.png": (_png_that_claims(300, 300), "cannot be decoded"),
    }
    source = _layout(
        tmp_path / "source", good | {name: data for name, (data, _) in bad.items()} | {"gone": b""}
    )
    (tmp_path / "source" / "train" / "gone").unlink()
    (tmp_path / "source" / "train" / "page.jpg").rename(tmp_path / "source" / "train" / "moved")
    (tmp_path / "source" / "train" / "page.jpg").mkdir()  # a folder where a picture should be
    index = _ingest(source, tmp_path / "out")
    rows = _rows(tmp_path / "out", index)
    assert set(rows) == set(good)
    for row in rows.values():
        transforms.decode(row["image"])
    reasons = {entry.file_name: entry.reason for entry in index.left_out}
    assert reasons.pop("gone") == reasons.pop("page.jpg") == "missing"
    for name, reason in reasons.items():
        assert reason.startswith("corrupt: ") and bad[name][1] in reason
    assert set(reasons) == set(bad) - {"page.jpg"}


@pytest.mark.usefixtures("local_ray")
def test_captions_of_every_kind_are_kept_or_left_out_with_the_reason(tmp_path):
    long = " ".join(["word"] * 10_000)
    texts = ["  ", long, "ein Bär 🐻 \x00 mit Nullbyte", "one", "two"]
    source = _layout(
        tmp_path / "source",
        {f"{i}.jpg": _picture(8, 8) for i in range(4)},
        annotations=[
            {"id": i, "image_id": image, "caption": text}
            for i, (image, text) in enumerate(zip([0, 1, 2, 3, 99], texts, strict=True))
        ],
    )
    index = _ingest(source, tmp_path / "out")
    rows = _rows(tmp_path / "out", index)
    assert {name: row["captions"] for name, row in rows.items()} == {
        f"{i}.jpg": [texts[i]] for i in (1, 2, 3)
    }
    assert {entry.file_name: entry.reason for entry in index.left_out} == {
        "0.jpg": "no captions",
        "image 99": "1 captions but no picture",
        "captions_train.json: annotations[0]: caption is '  '": "caption without a word",
    }
    assert index.word_counts["word"] == 10_000
    assert read_index(str(tmp_path / "out")) == index


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 0, "file_name": "../../secret.jpg"}], r"images\[0\]: file_name .* no path below"),
        ([{"id": 0, "file_name": "/etc/passwd"}], r"no path below the pictures"),
        ([{"id": 0, "file_name": "..\\secret.jpg"}], r"no path below the pictures"),
        ([{"id": 0, "file_name": "a\0.jpg"}], r"no path below the pictures"),
        ([{"id": 0, "file_name": ""}], r"no path below the pictures"),
        ([{"id": 0, "file_name": "x" * 300}], r"no path below the pictures"),
        ([{"id": 0, "file_name": "a\ud800.jpg"}], r"file_name .* not Unicode text"),
        ([{"id": 2**63, "file_name": "a.jpg"}], r"id is 9223372036854775808, beyond 64 bits"),
        (
            [{"id": 0, "file_name": "a.jpg"}, {"id": 0, "file_name": "b.jpg"}],
            r"images\[1\]: id 0 \(b\.jpg\) is there twice, first for 'a\.jpg'",
        ),
    ],
)
def test_annotations_that_cannot_be_meant_are_refused(tmp_path, images, message):
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)}, images=images)
    with pytest.raises(ValueError, match=message):
        find_splits(source, splits=("train",))


def test_a_caption_with_half_a_character_is_left_out(tmp_path):
    texts = ["a \ud83d smile", "a smile"]
    captions = [{"image_id": 0, "caption": text} for text in texts]
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)}, annotations=captions)
    split = find_splits(source, splits=("train",))["train"]
    assert split.records[0].picture.captions == ["a smile"]
    ((name, reason, _),) = split.left_out
    assert "annotations[0]: caption is 'a \\ud83d smile', which is not Unicode" in name
    assert reason == "caption that is no text"


def test_annotations_in_another_encoding_are_named(tmp_path):
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)})
    file = tmp_path / "captions_train.json"
    file.write_bytes(file.read_text().replace("picture", "château").encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions_train\.json: not JSON in UTF-8"):
        find_splits(source, splits=("train",))


# Zips -----------------------------------------------------------------------------------------


@pytest.fixture
def zipped(tmp_path):
    """A source whose pictures are in train.zip."""
    source = _layout(tmp_path, {f"{i}.jpg": _picture(20 + i, 20) for i in range(4)})
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((tmp_path / "train").iterdir()):
            archive.write(file, f"train/{file.name}")
        archive.writestr("../../evil.jpg", b"evil")
        archive.writestr("/absolute.jpg", b"evil")
    shutil.rmtree(tmp_path / "train")
    return source


def _patch_directory(path, name, offset, value):
    """Overwrite a 32-bit field of the zip's directory entry of that name."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + offset : at + offset + 4] = struct.pack("<I", value)
    path.write_bytes(bytes(data))


def _outcome(source):
    outcome = {}
    for record in find_splits(source, splits=("train",))["train"].records:
        try:
            locations.read_picture(record.location)
            outcome[record.picture.file_name] = "read"
        except locations.PictureError as error:
            outcome[record.picture.file_name] = str(error)
    return outcome


def test_names_that_lead_out_of_the_zip_harm_nobody(zipped, tmp_path):
    before = {path for path in tmp_path.parent.rglob("*")}
    assert set(_outcome(zipped).values()) == {"read"}
    assert {path for path in tmp_path.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (24, 2**31, "claims to unpack to 2147483648 bytes"),  # a bomb that says so
        (24, 10, "bad CRC"),  # a bomb that does not: it unpacks to more than it claims
        (16, 1, "bad CRC"),
        (42, 7, "no zip entry where the directory says"),
    ],
)
def test_a_zip_entry_that_lies_is_left_out(zipped, tmp_path, field, value, reason):
    _patch_directory(tmp_path / "train.zip", "train/1.jpg", field, value)
    outcome = _outcome(zipped)
    assert reason in outcome.pop("1.jpg") and set(outcome.values()) == {"read"}


@pytest.mark.parametrize("field", [20, 42])
def test_a_zip_whose_entries_reach_beyond_its_end_is_named(zipped, tmp_path, field):
    _patch_directory(tmp_path / "train.zip", "train/1.jpg", field, 10**9)
    with pytest.raises(ValueError, match=r"train\.zip: a broken zip .*1\.jpg.* again"):
        _outcome(zipped)


def test_a_zip_of_an_unknown_version_is_named(zipped, tmp_path):
    _patch_directory(tmp_path / "train.zip", "train/1.jpg", 6, 99)
    with pytest.raises(ValueError, match=r"train\.zip: a broken zip \(zip file version 9\.9\)"):
        _outcome(zipped)


def test_annotations_packed_in_a_way_that_is_not_read_ask_for_another(tmp_path):
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)})
    file, name = tmp_path / "annotations_trainval2017.zip", "annotations/captions_train2017.json"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "captions_train.json", name)
    (tmp_path / "captions_train.json").unlink()
    _patch_directory(file, name, 10, 9)  # Deflate64, as Windows packs what is large
    with pytest.raises(ValueError, match=r"annotations_.*\(That compression.*zip it again with de"):
        _outcome(source)


def test_a_truncated_zip_is_named(zipped, tmp_path):
    data = (tmp_path / "train.zip").read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "train.zip").write_bytes(data[:keep])
        with pytest.raises(ValueError, match=r"train\.zip: a broken zip"):
            _outcome(zipped)


def test_a_compression_that_is_not_read_is_named(tmp_path):
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)})
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "train" / "a.jpg", "train/a.jpg")
    said = "zip compression method 14, which is not read: zip it with deflate"
    assert _outcome(source) == {"a.jpg": said}


def test_a_language_without_spaces_is_noticed_before_the_work(tmp_path, capsys, monkeypatch):
    captions = [{"image_id": 0, "caption": "一只狗在草地上奔跑"}]
    source = _layout(tmp_path / "source", {"a.jpg": _picture(8, 8)}, annotations=captions)
    monkeypatch.setattr("caption_ray.data.ingest._write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ingest(source, tmp_path / "out")
    assert "1.0 words of 9.0 characters" in capsys.readouterr().err


def test_what_is_left_out_is_told_with_its_reason_number_and_first():
    left_out = [
        format.LeftOut("train", "1.jpg", "missing"),
        format.LeftOut("train", "2.jpg", "missing"),
        format.LeftOut("train", "captions.json: annotations[3]", "caption without a word", 7),
        format.LeftOut("val", "1.jpg", "missing"),
    ]
    assert format.outline(left_out) == (
        "train: 2 x missing (the first: 1.jpg); "
        "train: 7 x caption without a word (the first: captions.json: annotations[3]); "
        "val: 1 x missing (the first: 1.jpg)"
    )
    assert format.outline([]) == ""


def test_annotations_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    source = _layout(tmp_path, {"a.jpg": _picture(8, 8)})
    captions = tmp_path / "captions_train.json"
    with zipfile.ZipFile(tmp_path / "annotations_trainval.zip", "w") as archive:
        archive.write(captions, "annotations/captions_train.json")
    captions.unlink()
    assert len(find_splits(source, splits=("train",))["train"].records) == 1
    monkeypatch.setattr(coco_layout, "MAX_ANNOTATION_BYTES", 50)
    with pytest.raises(ValueError, match=r"captions_train\.json claims to unpack to \d+ bytes"):
        find_splits(source, splits=("train",))


def test_the_ingest_job_ends_with_one_line_that_says_why(zipped, tmp_path):
    (tmp_path / "train.zip").write_bytes(b"PK")
    job = run_job("ingest", "--source", zipped, "--out", "out", "--splits", "train", cwd=tmp_path)
    assert job.returncode == 1 and "Traceback" not in job.stderr
    assert "train.zip: a broken zip" in job.stderr.splitlines()[-1]
