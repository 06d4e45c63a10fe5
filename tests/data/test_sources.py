import json
import shutil
import zipfile

import pytest

from caption_ray.data.sources import PictureError, find_splits, read_picture


@pytest.fixture
def layout(scenes, tmp_path):
    """A private copy of the scenes, to be damaged."""
    return shutil.copytree(scenes, tmp_path / "layout")


def _zip(layout, compression=zipfile.ZIP_STORED):
    for split in ("train", "val"):
        with zipfile.ZipFile(layout / f"{split}.zip", "w", compression) as archive:
            for file in sorted((layout / split).iterdir()):
                archive.write(file, f"{split}/{file.name}")
        shutil.rmtree(layout / split)


def _pictures(split):
    return {r.picture.file_name: read_picture(r.location) for r in split.records}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_and_folders_hold_the_same_pictures(layout, scenes, compression):
    _zip(layout, compression)
    zipped, unpacked = find_splits(str(layout)), find_splits(str(scenes))
    for split in ("train", "val"):
        assert _pictures(zipped[split]) == _pictures(unpacked[split])
        assert [r.picture for r in zipped[split].records] == [
            r.picture for r in unpacked[split].records
        ]


def test_annotations_may_come_in_a_zip_or_lie_beside_the_pictures(layout, scenes):
    expected = find_splits(str(scenes))
    with zipfile.ZipFile(layout / "annotations_trainval2017.zip", "w") as archive:
        for file in (layout / "annotations").iterdir():
            archive.write(file, f"annotations/{file.stem}2017.json")
    shutil.rmtree(layout / "annotations")
    for split in ("train", "val"):
        (layout / split).rename(layout / f"{split}2017")
    found = find_splits(str(layout))
    assert [r.picture for r in found["val"].records] == [r.picture for r in expected["val"].records]


def test_real_coco_zips(coco_mini):
    splits = find_splits(str(coco_mini))
    assert {name: len(split.records) for name, split in splits.items()} == {"train": 80, "val": 79}
    for record in splits["train"].records:
        assert len(record.picture.captions) >= 5
        assert read_picture(record.location)[:2] == b"\xff\xd8"


def test_a_web_server_with_cocos_addresses(scenes, web, tmp_path):
    expected = find_splits(str(scenes))
    for folder in ("zips", "annotations"):
        (tmp_path / folder).mkdir()
    with zipfile.ZipFile(tmp_path / "annotations/annotations_trainval2017.zip", "w") as archive:
        for file in (scenes / "annotations").iterdir():
            archive.write(file, f"annotations/{file.stem}2017.json")
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"zips/{split}2017.zip", "w") as archive:
            for file in sorted((scenes / split).iterdir()):
                archive.write(file, f"{split}2017/{file.name}")
    found = find_splits(web.address)
    for split in ("train", "val"):
        assert _pictures(found[split]) == _pictures(expected[split])


def test_a_missing_picture_is_missing_when_read(layout):
    next((layout / "train").iterdir()).unlink()
    records = find_splits(str(layout))["train"].records
    missing = 0
    for record in records:
        try:
            read_picture(record.location)
        except PictureError as error:
            missing += 1
            assert str(error) == "missing"
    assert missing == 1


def test_a_damaged_zip_entry_is_noticed(layout):
    _zip(layout)
    data = bytearray((layout / "train.zip").read_bytes())
    data[5_000] ^= 0xFF
    (layout / "train.zip").write_bytes(bytes(data))
    records = find_splits(str(layout))["train"].records
    damaged = 0
    for record in records:
        try:
            read_picture(record.location)
        except PictureError as error:
            damaged += 1
            assert str(error).startswith("corrupt")
    assert damaged == 1


def test_an_entry_that_claims_to_be_huge_is_refused(layout, monkeypatch):
    _zip(layout)
    monkeypatch.setattr("caption_ray.data.sources.MAX_PICTURE_BYTES", 10)
    record = find_splits(str(layout))["train"].records[0]
    with pytest.raises(PictureError, match="corrupt: claims to unpack to"):
        read_picture(record.location)


def test_a_broken_zip_is_named(layout):
    _zip(layout)
    (layout / "train.zip").write_bytes((layout / "train.zip").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.zip: a broken zip"):
        find_splits(str(layout))


def test_a_source_without_captions_or_pictures_says_what_was_looked_for(tmp_path, layout):
    with pytest.raises(ValueError, match=r"no captions for split 'train'.*captions_train2017"):
        find_splits(str(tmp_path / "nothing"))
    shutil.rmtree(layout / "train")
    with pytest.raises(ValueError, match=r"no pictures: looked for train\.zip and for 0000"):
        find_splits(str(layout))


def test_karpathys_splits_replace_those_of_coco(layout):
    ids = [r.picture.image_id for s in find_splits(str(layout)).values() for r in s.records]
    names = ["train", "restval", "val", "test"]
    chosen = {image_id: names[n % 4] for n, image_id in enumerate(ids[:-1])}
    (layout / "dataset_coco.json").write_text(
        json.dumps({"images": [{"cocoid": i, "split": s} for i, s in chosen.items()]})
    )
    splits = find_splits(str(layout), karpathy=str(layout / "dataset_coco.json"))
    for name, split in splits.items():
        wanted = {i for i, s in chosen.items() if s.replace("restval", "train") == name}
        assert {r.picture.image_id for r in split.records} == wanted
    assert [reason for _, reason in splits["train"].left_out] == ["not in Karpathy's splits"]
