"""The endpoint's page for everyone: by ear, by keyboard, at low contrast, on any screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_visitor import NO_PICTURE, REQUEST_ID, Serve, Visit, Visitor
from playwright.sync_api import expect

WIDTHS = (320, 390, 768, 1280, 1920)
TOKEN = "the-right-token-of-today"

# For each visible text and each border of a control: its contrast to what is behind it.
CONTRASTS = """() => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], back) => [r, g, b].map((c, i) => a * c + (1 - a) * back[i]);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(getComputedStyle(e).backgroundColor);
    const page = parse(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    return layers.reverse().reduce((back, layer) => over(parse(layer), back), page);
  };
  const light = colour => {
    const [r, g, b] = colour.map(c => c / 255).map(
      c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const contrast = (front, back) => {
    const [low, high] = [light(over(front, back)), light(back)].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const texts = [], borders = [];
  for (const e of document.body.querySelectorAll('*')) {
    if (!e.checkVisibility() || e.closest('.unseen, script, noscript')) continue;
    const style = getComputedStyle(e), name = `${e.tagName} ${e.id} ${e.className}`;
    if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
      texts.push([name, contrast(parse(style.color), behind(e))]);
    if (e.matches('.plain:not(:disabled), #token, #pick, .working #pick .button'))
      if (parseFloat(style.borderTopWidth))
        borders.push([name, contrast(parse(style.borderTopColor), behind(e.parentElement))]);
    if (e.matches('.button:not(.plain)') && !e.closest('.working #pick'))
      borders.push([name, contrast(parse(style.backgroundColor), behind(e.parentElement))]);
    if (e.matches('button.word:not(.shown)'))
      borders.push([name, contrast(parse(style.textDecorationColor), behind(e))]);
  }
  return [texts, borders];
}"""


def reads(visitor: Visitor) -> str:
    """What a screen reader finds, as lines."""
    return visitor.page.locator("body").aria_snapshot()


# By ear and by keyboard -----------------------------------------------------------------------


def test_examples_are_named_by_what_they_are(
    serve: Serve, visit: Visit, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    visitor = visit(serve())
    for index, count in enumerate(("two", "two", "two", "three")):
        name = f"Example {index + 1}: {count} drawn shapes"
        expect(visitor.examples.nth(index)).to_have_accessible_name(name)
    names = ["000000000697.jpg", "IMG_2041.jpg", "a-day_at  the.beach.jpg", "zoo.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(picture(0))
    visitor = visit(serve(examples=str(tmp_path)))
    titles = ["Example 1", "Example 2", "Example 3: a day at the.beach", "Example 4: zoo"]
    for index, title in enumerate(titles):
        expect(visitor.examples.nth(index)).to_have_accessible_name(title)


def test_a_screen_reader_finds_everything_in_order_and_by_name(visitor: Visitor) -> None:
    start = reads(visitor)
    for line in ('heading "Caption a picture" [level=1]', 'button "Choose pictures"', "status"):
        assert line in start
    for line in (
        "navigation",
        "figure",
        "Most likely captions",
        "Settings",
        "Use this in code",
        'region "Cap',
    ):
        assert line not in start, "nothing that is empty"
    visitor.choose_all({"first.jpg": visitor.picture(0), "second.txt": NO_PICTURE})
    visitor.sees(0)
    expect(visitor.tiles.last).to_have_attribute("data-state", "failed")
    visitor.page.get_by_text("Settings", exact=True).click()
    visitor.page.get_by_text("Use this in code").click()
    words = visitor.caption(0).words
    found = reads(visitor)
    expected = [
        'heading "Caption a picture" [level=1]',
        'navigation "Pictures of this visit"',
        f'button "first.jpg {" ".join(words)}"',
        "Failed: this is not a picture we can read",
        'application "Picture. The arrow keys move over its regions',
        f'img "{" ".join(words)}"',
        'region "Caption"',
        'group "Caption, word by word"',
        *(f'button "{word}"' for word in words),
        'button "Copy as alt text"',
        'heading "Most likely captions" [level=2]',
        "[pressed]",
        'slider "Thoroughness"',
        'slider "Variety"',
        'slider "Longest caption"',
        'tablist "Language"',
        'tab "curl" [selected]',
        'tabpanel "curl"',
        'button "Example 1: two drawn shapes"',
        'link "API documentation"',
    ]
    at = 0
    for line in expected:
        assert line in found[at:], f"{line} after\n{found[:at]}\nin\n{found[at:]}"
        at = found.index(line, at)
    assert not re.search(r"- (button|img|slider|link|tab|textbox)( \[.*\])?:?$", found, re.M), (
        "something has no name"
    )
    expect(visitor.page.locator("#announcement")).to_have_text(" ".join(words))


def test_the_focus_goes_to_the_result_unless_the_user_is_elsewhere(
    visitor: Visitor, backend: Any
) -> None:
    visitor.examples.first.click()
    expect(visitor.page.get_by_role("group", name="Caption, word by word")).to_be_focused()
    visitor.page.keyboard.press("Tab")
    expect(visitor.words.first).to_be_focused()
    backend.delay_s = 0.3
    visitor.choose(0)
    visitor.tiles.first.focus()
    expect(visitor.tiles.last).to_have_attribute("data-state", "done")
    expect(visitor.tiles.first).to_be_focused()


def test_the_technical_line_of_an_error_is_folded(visitor: Visitor) -> None:
    visitor.choose(NO_PICTURE)
    visitor.is_told("This is not a picture we can read")
    line = visitor.alert.get_by_text(REQUEST_ID)
    expect(line).to_be_hidden()
    visitor.alert.get_by_text("Technical details").click()
    expect(line).to_be_visible()
    expect(visitor.page.locator("#stage")).to_be_hidden()  # with nothing to see in it


def test_a_token_can_be_forgotten(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    visitor = visit(serve(tokens_file=str(tmp_path / "tokens")))
    forget = visitor.button("Forget token")
    expect(forget).to_be_hidden()
    visitor.page.get_by_label("Access token").fill(TOKEN)
    visitor.page.keyboard.press("Enter")
    expect(visitor.examples).to_have_count(4)
    visitor.page.reload()
    visitor.choose(0)
    visitor.sees(0)
    forget.click()
    expect(visitor.notice).to_have_text("The token is forgotten.")
    expect(forget).to_be_hidden()
    assert visitor.page.evaluate("sessionStorage.length") == 0
    visitor.choose(2)
    visitor.is_told("This endpoint asks for a token")
    visitor.page.reload()
    expect(visitor.page.get_by_label("Access token")).to_be_visible()


# To see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_the_borders_of_controls_stand_out(
    serve: Serve, visit: Visit, tmp_path: Path, scheme: str
) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    visitor = visit(serve(tokens_file=str(tmp_path / "tokens")), color_scheme=scheme)
    page, seen = visitor.page, []

    def measure() -> None:
        page.mouse.move(0, 0)
        texts, borders = page.evaluate(CONTRASTS)
        seen.append((len(texts), len(borders)))
        assert [(name, ratio) for name, ratio in texts if ratio < 4.5] == []
        assert [(name, ratio) for name, ratio in borders if ratio < 3] == []

    measure()
    page.get_by_label("Access token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(visitor.examples).to_have_count(4)
    visitor.choose_all({"first.jpg": visitor.picture(0), "second.txt": NO_PICTURE})
    visitor.sees(0)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("Use this in code").click()
    page.get_by_label("Longest caption").fill("5")
    expect(visitor.words).to_have_count(5)
    measure()
    visitor.words.nth(1).click()
    measure()
    page.locator("#frame").click()
    expect(page.locator(".lit")).to_have_count(5)
    measure()
    visitor.tiles.last.click()
    page.get_by_text("Technical details").click()
    measure()
    assert min(texts for texts, _ in seen) > 5 and max(borders for _, borders in seen) > 6


@pytest.mark.parametrize("width", WIDTHS)
def test_no_screen_scrolls_sideways_or_leaves_a_tile_alone(
    serve: Serve, visit: Visit, picture: Callable[..., bytes], tmp_path: Path, width: int
) -> None:
    screen: dict[str, Any] = {"viewport": {"width": width, "height": 800}}
    if width < 600:
        screen |= {"is_mobile": True, "has_touch": True}
    for count in (1, 2, 3, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(picture(number))
        visitor = visit(serve(examples=str(folder)), **screen)

        def check(visitor: Visitor = visitor, count: int = count) -> None:
            assert visitor.page.evaluate("document.documentElement.scrollWidth") == width
            tops = visitor.examples.evaluate_all("bs => bs.map(b => b.getBoundingClientRect().top)")
            rows = [tops.count(top) for top in sorted(set(tops))]
            assert sum(rows) == count and len(set(rows)) == 1

        check()
        if count == 4:
            visitor.choose_all({f"{seed}.jpg": visitor.picture(seed) for seed in range(7)})
            visitor.sees(0)
            visitor.page.get_by_text("Settings", exact=True).click()
            visitor.page.get_by_text("Use this in code").click()
            visitor.tiles.last.click()
            visitor.sees(6)
            check()
            visitor.shoot(f"open-{width}")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_that_is_shown_is_empty(visitor: Visitor, width: int) -> None:
    visitor.page.set_viewport_size({"width": width, "height": 800})
    empty = """() => [...document.querySelectorAll('section, nav, figure, form, details, ol, ul')]
        .filter(e => e.checkVisibility() && e.offsetHeight)
        .filter(e => !e.innerText.trim() && !e.querySelector('img'))
        .map(e => e.id)"""
    assert visitor.page.evaluate(empty) == []
    visitor.choose(0)
    visitor.sees(0)
    assert visitor.page.evaluate(empty) == []
    visitor.choose(NO_PICTURE)
    visitor.is_told("This is not a picture we can read")
    assert visitor.page.evaluate(empty) == []
