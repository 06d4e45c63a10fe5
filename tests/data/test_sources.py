import json
import shutil
import zipfile

import pytest

from caption_ray import storage
from caption_ray.config import SourceConfig
from caption_ray.data import listing
from caption_ray.data.formats import find_splits, pictures
from caption_ray.data.locations import PictureError, read_picture


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


def _readable(split):
    names = set()
    for record in split.records:
        try:
            read_picture(record.location)
            names.add(record.picture.file_name)
        except PictureError as error:
            assert str(error) == "missing"
    return names


@pytest.mark.parametrize("gone", [slice(0, 5), slice(1, None), slice(0, 39), slice(0, -1, 2)])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_a_partial_download_is_taken_as_it_is(layout, gone, is_zipped):
    files = sorted((layout / "train").iterdir())
    for file in files[gone]:
        file.unlink()
    if is_zipped:
        _zip(layout)
    split = find_splits(str(layout))["train"]
    assert len(split.records) == 40
    assert _readable(split) == {file.name for file in files} - {file.name for file in files[gone]}


def test_one_picture_that_no_probe_hits_is_found_by_listing(layout, monkeypatch):
    monkeypatch.setattr(pictures, "PROBES", 3)
    files = sorted((layout / "train").iterdir())
    for file in [*files[:7], *files[8:]]:
        file.unlink()
    assert _readable(find_splits(str(layout))["train"]) == {files[7].name}


def test_a_large_source_is_not_listed_where_all_is_in_its_place(layout, monkeypatch):
    tried, exists = [], storage.exists
    monkeypatch.setattr(storage, "exists", lambda uri: tried.append(uri) or exists(uri))
    monkeypatch.setattr(storage, "list_files", None)
    monkeypatch.setattr(listing, "files_below", None)
    monkeypatch.setattr(pictures, "PROBES", 8)
    find_splits(str(layout))
    assert sum(uri.endswith(".jpg") for uri in tried) == 2 * 8
    tried.clear()
    for file in sorted((layout / "train").iterdir())[:20]:
        file.unlink()
    find_splits(str(layout))
    assert sum(uri.endswith(".jpg") for uri in tried) <= 4 * 8 + 8


def _rezip(layout, named):
    for split in ("train", "val"):
        with zipfile.ZipFile(layout / f"{split}.zip", "w") as archive:
            for file in sorted((layout / split).iterdir()):
                archive.write(file, named(split, file.name))
            archive.writestr(f"__MACOSX/{split}/._{file.name}", b"no picture")
            archive.writestr(f"{split}/.DS_Store", b"no picture")
        shutil.rmtree(layout / split)


@pytest.mark.parametrize(
    "named",
    [
        lambda split, name: name,
        lambda split, name: f"my photos/{name}",
        lambda split, name: f"images/{split}/{name}",
        lambda split, name: f"{split}2014/{name}",
        lambda split, name: f"content/data/{name[-5]}/{name.upper()}",
        lambda split, name: f"{split}\\{name}",
    ],
)
def test_the_top_folder_of_a_zip_may_have_any_name(layout, scenes, named):
    _rezip(layout, named)
    assert _pictures(find_splits(str(layout))["train"]) == _pictures(
        find_splits(str(scenes))["train"]
    )


@pytest.mark.parametrize("place", ["my photos", "data/train", "train2014", "x/images/train"])
def test_the_folder_of_the_pictures_may_have_any_name(layout, scenes, place):
    (layout / place).parent.mkdir(parents=True, exist_ok=True)
    (layout / "train").rename(layout / "moved")
    (layout / "moved").rename(layout / place)
    assert _pictures(find_splits(str(layout))["train"]) == _pictures(
        find_splits(str(scenes))["train"]
    )


def test_pictures_of_another_split_are_never_taken(layout):
    names = sorted(file.name for file in (layout / "train").iterdir())
    for file, name in zip(sorted((layout / "val").iterdir()), names, strict=False):
        file.rename(layout / "val" / name)
    shutil.rmtree(layout / "train")
    with pytest.raises(ValueError, match=r"no pictures: .* it holds .*val/ \(12 files"):
        find_splits(str(layout), splits=("train",))


def test_a_zip_of_other_pictures_says_what_it_holds(layout):
    _zip(layout)
    with zipfile.ZipFile(layout / "train.zip", "w") as archive:
        archive.writestr("photos/one.jpg", b"x")
        archive.writestr("notes.txt", b"x")
    said = r"none of the pictures; train/0000.*; it holds photos/ \(1 files, .*one.jpg\), notes.txt"
    with pytest.raises(ValueError, match=said):
        find_splits(str(layout))


def test_two_files_of_one_name_are_told_apart_by_their_folders_alone(layout):
    for folder in ("a", "b"):
        shutil.copytree(layout / "val", layout / "train" / folder)
    path = layout / "annotations" / "captions_train.json"
    content = json.loads(path.read_text())
    names = sorted(file.name for file in (layout / "val").iterdir())
    for i, image in enumerate(content["images"]):
        image["file_name"] = names[i % 12]
    for file in (layout / "train").glob("*.jpg"):
        file.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{names[0]} may be train/a/{names[0]} or train/b/"):
        find_splits(str(layout), splits=("train",))


def test_a_web_server_cannot_say_what_it_has(layout, web):
    with pytest.raises(ValueError, match="no captions .* a web server does not say what it has"):
        find_splits(f"{web.address}/nothing")
    shutil.rmtree(layout / "train")
    with pytest.raises(ValueError, match="no pictures: .* a web server does not say what it has"):
        find_splits(f"{web.address}/layout")


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
    monkeypatch.setattr("caption_ray.data.locations.MAX_PICTURE_BYTES", 10)
    record = find_splits(str(layout))["train"].records[0]
    with pytest.raises(PictureError, match="corrupt: claims to unpack to"):
        read_picture(record.location)


def test_a_broken_zip_is_named(layout):
    _zip(layout)
    (layout / "train.zip").write_bytes((layout / "train.zip").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.zip: a broken zip"):
        find_splits(str(layout))


def test_a_source_without_captions_or_pictures_says_what_was_looked_for(tmp_path, layout):
    with pytest.raises(ValueError, match=r"nothing: no captions in a .*; it holds nothing"):
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
    assert [one.reason for one in splits["train"].left_out] == ["not in Karpathy's splits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"caption_column": ("text", "raw")},
            "--caption-column text raw: the source is coco, which",
        ),
        ({"split_column": "fold"}, "--split-column fold: the source is coco, which has no columns"),
    ],
)
def test_options_that_would_do_nothing_are_refused(layout, options, message):
    with pytest.raises(ValueError, match=message):
        find_splits(str(layout), options=SourceConfig(**options))
    with pytest.raises(ValueError, match="--split val=0.1: --karpathy says the splits"):
        find_splits(str(layout), karpathy="any.json", options=SourceConfig(split="val=0.1"))


def test_a_test_split_is_found_where_there_is_one(layout):
    assert list(find_splits(str(layout))) == ["train", "val"]
    shutil.copytree(layout / "val", layout / "test")
    captions = layout / "annotations" / "captions_val.json"
    shutil.copy(captions, layout / "annotations" / "captions_test.json")
    found = find_splits(str(layout))
    assert list(found) == ["train", "val", "test"]
    assert _pictures(found["test"]) == _pictures(found["val"])


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_the_validation_split_may_be_called_otherwise(layout, scenes, name):
    (layout / "val").rename(layout / name)
    for file in (layout / "annotations").glob("*_val.json"):
        file.rename(file.with_name(file.name.replace("val", name)))
    assert _pictures(find_splits(str(layout))["val"]) == _pictures(find_splits(str(scenes))["val"])


def test_a_split_of_any_name_can_be_asked_for(layout):
    (layout / "val").rename(layout / "minival")
    for file in (layout / "annotations").glob("*_val.json"):
        file.rename(file.with_name(file.name.replace("val", "minival")))
    assert list(find_splits(str(layout), splits=("train", "minival"))) == ["train", "minival"]


@pytest.mark.parametrize("names", [("any.zip", "any.zip"), ("a/train-pictures.zip", "b/v.zip")])
def test_the_zips_of_the_pictures_may_have_any_name(layout, scenes, names):
    for split, name in zip(("train", "val"), names, strict=True):
        (layout / name).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(layout / name, "a") as archive:
            for file in sorted((layout / split).iterdir()):
                archive.write(file, f"deep/er/{split}/{file.name}")
        shutil.rmtree(layout / split)
    found, expected = find_splits(str(layout)), find_splits(str(scenes))
    for split in ("train", "val"):
        assert _pictures(found[split]) == _pictures(expected[split])
