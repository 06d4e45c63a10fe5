"""What the endpoint's page makes of a caption: attention, alternatives, settings, code, texts."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_visitor import Serve, Visit, Visitor, let_it_look
from playwright.sync_api import expect

from caption_ray.data.vocabulary import Vocabulary
from caption_ray.serving.contract import MAX_BEAMS, MAX_LENGTH

TOKEN = "the-right-token-of-today"
NAME = """it's "a" pïcture $HOME.jpg"""


# Attention ------------------------------------------------------------------------------------


@pytest.fixture
def looks(backend: Any) -> Any:
    """Makes the model look at one cell of 3 x 5 for each word: (0, 4) for the first, and so on.

    The cells cover the square in the middle of the picture.
    """
    looks = np.full((6, 3, 5), 0.01, np.float32)
    for word, cell in enumerate([(0, 4), (2, 0), (1, 2), (1, 2), (0, 2)]):
        looks[word][cell] = 0.86 - 0.2 * (word == 3)
    let_it_look(backend, looks)
    return looks


def shades(visitor: Visitor) -> list[float]:
    """How strongly each word is shaded: 0 without, 1 at most."""
    read = "ws => ws.map(w => w.matches('.lit') ? +w.style.getPropertyValue('--share') : 0)"
    return list(visitor.words.evaluate_all(read))


def place(visitor: Visitor, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell, on the screen."""
    box: Any = visitor.page.locator("#frame").bounding_box()
    left = box["x"] + (box["width"] - box["height"]) / 2
    return left + (column + 0.5) / 5 * box["height"], box["y"] + (row + 0.5) / 3 * box["height"]


def test_a_region_that_is_pointed_at_lights_the_words_that_looked_there_most(
    visitor: Visitor, looks: Any
) -> None:
    visitor.choose(2)
    visitor.sees(2)
    words = visitor.caption(2).words
    for row, column in ((0, 4), (2, 0), (1, 2)):
        visitor.page.mouse.move(*place(visitor, row, column))
        expect(visitor.page.locator("#region")).to_be_visible()
        lit = shades(visitor)
        assert np.argmax(lit) == np.argmax(looks[:6, row, column])
        order = np.argsort(lit)
        shares = looks[: len(words), row, column]
        assert (np.diff(shares[order]) >= 0).all(), "the more it looked, the stronger the shade"
        expect(visitor.legend).to_contain_text(f"most looked at for “{words[np.argmax(lit)]}”")
    expect(visitor.legend).to_have_text(
        "Centre · " + f"most looked at for “{words[2]}” and “{words[3]}”"
    )
    outlined: Any = visitor.page.locator("#region").bounding_box()
    x, y = place(visitor, 1, 2)
    assert outlined["x"] + outlined["width"] / 2 == pytest.approx(x, abs=1)
    assert outlined["y"] + outlined["height"] / 2 == pytest.approx(y, abs=1)
    visitor.shoot("region")
    visitor.page.mouse.move(*place(visitor, 2, 4))
    expect(visitor.legend).to_contain_text("no word looked here in particular")
    box: Any = visitor.page.locator("#frame").bounding_box()
    visitor.page.mouse.move(box["x"] + 5, box["y"] + 5)  # the model was not shown this
    expect(visitor.page.locator("#region")).to_be_hidden()
    assert shades(visitor) == [0] * len(words)


def test_a_tap_on_the_picture_and_its_arrow_keys_do_the_same(
    serve: Serve, visit: Visit, looks: Any
) -> None:
    visitor = visit(serve(), viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    visitor.choose(2)
    visitor.sees(2)
    region = visitor.page.locator("#region")
    visitor.page.touchscreen.tap(*place(visitor, 0, 4))
    expect(region).to_be_visible()
    assert np.argmax(shades(visitor)) == 0
    visitor.shoot("region-phone")
    visitor.words.nth(2).tap()  # from there back to the regions of a word
    expect(region).to_be_hidden()
    visitor.sees_heat(looks[2])
    visitor.page.touchscreen.tap(*place(visitor, 2, 0))
    visitor.sees_no_heat()
    assert np.argmax(shades(visitor)) == 1
    visitor.page.touchscreen.tap(*place(visitor, 2, 0))
    expect(region).to_be_hidden()
    visitor.page.get_by_role("application").focus()
    for key, word in (("ArrowRight", 2), ("ArrowUp", 4)):
        visitor.page.keyboard.press(key)
        expect(region).to_be_visible()
        assert np.argmax(shades(visitor)) == word
    visitor.page.keyboard.press("Escape")
    expect(region).to_be_hidden()


def test_what_was_looked_at_keeps_the_photographs_own_colours(visitor: Visitor, looks: Any) -> None:
    visitor.choose(2)
    visitor.sees(2)
    visitor.words.nth(2).hover()
    visitor.sees_heat(looks[2])
    expect(visitor.page.locator("#picture")).to_have_css("filter", "none")
    read = "c => [...c.getContext('2d').getImageData(64, 64, 1, 1).data]"
    assert visitor.heatmap.evaluate(read)[3] <= 5, "clear"


# Alternatives ---------------------------------------------------------------------------------


def common(first: list[str], second: list[str]) -> int:
    """Words in a longest common subsequence."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common(first[1:], second[1:])
    return max(common(first[1:], second), common(first, second[1:]))


def test_alternatives_mark_the_words_that_are_not_in_the_shown_caption(visitor: Visitor) -> None:
    visitor.choose(0)
    visitor.sees(0)
    marked = 0
    for shown in (0, 2):
        visitor.alternatives.nth(shown).click()
        visitor.sees(0, shown)
        expect(visitor.alternatives.nth(shown).locator("mark")).to_have_count(0)
        for rank in range(3):
            words = visitor.caption(0, rank).words
            alike = common(words, visitor.caption(0, shown).words)
            marks = visitor.alternatives.nth(rank).locator("mark")
            expect(marks).to_have_count(len(words) - alike)
            assert set(marks.all_inner_texts()) <= set(words)
            marked += marks.count()
    assert marked


# Settings -------------------------------------------------------------------------------------


def test_settings_reach_the_endpoint_and_caption_the_shown_picture_anew(
    visitor: Visitor, backend: Any
) -> None:
    visitor.choose(2)
    visitor.sees(2)
    page, defaults = visitor.page, backend.calls[-1]
    page.get_by_text("Settings", exact=True).click()
    beams, variety = page.get_by_label("Thoroughness"), page.get_by_label("Variety")
    longest, back = page.get_by_label("Longest caption"), visitor.button("Back to the defaults")
    expect(back).to_be_disabled()
    for control, value, expected in (
        (beams, "1", {"beam_size": 1, "num_return": 1}),
        (beams, "7", {"beam_size": 7, "num_return": 3}),
        (longest, "4", {"beam_size": 7, "max_length": 4}),
        (variety, "1.5", {"beam_size": None, "temperature": 1.5, "max_length": 4}),
    ):
        with page.expect_response("**/caption*") as response:
            control.fill(value)
        assert response.value.status == 200
        expect(page.locator("#caption")).to_have_attribute("aria-busy", "false")
        sent = dataclasses.asdict(backend.calls[-1])
        assert {name: sent[name] for name in expected} == expected
        expect(visitor.alternatives).to_have_count(0 if value == "1" else 3)
        expect(control).to_be_focused()
    assert len(visitor.words.all()) <= 4
    expect(beams).to_be_disabled()
    visitor.shoot("settings")
    back.click()
    expect(back).to_be_disabled()
    expect(visitor.words).to_have_text(visitor.caption(2).words)
    visitor.sees(2)
    assert backend.calls[-1] == defaults
    assert len(backend.calls) == 6


def test_settings_have_the_endpoints_bounds_and_the_checkpoints_defaults(
    visitor: Visitor, backend: Any
) -> None:
    visitor.choose(2)
    visitor.sees(2)
    read = "inputs => inputs.map(i => [i.id, +i.min, +i.max, +i.value])"
    search = backend.predictor.search
    assert visitor.page.locator("#settings input").evaluate_all(read) == [
        ["beams", 1, MAX_BEAMS, max(3, search.beam_size)],
        ["temperature", 0, 2, search.temperature],
        ["words", 1, MAX_LENGTH, search.max_length],
    ]


def test_a_picture_that_is_returned_to_has_its_settings(visitor: Visitor, backend: Any) -> None:
    visitor.choose(0)
    visitor.sees(0)
    visitor.page.get_by_text("Settings", exact=True).click()
    longest = visitor.page.get_by_label("Longest caption")
    usual = longest.input_value()
    visitor.choose(2)
    visitor.sees(2)
    longest.fill("2")
    expect(visitor.words).to_have_count(2)
    visitor.tiles.first.click()
    visitor.sees(0)
    expect(longest).to_have_value(usual)
    visitor.tiles.last.click()
    expect(visitor.words).to_have_count(2)
    expect(longest).to_have_value("2")
    assert len(backend.calls) == 3


# Code and texts -------------------------------------------------------------------------------


def run(language: str, program: str, folder: Path, token: str) -> str:
    """The best caption that the program prints."""
    environment = {**os.environ, "TOKEN": token, "NO_PROXY": "127.0.0.1"}
    (folder / "program").write_text(program)
    (folder / "program.mjs").write_text(program)
    command = {
        "curl": ["sh", "program"],
        "Python": [sys.executable, "program"],
        "JavaScript": ["node", "program.mjs"],
    }[language]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if language == "curl":
        return str(json.loads(done.stdout)[0]["generated_text"])
    return done.stdout.strip()


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
@pytest.mark.parametrize("asks_for_token", [False, True], ids=["open", "with a token"])
def test_the_program_that_is_shown_gets_the_caption_that_is_shown(
    serve: Serve, visit: Visit, tmp_path: Path, language: str, asks_for_token: bool
) -> None:
    needed = {"curl": "curl", "JavaScript": "node"}.get(language)
    if needed and shutil.which(needed) is None:
        pytest.skip(f"needs {needed}")
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    tokens = {"tokens_file": str(tmp_path / "tokens")} if asks_for_token else {}
    granted = ["clipboard-read", "clipboard-write"]
    visitor = visit(serve("/some/prefix", **tokens), permissions=granted)
    picture = visitor.picture(2)
    (tmp_path / NAME).write_bytes(picture)
    visitor.choose_all({NAME: picture})
    if asks_for_token:
        visitor.page.get_by_label("Access token").fill(TOKEN)
        visitor.page.keyboard.press("Enter")
    visitor.sees(2)
    visitor.page.get_by_text("Use this in code").click()
    visitor.page.get_by_role("tab", name=language).click()
    program = visitor.page.get_by_role("tabpanel", name=language)
    for words in (None, "3"):
        if words is not None:
            visitor.page.get_by_text("Settings", exact=True).click()
            visitor.page.get_by_label("Longest caption").fill(words)
            expect(visitor.words).to_have_count(3)
        shown = visitor.page.locator("#caption").inner_text()
        text = program.inner_text()
        assert TOKEN not in text
        assert ("Authorization" in text) == ("TOKEN" in text) == asks_for_token
        visitor.button("Copy code").click()
        copied = visitor.page.evaluate("navigator.clipboard.readText()")
        assert run(language, copied, tmp_path, TOKEN) == shown
    visitor.shoot(f"code-{language}")


def test_the_tabs_of_the_languages_work_by_keyboard(visitor: Visitor) -> None:
    visitor.choose(2)
    visitor.sees(2)
    visitor.page.get_by_text("Use this in code").click()
    visitor.page.get_by_role("tab", name="curl").focus()
    for key, name in (("ArrowRight", "Python"), ("End", "JavaScript"), ("ArrowRight", "curl")):
        visitor.page.keyboard.press(key)
        tab = visitor.page.get_by_role("tab", name=name, selected=True)
        expect(tab).to_be_focused()
        expect(visitor.page.get_by_role("tab", selected=True)).to_have_count(1)
        expect(visitor.page.get_by_role("tabpanel", name=name)).to_be_visible()


class Alternative(html.parser.HTMLParser):
    """Collects the alternative text of each picture."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append(dict(attributes))


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_the_caption_is_copied_as_an_attribute_of_html(
    serve: Serve, visit: Visit, backend: Any, has_clipboard: bool
) -> None:
    """Also where the browser denies the clipboard, as on pages loaded over plain http."""
    predictor = backend.predictor = copy.copy(backend.predictor)
    evil = '"><b>&amp;'
    plain = predictor.vocabulary.words[4:]
    predictor.vocabulary = Vocabulary([evil if word == "above" else word for word in plain])
    visitor = visit(serve(), permissions=["clipboard-read", "clipboard-write"])
    visitor.choose(2)
    expect(visitor.alternatives).to_have_count(3)
    if not has_clipboard:
        deny = "() => { navigator.clipboard.writeText = () => Promise.reject(); }"
        visitor.page.evaluate(deny)
    visitor.button("Copy as alt text").click()
    expect(visitor.button("^Copied$")).to_be_visible()
    copied = visitor.page.evaluate("navigator.clipboard.readText()")
    (attributes,) = Alternative(f"<img {copied}>").found
    words = [evil if word == "above" else word for word in visitor.caption(2).words]
    assert attributes == {"alt": " ".join(words)}
