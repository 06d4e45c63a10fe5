"""The endpoint's page in a real browser, on the real HTTP application."""

from __future__ import annotations

import asyncio
import copy
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from page_visitor import NO_PICTURE, REQUEST_ID, Serve, Visit, Visitor, let_it_look
from playwright.sync_api import expect

from caption_ray.captioning.predictor import Predictor
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.contract import Answer, UnavailableError

# Captioning -----------------------------------------------------------------------------------


def test_a_chosen_picture_gets_the_predictors_caption(visitor: Visitor) -> None:
    assert visitor.caption(0).words != visitor.caption(2).words
    for picture in (0, 2):
        visitor.choose_by(visitor.chooser.click, picture)
        visitor.sees(picture)
    expect(visitor.page.locator("#latency")).to_have_text(re.compile(r"^Captioned in \d+\sms$"))


def test_words_show_before_the_answer_is_complete(visitor: Visitor, backend: Any) -> None:
    complete, whole = threading.Event(), backend.stream

    async def stream(*asked: Any) -> Any:
        async for part in whole(*asked):
            while isinstance(part, Answer) and not complete.is_set():
                await asyncio.sleep(0.02)
            yield part

    backend.stream = stream
    visitor.choose(2)
    expect(visitor.page.locator("#caption .word")).to_have_text(visitor.caption(2).words)
    expect(visitor.words).to_have_count(0)
    complete.set()
    visitor.sees(2)


def test_a_newer_picture_takes_the_place_of_one_under_way(visitor: Visitor, backend: Any) -> None:
    backend.delay_s = 0.5
    visitor.choose(0)
    while not backend.calls:
        visitor.page.wait_for_timeout(20)
    backend.delay_s = 0.0
    visitor.choose(2)
    visitor.sees(2)
    visitor.page.wait_for_timeout(600)
    visitor.sees(2)


def test_pictures_are_pasted_and_dropped_and_captions_copied(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    visitor = visit(serve(), permissions=["clipboard-read", "clipboard-write"])
    pasted, dropped = visitor.picture(0, "PNG"), visitor.picture(2, "PNG")
    copy_picture = """bytes => navigator.clipboard.write([new ClipboardItem({
        'image/png': new Blob([Uint8Array.from(bytes)], { type: 'image/png' }) })])"""
    visitor.page.evaluate(copy_picture, list(pasted))
    visitor.page.keyboard.press("Control+V")
    visitor.sees(pasted)
    (tmp_path / "picture.png").write_bytes(dropped)
    mouse = visitor.page.context.new_cdp_session(visitor.page)
    data = {"items": [], "files": [str(tmp_path / "picture.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        mouse.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    visitor.sees(dropped)
    visitor.button("^Copy$").click()
    expect(visitor.button("Copied")).to_be_visible()
    copied = visitor.page.evaluate("navigator.clipboard.readText()")
    assert copied == visitor.caption(dropped).text


def test_examples_load_and_can_be_captioned(serve: Serve, visit: Visit) -> None:
    url = serve()
    visitor = visit(url)
    expect(visitor.examples).to_have_count(4)
    visitor.shoot("start")
    visitor.examples.nth(1).click()
    visitor.sees(requests.get(f"{url}examples/scene-2.png", timeout=30).content)
    visitor.shoot("desktop")


def test_alternatives_show_their_probabilities_and_their_words(serve: Serve, visit: Visit) -> None:
    url = serve()
    visitor = visit(url)
    visitor.choose(0)
    asked = f"{url}caption?num_return_sequences=3"
    answers = requests.post(asked, data=visitor.picture(0), timeout=30).json()
    expect(visitor.alternatives).to_have_count(3)
    for rank in (1, 2, 0):
        button = visitor.alternatives.nth(rank)
        expect(button).to_contain_text(answers[rank]["generated_text"])
        percent = float(button.locator(".share").inner_text().removesuffix("\xa0%"))
        assert percent == pytest.approx(100 * math.exp(answers[rank]["log_prob"]), rel=0.05)
        button.click()
        visitor.sees(0, rank)
        expect(button).to_have_attribute("aria-pressed", "true")


# Where the model looked -----------------------------------------------------------------------


def test_each_words_attention_is_shown_until_escape(visitor: Visitor) -> None:
    visitor.choose(2)
    looks = visitor.sees(2)
    assert len({look.argmax() for look in looks}) > 1, "else all might be the first's"
    visitor.sees_no_heat()
    for index, look in enumerate(looks):
        visitor.words.nth(index).hover()
        expect(visitor.legend).to_contain_text(f"“{visitor.caption(2).words[index]}” · looked")
        visitor.sees_heat(look)
    visitor.page.keyboard.press("Escape")
    visitor.sees_no_heat()


def test_the_heat_map_lies_on_what_the_model_saw(visitor: Visitor, backend: Any) -> None:
    """For a wide picture that is the square in its middle, here in cells that are not square."""
    peaks = {(0, 4): "upper right", (2, 0): "lower left", (1, 2): "centre", (0, 2): "top"}
    looks = np.full((6, 3, 5), 0.01, np.float32)
    for look, peak in zip(looks, peaks, strict=False):
        look[peak] = 0.86
    let_it_look(backend, looks)
    visitor.choose(2)
    for index, place in enumerate(peaks.values()):
        visitor.words.nth(index).hover()
        expect(visitor.legend).to_contain_text(f"most at the {place}")
        visitor.sees_heat(looks[index])
    visitor.shoot("attention")
    canvas: Any = visitor.heatmap.bounding_box()
    shown: Any = visitor.page.locator("#picture").bounding_box()
    height = pytest.approx(shown["height"], rel=0.01)
    assert (canvas["width"], canvas["height"], shown["width"] / 1.5) == (height, height, height)
    assert canvas["x"] - shown["x"] == pytest.approx(shown["width"] / 6, rel=0.01)


def test_the_keyboard_alone_is_enough(visitor: Visitor) -> None:
    press = visitor.page.keyboard.press
    press("Tab")
    visitor.choose_by(lambda: press("Enter"), 2)
    looks = visitor.sees(2)
    last = len(looks) - 1
    moves = {"Tab": 0, "ArrowRight": 1, "End": last, "ArrowLeft": last - 1, "Home": 0}
    for key, index in moves.items():
        press(key)
        expect(visitor.words.nth(index)).to_be_focused()
        visitor.sees_heat(looks[index])
    press("Escape")
    visitor.sees_no_heat()
    press("Tab")
    expect(visitor.button("^Copy$")).to_be_focused()


# Screens --------------------------------------------------------------------------------------


def test_a_narrow_phone_needs_no_scrolling_sideways_and_takes_taps(
    serve: Serve, visit: Visit
) -> None:
    screen = {"width": 360, "height": 740}
    visitor = visit(serve(), viewport=screen, is_mobile=True, has_touch=True)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    expect(visitor.page.get_by_text("Take a photo")).to_be_visible()
    assert visitor.page.evaluate(widths) == [360, 360]
    visitor.choose(2)
    looks = visitor.sees(2)
    visitor.words.nth(1).tap()
    visitor.sees_heat(looks[1])
    assert visitor.page.evaluate(widths) == [360, 360]
    visitor.shoot("phone")
    visitor.words.nth(1).tap()
    visitor.sees_no_heat()
    visitor.choose(NO_PICTURE)
    visitor.is_told("not a picture")
    assert visitor.page.evaluate(widths) == [360, 360]


def test_dark_mode_is_dark_and_light_mode_light(serve: Serve, visit: Visit) -> None:
    url, seen = serve(), []
    for scheme in ("dark", "light"):
        visitor = visit(url, color_scheme=scheme)
        visitor.examples.first.click()
        expect(visitor.alternatives).to_have_count(3)
        visitor.shoot(scheme)
        for name in ("backgroundColor", "color"):
            read = f"body => getComputedStyle(body).{name}"
            colour = visitor.page.locator("body").evaluate(read)
            seen.append(sum(map(int, re.findall(r"\d+", colour))) / 765)
    assert seen[0] < 0.2 and seen[1] > 0.8, "dark"
    assert seen[2] > 0.8 and seen[3] < 0.2, "light"


# Errors ---------------------------------------------------------------------------------------


def test_what_is_no_picture_or_a_damaged_one_is_told_and_can_be_replaced(visitor: Visitor) -> None:
    visitor.choose(NO_PICTURE)
    visitor.is_told("This is not a picture we can read", "Choose a JPEG, PNG", REQUEST_ID)
    visitor.choose(visitor.picture(0)[:-300])
    visitor.is_told("This picture cannot be read", "damaged", REQUEST_ID)
    expect(visitor.button("Try again")).to_be_hidden()
    visitor.shoot("error")
    visitor.choose_by(visitor.button("Choose another picture").click, 0)
    visitor.sees(0)


def test_what_is_above_the_limit_and_cannot_be_made_smaller_is_not_even_sent(
    visitor: Visitor, backend: Any
) -> None:
    large = NO_PICTURE * 1000
    visitor.choose(large)
    visitor.is_told("This picture is too large", "The limit is 98\xa0kB.")
    assert not [request for request in visitor.requests if request.method == "POST"]
    visitor.page.route("**/info", lambda route: route.fulfill(status=503, body="{}"))
    visitor.page.reload()
    visitor.choose(large)  # so that only the server knows the limit
    visitor.is_told("This picture is too large", "100000 bytes")
    assert not backend.calls


def test_a_full_queue_is_tried_once_more_when_it_says(visitor: Visitor, backend: Any) -> None:
    backend.raises = QueueFullError(2)
    visitor.choose(0)
    visitor.is_told("Many pictures are waiting", "Trying again in 2\xa0s")
    visitor.is_told("Trying again in 1\xa0s")
    assert len(backend.calls) == 1
    backend.raises = None
    visitor.sees(0)
    backend.raises = QueueFullError(1)
    visitor.choose(2)
    expect(visitor.button("Try again")).to_be_visible()
    visitor.page.wait_for_timeout(1200)
    visitor.is_told("Try again in a moment")
    assert len(backend.calls) == 4, "twice each, never a third time"


@pytest.mark.parametrize("when", ["raises", "raises_late"])
@pytest.mark.parametrize(
    ("error", "texts"),
    [
        (UnavailableError("secret"), ("No captioner is ready", "no captioner can be reached")),
        (asyncio.TimeoutError(), ("This took too long", "no caption after 5 s")),
        (RuntimeError("secret"), ("Something went wrong on the server", "internal error")),
    ],
    ids=["503", "504", "500"],
)
def test_errors_of_the_server_are_told_and_can_be_tried_again(
    visitor: Visitor, backend: Any, error: Exception, texts: tuple[str, ...], when: str
) -> None:
    """Also after the first words, when status 200 has already been sent."""
    setattr(backend, when, error)
    visitor.choose(0)
    visitor.is_told(*texts)
    told = visitor.alert.text_content() or ""
    assert told.count(REQUEST_ID) == 1 and "secret" not in told
    setattr(backend, when, None)
    visitor.button("Try (again|now)").click()
    visitor.sees(0)


def test_a_server_out_of_reach_is_told_and_found_again(visitor: Visitor) -> None:
    visitor.page.context.set_offline(True)
    visitor.choose(0)
    visitor.is_told("The server cannot be reached")
    visitor.page.context.set_offline(False)
    visitor.button("Try again").click()
    visitor.sees(0)


def test_a_token_is_asked_for_sent_and_kept(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("the-right-token-of-today\n")
    visitor = visit(serve(tokens_file=str(tmp_path / "tokens")))
    page, field = visitor.page, visitor.page.get_by_label("Access token")
    visitor.choose(0)
    visitor.is_told("This endpoint asks for a token")
    visitor.shoot("token")
    for token in ("a-wrong-token-of-today", "the-right-token-of-today"):
        expect(field).to_be_focused()
        field.fill(token)
        with page.expect_request("**/caption*") as request:
            page.keyboard.press("Enter")
        assert request.value.all_headers()["authorization"] == f"Bearer {token}"
        if "wrong" in token:
            visitor.is_told("This token was not accepted")
    visitor.sees(0)
    page.reload()
    expect(visitor.examples).to_have_count(4)
    visitor.choose(2)
    visitor.sees(2)


# Safety ---------------------------------------------------------------------------------------


def test_the_policy_keeps_the_page_from_asking_anybody_else(visitor: Visitor) -> None:
    """And the check after every test would notice violations."""
    ask = """url => {
        const script = Object.assign(document.createElement('script'), { textContent: 'alert(1)' });
        document.body.append(script, Object.assign(new Image(), { src: url }));
        return fetch(url).catch(String);
    }"""
    foreign = "http://127.0.0.1:9/"
    assert "Failed to fetch" in visitor.page.evaluate(ask, foreign)
    for directive in ("connect-src", "img-src", "script-src"):
        assert [text for text in visitor.complaints if directive in text]
    assert not [text for text in visitor.complaints if "dialog" in text]
    visitor.complaints.clear()
    visitor.requests[:] = [r for r in visitor.requests if r.url != foreign]


def test_words_cannot_become_markup(visitor: Visitor, backend: Any) -> None:
    evil = "<img/src=x/onerror=alert(1)>"
    predictor = backend.predictor = copy.copy(backend.predictor)
    plain = predictor.vocabulary.words[4:]
    predictor.vocabulary = Vocabulary([evil if word == "above" else word for word in plain])
    visitor.choose(2)
    words = visitor.caption(2).words
    expect(visitor.words).to_have_text([evil if word == "above" else word for word in words])
    visitor.words.nth(words.index("above")).hover()
    expect(visitor.legend).to_contain_text(evil)
    expect(visitor.alternatives.first).to_contain_text(evil)
    visitor.choose(2)  # so that the strip has both captions, too
    expect(visitor.tiles.last).to_contain_text(evil)
    assert visitor.page.locator("[src=x], [onerror]").count() == 0


@pytest.mark.parametrize("path", ["/", "/some/prefix", "/some/prefix/"])
def test_page_and_documentation_work_at_any_prefix(serve: Serve, visit: Visit, path: str) -> None:
    url = serve(path.rstrip("/"))
    visitor = visit(url)
    if not path.endswith("/"):  # proxies may answer there, too, instead of redirecting
        visitor.page.route(url[:-1], lambda route: route.fulfill(response=route.fetch(url=url)))
        visitor.page.goto(url[:-1])
    expect(visitor.examples).to_have_count(4)
    visitor.choose(0)
    visitor.sees(0)
    visitor.page.get_by_role("link", name="API documentation").click()
    operations = visitor.page.locator(".opblock-summary-path")
    for path in ("/caption", "/v1/chat/completions", "/readyz", "/info"):
        expect(operations.get_by_text(path, exact=True)).to_be_visible()
    visitor.shoot("docs")


# On Ray ---------------------------------------------------------------------------------------


def test_on_ray_from_a_picture_to_its_words_and_where_each_looked(
    endpoint: Any, save_run: Callable[..., str], visit: Visit, tmp_path: Path
) -> None:
    uri = save_run(tmp_path / "runs" / "first", image_size=64)
    endpoint.deploy({"storage": str(tmp_path / "runs")})
    visitor = visit(f"{endpoint.url}/")
    visitor.predictor = Predictor.from_uri(uri, torch.device("cpu"))
    visitor.choose_by(visitor.chooser.click, 3)
    looks = visitor.sees(3)
    for index in (0, 2):
        visitor.words.nth(index).hover()
        visitor.sees_heat(looks[index])
    expect(visitor.page.locator("#latency")).to_contain_text("Captioned in ")
    visitor.alternatives.nth(2).click()
    visitor.sees(3, rank=2)
    visitor.choose(NO_PICTURE)
    visitor.is_told("This is not a picture we can read", "Request ")
