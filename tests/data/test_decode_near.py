"""Decoding near the trainer. Where there is no GPU, torchvision's decoder for CPUs stands in for
the GPU's: the same function with another device."""

from __future__ import annotations

import dataclasses
import io
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from caption_ray import config
from caption_ray.benchmark.pictures import photograph
from caption_ray.data import decode_near
from caption_ray.data.preparation import Preparation
from caption_ray.data.vocabulary import Vocabulary

SIZE = 64

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def _preparation(**changes: Any) -> Preparation:
    preset = config.coco()
    return Preparation(
        dataclasses.replace(preset.model.encoder, image_size=SIZE, image_fit="crop"),
        dataclasses.replace(preset.data, **changes),
        Vocabulary.from_counts({"a": 9, "picture": 9}, 1, None),
        (0, 7),
    )


def _undecoded(pictures: list[bytes | None], prepare: Preparation, first: int = 0) -> Any:
    rows = [
        prepare.without_inputs(
            {
                "image_id": i,
                "file_name": f"{i}.jpg",
                "captions": ["a picture"],
                "error": None if picture else "gone",
            },
            i,
        )
        for i, picture in enumerate(pictures, first)
    ]
    columns = {name: np.stack([np.asarray(row[name], _dtype(row[name])) for row in rows])
               for name in rows[0]}  # fmt: skip
    return list(pa.array(pictures, pa.binary())), columns


def _dtype(value: Any) -> Any:
    return object if isinstance(value, str) else None


def _decoded(
    pictures: list[bytes | None], prepare: Preparation, device: str | None
) -> decode_near.Columns:
    on = None if device is None else torch.device(device)
    (columns,) = decode_near.decoded([_undecoded(pictures, prepare)], prepare, 2, on)
    columns["inputs"] = np.asarray(torch.as_tensor(columns["inputs"]).cpu())
    return columns


def _encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photographs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [photograph(rng) for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [{"min_crop": 1.0, "flip": False}, {"min_crop": 0.3, "flip": True}],
    ids=["centre", "augmented"],
)
def test_a_device_sees_what_threads_see_but_for_rounding(
    device: str, changes: dict[str, Any]
) -> None:
    prepare = _preparation(**changes)
    pictures = _photographs(9)
    by_threads, by_device = (_decoded([*pictures], prepare, on) for on in (None, device))
    difference = np.abs(by_threads["inputs"].astype(int) - by_device["inputs"])
    assert difference.mean() < 1
    assert difference.max() <= 12
    for name in set(by_threads) - {"inputs"}:
        assert np.array_equal(by_threads[name], by_device[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_device_cannot_take_is_decoded_by_the_cpu(device: str) -> None:
    photo = Image.open(io.BytesIO(_photographs(1)[0]))
    turned = Image.Exif()
    turned[0x0112] = 6
    others: list[bytes | None] = [
        _encoded(photo, "PNG"),
        _encoded(photo.convert("CMYK")),
        _encoded(photo, exif=turned),
        _encoded(photo, "GIF"),
    ]
    jpegs: list[bytes | None] = [_encoded(photo), _encoded(photo.convert("L"))]
    prepare = _preparation(min_crop=0.5)
    by_threads, by_device = (_decoded(others + jpegs, prepare, on) for on in (None, device))
    assert np.array_equal(by_threads["inputs"][:4], by_device["inputs"][:4])
    assert np.abs(by_threads["inputs"].astype(int) - by_device["inputs"]).mean() < 1
    assert not any(by_device["error"])


@pytest.mark.parametrize("device", [None, *DEVICES])
def test_unreadable_pictures_are_named_and_the_others_are_there(device: str | None) -> None:
    good = _photographs(2)
    columns = _decoded([good[0], b"no picture", None, good[1]], _preparation(), device)
    assert [error.split(":")[0] for error in columns["error"]] == ["", "1.jpg", "2.jpg", ""]
    assert columns["inputs"].any((1, 2, 3)).tolist() == [True, False, False, True]
    assert columns["tokens"].any((1, 2)).tolist() == [True, False, False, True]


def test_a_batch_that_the_device_refuses_is_the_cpus_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = _photographs(2)
    cut = whole[1][: len(whole[1]) // 3]
    with caplog.at_level(logging.WARNING):
        columns = _decoded([whole[0], cut], _preparation(), "cpu")
    by_threads = _decoded([whole[0], cut], _preparation(), None)
    assert np.array_equal(columns["inputs"], by_threads["inputs"])
    assert [bool(error) for error in columns["error"]] == [False, True]
    assert "0.jpg, 1.jpg" in caplog.text


def test_batches_come_in_order_and_no_more_than_a_few_ahead() -> None:
    prepare = _preparation()
    picture = _photographs(1)[0]
    asked = 0

    def batches() -> Any:
        nonlocal asked
        for number in range(9):
            asked += 1
            yield _undecoded([picture, picture], prepare, first=2 * number)

    for seen, columns in enumerate(decode_near.decoded(batches(), prepare, 2, torch.device("cpu"))):
        assert columns["number"].tolist() == [2 * seen, 2 * seen + 1]
        assert asked <= seen + 1 + decode_near.AHEAD
    assert asked == 9
