"""Which files there are below a folder, and which of them a name means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caption_ray.data import listing


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def below(folder: Path) -> list[str]:
    return [file[len(str(folder)) + 1 :] for file in listing.files_below(str(folder))]


def test_what_nobody_put_there_is_not_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b/c.jpg", ".hidden.jpg", "b/._c.jpg", ".git/d.jpg", "__MACOSX/e.jpg")
    assert below(tmp_path) == ["a.jpg", "b/c.jpg"]


def test_a_hidden_folder_that_is_asked_for_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a.jpg")
    assert below(tmp_path / ".cache") == ["a.jpg"]


def test_what_is_not_there_has_no_files(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    assert below(tmp_path / "nothing") == below(tmp_path / "file") == []


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    top = tmp_path / "top"
    touch(tmp_path, "elsewhere/deep/a.jpg", "top/b/c.jpg")
    os.symlink(tmp_path / "elsewhere", top / "link1")
    os.symlink(tmp_path / "elsewhere", top / "link2")
    os.symlink(top, top / "b" / "loop")
    os.symlink(top / "b", top / "a-link-before-b")
    os.symlink(tmp_path / "elsewhere" / "deep" / "a.jpg", top / "one.jpg")
    os.symlink(tmp_path / "nothing", top / "dangling.jpg")
    assert below(top) == ["b/c.jpg", "link1/deep/a.jpg", "one.jpg"]


@pytest.mark.parametrize(
    ("names", "paths", "found"),
    [
        # where they are expected: nothing else counts
        ("a b", "train/a train/b a", "train/a train/b"),
        ("a b", "images/train/a x/b", "images/train/a -"),
        ("x/a", "x/a", "x/a"),
        ("a .b", "a .b", "a .b"),
        # elsewhere
        ("a b", "photos/a photos/b", "photos/a photos/b"),
        ("a b", "x/train/a y/train/b z/a", "x/train/a y/train/b"),
        ("x/a y/a", "photos/x/a photos/y/a", "photos/x/a photos/y/a"),
        ("x/a y/b", "a/a b/b", "a/a b/b"),
        ("a.JPG A.jpg", "p/a.JPG p/A.jpg", "p/a.JPG p/A.jpg"),
        ("a.JPG b.JPG", "train/a.jpg train/b.jpg", "train/a.jpg train/b.jpg"),
        ("my%20dog", "train/my_dog train/my%20dogs", "-"),
        ("%61 b%23", "train/a train/b#", "train/a train/b#"),
        ("train\\a", "train/a", "train/a"),
        ("a b", "train\\a train\\b", "train\\a train\\b"),
        ("e\u0301", "train/\u00e9", "train/\u00e9"),
        # several files, or several names
        ("a b c", "train/x/a train/y/a train/b train/c", "- train/b train/c"),
        ("x/a y/a", "photos/a", "- -"),
        ("a a", "photos/a", "- -"),
        # what is not theirs
        ("a b", "val/a validation/b test2017/c", "- -"),
        ("a b", "train2014/a val2014/b", "train2014/a -"),
        ("a b", "__MACOSX/train/a train/._b", "- -"),
        ("a b c d", "photos/a photos/b", "photos/a photos/b - -"),
        ("a b c d", "photos/a", "- - - -"),
        ("a b c d", "my/train/a", "my/train/a - - -"),
    ],
)
def test_a_name_means_the_one_file_that_it_can_mean(names: str, paths: str, found: str) -> None:
    matches = listing.match(names.split(), paths.split(), "train", is_ours=False)
    assert [matches.get(name, "-") for name in names.split()] == found.split()


def test_files_that_are_known_to_be_ours_need_not_be_many() -> None:
    names = list("abcd")
    assert listing.match(names, ["photos/a"], "train", is_ours=True) == {"a": "photos/a"}


def test_twenty_thousand_pictures_of_one_name_are_matched_quickly() -> None:
    names = [f"{i:06d}/image.jpg" for i in range(20_000)]
    paths = {f"photos/{name}" for name in names}
    assert len(listing.match(names, paths, "train", is_ours=False)) == len(names)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("Images/0.jpg Images/1.jpg captions.txt",
         "it holds Images/ (2 files, the first: 0.jpg), captions.txt"),
        ("captions_train.json notes.csv", "it holds captions_train.json, notes.csv"),
        ("a b c d e f g", "it holds a, b, c, d, e, 2 more"),
        ("", "it holds nothing"),
    ],
)  # fmt: skip
def test_a_source_is_described_by_what_it_holds(tmp_path: Path, files: str, said: str) -> None:
    touch(tmp_path, *files.split())
    assert listing.describe(str(tmp_path)) == said
