"""WebDataset tars: written by the field's own writer, read as its own reader reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from captioned import Photo, captions_of, pictures_of, reasons_of

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import archives
from caption_ray.data.formats import find_splits
from caption_ray.data.sources import Split

TRAIN = ("train",)


def write_as_img2dataset(folder: Path, photos: Sequence[Photo], per_tar: int = 5) -> None:
    """Tars and what lies beside them, as img2dataset's `webdataset` output is laid out."""
    webdataset = pytest.importorskip("webdataset", reason="the format's own writer")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(0, len(photos), per_tar):
        stem = folder / f"{number // per_tar:05d}"
        with webdataset.TarWriter(str(stem.with_suffix(".tar"))) as sink:
            for i, photo in enumerate(photos[number : number + per_tar], start=number):
                fields = {"caption": photo.captions[0], "all": photo.captions, "key": f"{i:09d}",
                          "url": "http://example.org/a.jpg", "status": "success"}  # fmt: skip
                sink.write({"__key__": f"{i:09d}", "jpg": photo.data,
                            "txt": photo.captions[0], "json": fields})  # fmt: skip
        stem.with_suffix(".parquet").write_bytes(b"PAR1 not looked into PAR1")
        Path(f"{stem}_stats.json").write_text('{"count": 5}')


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def train(source: Path | str, **options: Any) -> Split:
    return find_splits(str(source), splits=TRAIN, options=SourceConfig(**options))["train"]


def test_tars_of_img2dataset_are_read_as_webdataset_reads_them(
    photos: list[Photo], tmp_path: Path
) -> None:
    write_as_img2dataset(tmp_path, photos)
    split = train(tmp_path)
    webdataset = pytest.importorskip("webdataset")
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(tars) == 3 and len(theirs) == len(photos) == 12
    assert pictures_of(split) == [sample["jpg"] for sample in theirs]
    assert [record.picture.captions for record in split.records] == [
        [sample["txt"].decode()] for sample in theirs
    ]
    assert split.left_out == []
    assert [record.picture.file_name for record in split.records][:2] == [
        "000000000.jpg",
        "000000001.jpg",
    ]


def test_captions_come_from_the_key_of_the_json_that_is_named(
    photos: list[Photo], tmp_path: Path
) -> None:
    write_as_img2dataset(tmp_path, photos)
    split = train(tmp_path, caption_column=("all",))
    assert [record.picture.captions for record in split.records] == [p.captions for p in photos]
    both = train(tmp_path, caption_column=("txt", "all"))
    assert [record.picture.captions for record in both.records] == [p.captions for p in photos]
    assert reasons_of(both) == {"caption listed again": 12}


def test_without_a_text_the_usual_keys_of_the_json_are_tried_in_order(tmp_path: Path) -> None:
    fields = {"raw": "raw", "text": "a text", "captions": ["a dog", "two dogs"]}
    write_tar(tmp_path / "0.tar", {"a.png": b"x", "a.json": json.dumps(fields).encode()})
    assert captions_of({"train": train(tmp_path)}) == {"train": {"a.png": ["a dog", "two dogs"]}}


@pytest.mark.parametrize(
    ("source", "pictures"),
    [
        ("{00000..00001}.tar", 10),
        ("{00000,00002}.tar", 7),
        ("00002.tar", 2),
        ("0000", 12),
        (".", 12),
    ],
)
def test_patterns_prefixes_files_and_folders_name_tars(
    photos: list[Photo], tmp_path: Path, source: str, pictures: int
) -> None:
    write_as_img2dataset(tmp_path, photos)
    assert len(train(str(tmp_path / source)).records) == pictures


def test_splits_are_named_by_folders_or_files(photos: list[Photo], tmp_path: Path) -> None:
    write_as_img2dataset(tmp_path / "train", photos[:7])
    write_as_img2dataset(tmp_path / "validation", photos[7:10])
    write_as_img2dataset(tmp_path / "more", photos[10:])
    (tmp_path / "more" / "00000.tar").rename(tmp_path / "mine-test-0000.tar")
    found = find_splits(str(tmp_path))
    assert {split: len(it.records) for split, it in found.items()} == {
        "train": 7, "val": 3, "test": 2
    }  # fmt: skip
    ids = [record.picture.image_id for it in found.values() for record in it.records]
    assert ids == list(range(1, 13)), "each number once, over all splits"


def test_a_tar_beside_others_that_name_splits_belongs_to_none(tmp_path: Path) -> None:
    for name in ("train", "val", "extra"):
        write_tar(tmp_path / f"{name}.tar", {"a.jpg": b"x", "a.txt": b"a dog"})
    found = find_splits(str(tmp_path))
    assert {split: len(it.records) for split, it in found.items()} == {"train": 1, "val": 1}
    assert reasons_of(found["train"]) == {"tar that names no split, beside others that do": 1}


def test_what_concerns_one_picture_is_left_out_and_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [
            ("a.jpg", b"A"), ("a.txt", "\ufeffa dog\r\ntwo dogs\r\n".encode()),
            ("b.jpg", b"B"), ("b.txt", b"..."),
            ("c.jpg", b"C"), ("c.png", b"of c as well"),
            ("d.txt", b"a cat"),
            ("e.webp", b"E"), ("e.txt", "ein Bär".encode("latin-1")),
            ("../../evil.jpeg", b"V"), ("../../evil.txt", b"a thief"),
            ("a.jpg", b"another"),
            ("._a.jpg", b"of macOS"), ("folder/.hidden.txt", b"no"), ("README", b"no"),
        ],
    )  # fmt: skip
    before = sorted(tmp_path.parent.rglob("*"))
    split = train(tmp_path)
    assert captions_of({"train": split}) == {
        "train": {"a.jpg": ["a dog", "two dogs"], "../../evil.jpeg": ["a thief"]}
    }
    assert pictures_of(split) == [b"A", b"V"]
    assert sorted(tmp_path.parent.rglob("*")) == before, "names in a tar are never written to"
    assert reasons_of(split) == {
        "no captions": 3,
        "caption without a word": 1,
        "captions but no picture": 1,
        "caption that is no text": 1,
        "member of the tar that is there again": 1,
        "second picture of the same name": 1,
    }


def test_members_need_not_lie_side_by_side(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"A", "b.jpg": b"B", "a.txt": b"a", "b.txt": b"b"})
    assert captions_of({"train": train(tmp_path)}) == {"train": {"a.jpg": ["a"], "b.jpg": ["b"]}}


def test_a_tar_that_was_cut_off_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "0.tar", {"a.jpg": b"A" * 700, "a.txt": b"a dog", "b.jpg": b"B" * 700}
    ).read_bytes()
    end = whole.rindex(b"B") + 1
    for length in (0, 1, 511, 600, 1024, 1600, 2100, 2560, 3072, end, -(-end // 512) * 512):
        (tmp_path / "0.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"0\.tar: a broken tar \(.*\); copy or download it"):
            train(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"no tar at all, but quite long" * 100)
    with pytest.raises(ValueError, match=r"0\.tar: a broken tar"):
        train(tmp_path)


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_a_compressed_tar_says_what_to_do(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=r"compressed.* unpack it"):
        train(tmp_path)


def test_tars_without_captions_are_no_webdataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"A"})
    with pytest.raises(ValueError, match=r"webdataset: .*\(0\.tar has no member KEY\.txt or"):
        train(tmp_path)


def test_json_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": b"{"})
    with pytest.raises(ValueError, match=r"0\.tar: a\.json: not JSON"):
        train(tmp_path)


def test_a_remote_tar_is_listed_by_reading_it_once_and_a_picture_is_one_range(
    photos: list[Photo], tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as_img2dataset(tmp_path, photos, per_tar=12)
    ranges: list[tuple[int, int]] = []
    real = storage.read_range

    def read_range(uri: str, start: int, length: int) -> bytes:
        ranges.append((start, length))
        return real(uri, start, length)

    monkeypatch.setattr(storage, "read_range", read_range)
    monkeypatch.setattr(archives, "TAR_BUFFER", 1 << 18)
    split = train(f"{web.address}/00000.tar")
    size = (tmp_path / "00000.tar").stat().st_size
    assert sum(length for _, length in ranges) <= 1.5 * size
    ranges.clear()
    assert pictures_of(split) == [photo.data for photo in photos]
    assert [length for _, length in ranges] == [len(photo.data) for photo in photos]


def test_the_splits_column_of_the_json_decides(tmp_path: Path) -> None:
    members = {}
    for key, split in {"a": "train", "b": "VAL", "c": "dev ", "d": "holdout"}.items():
        members[f"{key}.jpg"] = key.encode()
        members[f"{key}.json"] = json.dumps({"caption": "a dog", "where": split}).encode()
    write_tar(tmp_path / "0.tar", members)
    found = find_splits(str(tmp_path), options=SourceConfig(split_column="where"))
    assert {split: len(it.records) for split, it in found.items()} == {"train": 1, "val": 2}
    assert reasons_of(found["train"]) == {"split of no known name": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": ("words",)},
         r"--caption-column words: a has the endings jpg, json, and its .json the keys caption; n"),
        ({"image_column": "png"}, r"--image-column png: a has the endings jpg, json; name one of"),
    ],
)  # fmt: skip
def test_names_that_no_member_has_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": b'{"caption": "a dog"}'})
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)
