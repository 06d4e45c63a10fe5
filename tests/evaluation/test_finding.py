"""Which pictures somebody means who names a file, a folder or a glob."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from caption_ray.data import transforms
from caption_ray.evaluation.finding import find_images


def picture(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "a.jpg": picture(),
        "b.JPEG": picture(),
        "cut.jpg": picture()[:30],
        "c.jfif": picture(),
        "d": picture("PNG"),
        "notes.txt": b"words",
        "e.mp4": b"\0\0\0\x18ftypisom\0\0\0\0",
        "empty": b"",
        "sub/deep/f.png": picture("PNG"),
        "sub/g.jpg": picture(),
        ".h.jpg": picture(),
        "sub/._g.jpg": b"\0\5\x16\7",
        "__MACOSX/a.jpg": picture(),
        ".cache/i.jpg": picture(),
        "photos [2020]/j[1].jpg": picture(),
        "photos 2/k.jpg": picture(),
    }
    for name, data in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(data)
    return tmp_path / "top"


def found(folder: Path, images: str) -> list[str]:
    return [file[len(str(folder)) + 1 :] for file in find_images(str(folder / images))]


TOP = ["a.jpg", "b.JPEG", "c.jfif", "cut.jpg", "d"]
BRACKETS = ["photos [2020]/j[1].jpg"]
SUB = ["sub/deep/f.png", "sub/g.jpg"]
ALL = [*TOP, "photos 2/k.jpg", *BRACKETS, *SUB]


@pytest.mark.parametrize(
    ("images", "files"),
    [
        ("", ALL),
        ("*", ALL),
        ("**", ALL),
        ("*/**", ALL[len(TOP) :]),
        ("*.jpg", ["a.jpg", "cut.jpg"]),
        ("**/*.jpg", ["a.jpg", "cut.jpg", "photos 2/k.jpg", *BRACKETS, "sub/g.jpg"]),
        ("*/*.jpg", ["photos 2/k.jpg", *BRACKETS, "sub/g.jpg"]),
        ("[ab].*", ["a.jpg", "b.JPEG"]),
        ("?", ["d"]),
        ("s*", SUB),
        ("sub/**/*.png", ["sub/deep/f.png"]),
        ("photos*", ["photos 2/k.jpg", *BRACKETS]),
        # marks in names that are there
        ("photos [2020]", BRACKETS),
        ("photos [2020]/*", BRACKETS),
        ("photos [2020]/j[1].jpg", BRACKETS),
        ("photos [2]", ["photos 2/k.jpg"]),
        # what is hidden is meant by name alone
        (".h.jpg", [".h.jpg"]),
        (".*", [".cache/i.jpg", ".h.jpg"]),
        ("**/.*.jpg", [".h.jpg", "sub/._g.jpg"]),
        (".cache", [".cache/i.jpg"]),
        ("__MACOSX", ["__MACOSX/a.jpg"]),
        ("__MACOSX/*", ["__MACOSX/a.jpg"]),
        # one file is what is asked for, whatever it is
        ("notes.txt", ["notes.txt"]),
    ],
)
def test_what_is_meant_is_found(folder: Path, images: str, files: list[str]) -> None:
    assert found(folder, images) == files


@pytest.mark.parametrize("images", ["nothing", "*.gif", "a.jpg/*", "notes*", "[x]", "sub/**/*.txt"])
def test_to_mean_no_picture_is_an_error(folder: Path, images: str) -> None:
    with pytest.raises(ValueError, match="no picture there; give a picture, a folder or bucket"):
        found(folder, images)


def test_what_is_no_picture_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(folder, "*")
    assert capsys.readouterr().out == (
        "Skipped 3 files that are no pictures: e.mp4, empty, notes.txt\n"
    )
    (folder / "more.txt").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"there is 2 files that are none: more.txt, notes.txt"):
        found(folder, "*.txt")
    found(folder, "**/*.jpg")
    assert capsys.readouterr().out == ""


def test_folders_that_cannot_be_meant_are_not_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, scandir = [], os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: listed.append(os.path.basename(path)) or scandir(path)
    )
    assert found(folder, "*.jpg") == ["a.jpg", "cut.jpg"]
    assert set(listed) <= {"top", "*.jpg"}
    assert found(folder, "s*/*.jpg") == ["sub/g.jpg"]
    assert set(listed) <= {"top", "sub", "*.jpg"}


def test_linked_folders_are_followed_once(folder: Path) -> None:
    os.symlink(folder / "sub", folder / "another")
    os.symlink(folder, folder / "sub" / "loop")
    os.symlink(folder / "photos 2", folder.parent / "link")
    assert found(folder, "") == ALL
    assert find_images(str(folder.parent / "link")) == [f"{folder}/photos 2/k.jpg"]


def test_a_file_that_cannot_be_looked_into_gets_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise PermissionError("not yours")

    monkeypatch.setattr("caption_ray.storage.read_range", refuse)
    assert set(found(folder, "*")) == {*ALL, "notes.txt", "e.mp4", "empty"}


@pytest.mark.parametrize("kind", [*transforms.FORMATS, "MPO"])
def test_what_can_be_decoded_is_known_by_its_first_bytes(kind: str) -> None:
    assert transforms.is_picture(picture(kind)[: transforms.HEAD_BYTES])


@pytest.mark.parametrize("data", [b"", b"BM", b"BMW drives on a road", b"RIFF\0\0\0\0WAVE", b"GIF"])
def test_other_bytes_are_no_picture(data: bytes) -> None:
    assert not transforms.is_picture(data)
