"""What is shown of a checkpoint's captions, on the page and in a tracker alike."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption_ray.evaluation import report

WORDS = ["a", "red", "star"]


def thumbnail(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def record(number: int, score: float) -> dict[str, Any]:
    attention = np.random.default_rng(number).random((3, 2, 2), np.float32)
    return {
        "file": f"{number}.jpg",
        "caption": f"a red star {number}",
        "words": WORDS,
        "references": [f"one {number}", f"two {number}"],
        "scores": {"CIDEr-D": score, "BLEU-4": 0.5, "ROUGE-L": 0.75},
        "attention": attention / attention.sum((1, 2), keepdims=True),
        "box": (0.0, 0.0, 1.0, 1.0),
        "thumbnail": thumbnail(number),
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Scores in no order; twenty, so that some are neither among the best nor the worst."""
    scores = np.random.default_rng(0).permutation(20) / 10
    return [record(number, float(score)) for number, score in enumerate(scores)]


def pictures(page: str, kind: str = "jpeg") -> list[bytes]:
    found = re.findall(rf'src="data:image/{kind};base64,([^"]+)"', page)
    return [base64.b64decode(text) for text in found]


def test_the_best_and_the_worst_are_those_of_highest_and_lowest_score(
    records: list[dict[str, Any]],
) -> None:
    table = report.tables(records)["captions"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["CIDEr-D"] for row in rows if row["which"] == "best"] == [
        1.9, 1.8, 1.7, 1.6, 1.5, 1.4
    ]  # fmt: skip
    assert [row["CIDEr-D"] for row in rows if row["which"] == "worst"] == [
        0.0, 0.1, 0.2, 0.3, 0.4, 0.5
    ]  # fmt: skip
    by_file = {one["file"]: one for one in records}
    for row in rows:
        of = by_file[row["file"]]
        assert row["caption"] == of["caption"] and row["picture"] == of["thumbnail"]
        assert row["references"] == "\n".join(of["references"])


def test_few_captions_are_not_shown_twice(records: list[dict[str, Any]]) -> None:
    table = report.tables(records[:7])["captions"]
    assert len({row[-1] for row in table.rows}) == len(table.rows) == 7


def test_the_page_and_the_tables_show_the_same_pictures(records: list[dict[str, Any]]) -> None:
    tables = report.tables(records)
    shown = pictures(report.page("run", {}, {}, records, {}, {}))
    cells = [cell for table in tables.values() for row in table.rows for cell in row]
    assert shown == [cell for cell in cells if isinstance(cell, bytes)]
    assert len(shown) == 12 + 6 * len(WORDS)
    assert [row[1] for row in tables["attention"].rows] == WORDS * 6


def test_a_heat_map_is_brightest_where_the_word_looked() -> None:
    one = record(0, 1.0)
    one["thumbnail"] = thumbnail(0)
    one["attention"] = np.zeros((3, 2, 2), np.float32)
    for word, cell in enumerate([(0, 0), (0, 1), (1, 1)]):
        one["attention"][word][cell] = 1
    for (word, picture), (row, column) in zip(
        report.heat_maps(one), [(0, 0), (0, 1), (1, 1)], strict=True
    ):
        level = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float)[..., 0]
        quarters = level.reshape(2, 15, 2, 20).mean((1, 3))
        assert quarters.argmax() == 2 * row + column, word


def test_captions_without_attention_have_no_heat_maps(records: list[dict[str, Any]]) -> None:
    plain = [{**one, "attention": None, "thumbnail": None} for one in records]
    tables = report.tables(plain)
    assert tables["attention"].rows == []
    assert len(tables["captions"].rows) == 12
    assert "Where each word looked" not in report.page("run", {}, {}, plain, {}, {})


@pytest.mark.parametrize(
    ("history", "headings"),
    [
        ([], []),
        ([{"step": 1, "train/loss": 2.0}], ["Loss"]),
        (
            [{"step": 1, "train/loss": 2.0}, {"step": 2, "val/loss": 1.0, "val/CIDEr-D": 0.4}],
            ["Loss", "CIDEr-D"],
        ),
    ],
)
def test_curves_are_drawn_of_what_the_run_measured(
    history: list[dict[str, float]], headings: list[str], records: list[dict[str, Any]]
) -> None:
    curves = report.curves(history, "my-run")
    assert list(curves) == headings
    page = report.page("run", {}, {}, records, curves, {})
    assert pictures(page, "png") == list(curves.values())
    for heading in headings:
        assert f"<h2>{heading}</h2>" in page


def test_the_cider_curve_goes_through_its_points() -> None:
    """Higher scores are higher up: the marker of the last step is above that of the first."""
    history = [{"step": step, "val/CIDEr-D": 0.2 * step} for step in (1, 2, 3)]
    pixels = np.asarray(
        Image.open(io.BytesIO(report.curves(history, "r")["CIDEr-D"])).convert("RGB")
    )
    rows, columns = np.nonzero((pixels == (31, 119, 180)).all(-1))  # matplotlib's first colour
    middle = (columns.min() + columns.max()) / 2
    assert rows[columns < middle - 200].mean() > rows[columns > middle + 200].mean()
