"""How pictures come to the endpoint's page: made smaller, several at a time, pasted and dropped."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from page_visitor import NO_PICTURE, Serve, Visit, Visitor
from PIL import Image, ImageOps, features
from playwright.sync_api import expect

from caption_ray.serving.batching import QueueFullError

LONGEST_SIDE = 2048
LINK = "https://example.org/beach.jpg"


@pytest.fixture
def received(backend: Any) -> list[bytes]:
    """The pictures that arrived at the backend, in order."""
    arrived: list[bytes] = []
    stream = backend.stream

    def watch(picture: bytes, options: Any) -> Any:
        arrived.append(picture)
        return stream(picture, options)

    backend.stream = watch
    return arrived


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def blocks(rows: int, columns: int, side: int, seed: int = 0) -> Any:
    """A picture of coloured blocks, with some noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 200, (rows, columns, 3), np.uint8)
    pixels = colours.repeat(side, 0).repeat(side, 1)
    pixels += rng.integers(0, 50, pixels.shape[:2], np.uint8)[..., None]
    return pixels


def drop(visitor: Visitor, **data: Any) -> None:
    mouse = visitor.page.context.new_cdp_session(visitor.page)
    dragged = {"items": [], "files": [], "dragOperationsMask": 1, **data}
    for kind in ("dragEnter", "dragOver", "drop"):
        mouse.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": dragged})


def paste(visitor: Visitor, text: str) -> None:
    visitor.page.evaluate("text => navigator.clipboard.writeText(text)", text)
    visitor.page.keyboard.press("Control+V")


# Making pictures smaller ----------------------------------------------------------------------


def test_a_phones_photo_of_50_megapixels_is_made_smaller_and_arrives_upright(
    serve: Serve, visit: Visit, received: list[bytes], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    photo = encoded(blocks(6, 8, 1020), "JPEG", quality=93, exif=exif)
    limit = 10 * 2**20
    assert len(photo) > 2 * limit
    (tmp_path / "photo.jpg").write_bytes(photo)
    visitor = visit(serve(max_body_bytes=limit, max_buffered_bytes=10 * limit))
    visitor.page.locator("#file").set_input_files(tmp_path / "photo.jpg")
    visitor.sees(photo)
    (sent,) = received
    assert len(sent) < limit
    arrived = Image.open(io.BytesIO(sent))
    assert (arrived.format, arrived.size) == ("JPEG", (1536, LONGEST_SIDE))
    assert arrived.getexif().get(0x0112, 1) == 1
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).reduce(4)
    small = [np.asarray(image.resize((60, 80)), float) for image in (arrived, upright)]
    assert np.abs(small[0] - small[1]).mean() < 3
    ratio = visitor.page.locator("#picture").evaluate("i => i.naturalWidth / i.naturalHeight")
    assert ratio == 0.75


def test_what_is_small_enough_is_sent_as_it_is(visitor: Visitor, received: list[bytes]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(blocks(3, 5, 50), "JPEG", exif=exif)
    wide = encoded(np.zeros((20, LONGEST_SIDE, 3), np.uint8), "PNG")
    for picture in (turned, wide):
        visitor.choose(picture)
        visitor.sees(picture)
    assert received == [turned, wide]


def test_what_is_above_the_servers_limit_is_encoded_until_it_fits(
    visitor: Visitor, received: list[bytes]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    for picture in (encoded(noise, "PNG"), encoded(noise.repeat(4, 0).repeat(4, 1), "PNG")):
        assert len(picture) > 100_000
        visitor.choose(picture)
        expect(visitor.alternatives).to_have_count(3)
        expect(visitor.page.locator("#caption")).to_have_attribute("aria-busy", "false")
        sent = Image.open(io.BytesIO(received[-1]))
        assert len(received[-1]) <= 100_000
        assert sent.format == "JPEG"
        assert sent.width / sent.height == pytest.approx(5 / 3, rel=0.01)
        visitor.sees(received[-1])
    assert Image.open(io.BytesIO(received[0])).width <= 500, "never larger than it was"


def test_what_is_transparent_becomes_white_as_on_the_server(
    visitor: Visitor, received: list[bytes]
) -> None:
    clear = encoded(np.zeros((100, 2100, 4), np.uint8), "PNG")
    visitor.choose(clear)
    visitor.sees(clear)
    assert np.asarray(Image.open(io.BytesIO(received[0]))).min() > 250


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_avif_is_made_smaller_by_a_browser_that_reads_it(
    serve: Serve, visit: Visit, received: list[bytes]
) -> None:
    visitor = visit(serve(max_body_bytes=10**7, max_buffered_bytes=10**8))
    picture = encoded(blocks(3, 5, 500), "AVIF")
    visitor.choose(picture)
    expect(visitor.alternatives).to_have_count(3)
    sent = Image.open(io.BytesIO(received[0]))
    assert (sent.format, sent.size) == ("JPEG", (LONGEST_SIDE, 1229))


def test_what_the_browser_cannot_read_the_server_may(
    visitor: Visitor, received: list[bytes]
) -> None:
    for kind in ("HEIF", "TIFF"):
        picture = encoded(blocks(2, 3, 40), kind)
        visitor.choose(picture)
        visitor.sees(picture)
        assert received[-1] == picture
        expect(visitor.page.get_by_text("This browser cannot show")).to_be_visible()


def test_a_large_picture_that_is_damaged_is_told_and_not_completed(
    serve: Serve, visit: Visit
) -> None:
    """Browsers show what there is of it, and leave the rest grey."""
    visitor = visit(serve(max_body_bytes=10**7, max_buffered_bytes=10**8))
    whole = encoded(blocks(3, 5, 500), "JPEG", quality=40)
    visitor.choose(whole[: len(whole) // 2])
    visitor.is_told("This picture cannot be read", "damaged")


# Several pictures -----------------------------------------------------------------------------


def test_several_pictures_are_captioned_in_turn_and_each_keeps_its_result(
    visitor: Visitor, received: list[bytes]
) -> None:
    pictures = [visitor.picture(seed) for seed in (0, 2, 3)]
    visitor.choose_all({"a.jpg": pictures[0], "b.jpg": pictures[1], "c.txt": NO_PICTURE,
                        "d.jpg": pictures[2]})  # fmt: skip
    expect(visitor.tiles).to_have_count(4)
    for index in (0, 1, 3):
        expect(visitor.tiles.nth(index)).to_have_attribute("data-state", "done")
    expect(visitor.tiles.nth(2)).to_contain_text("Failed: this is not a picture")
    assert received == [pictures[0], pictures[1], NO_PICTURE, pictures[2]]
    visitor.sees(pictures[0])
    expect(visitor.tiles.nth(0)).to_have_attribute("aria-current", "true")
    for index, picture in ((3, pictures[2]), (1, pictures[1]), (0, pictures[0])):
        visitor.tiles.nth(index).click()
        visitor.sees(picture)
        expect(visitor.tiles.nth(index)).to_contain_text(visitor.caption(picture).text)
        expect(visitor.tiles.nth(index)).to_have_attribute("aria-current", "true")
    visitor.tiles.nth(2).click()
    visitor.is_told("This is not a picture we can read")
    visitor.shoot("strip")
    assert len(received) == 4, "whoever returns to a picture sends nothing"


def test_each_thumbnail_says_whether_its_picture_waits_and_the_one_shown_does_not_wait(
    visitor: Visitor, backend: Any
) -> None:
    held = visitor.picture(0)
    go_on = asyncio.Event()
    stream = backend.stream

    async def hold(picture: bytes, options: Any) -> Any:
        while picture == held and not go_on.is_set():
            await asyncio.sleep(0.02)
        async for part in stream(picture, options):
            yield part

    backend.stream = hold
    visitor.choose_all({f"{seed}.jpg": visitor.picture(seed) for seed in (0, 2, 3)})
    expect(visitor.tiles.nth(0)).to_contain_text("Looking")
    for index in (1, 2):
        expect(visitor.tiles.nth(index)).to_contain_text("Waiting")
    visitor.tiles.nth(2).click()
    visitor.sees(3)
    expect(visitor.tiles.nth(0)).to_have_attribute("data-state", "working")
    expect(visitor.tiles.nth(1)).to_have_attribute("data-state", "waiting")
    go_on.set()
    for index in range(3):
        expect(visitor.tiles.nth(index)).to_have_attribute("data-state", "done")
    visitor.sees(3)
    visitor.tiles.first.click()
    visitor.sees(0)


def test_a_busy_server_is_not_asked_for_the_others_before_it_says(
    visitor: Visitor, backend: Any
) -> None:
    backend.raises = QueueFullError(2)
    visitor.choose_all({f"{seed}.jpg": visitor.picture(seed) for seed in (0, 2)})
    visitor.is_told("Trying again in 1\xa0s")
    assert len(backend.calls) == 1
    backend.raises = None
    visitor.sees(0)
    expect(visitor.tiles.nth(1)).to_have_attribute("data-state", "done")
    assert len(backend.calls) == 3


def test_all_pictures_that_wait_for_a_token_are_captioned_with_it(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("the-right-token-of-today\n")
    visitor = visit(serve(tokens_file=str(tmp_path / "tokens")))
    visitor.choose_all({f"{seed}.jpg": visitor.picture(seed) for seed in (0, 2)})
    visitor.is_told("This endpoint asks for a token")
    visitor.tiles.nth(1).click()  # which the server is asked for, and refuses, too
    expect(visitor.tiles.nth(1)).to_have_attribute("data-state", "failed")
    visitor.is_told("This endpoint asks for a token")
    visitor.page.get_by_label("Access token").fill("the-right-token-of-today")
    visitor.page.keyboard.press("Enter")
    visitor.sees(2)
    expect(visitor.tiles.first).to_have_attribute("data-state", "done")
    visitor.tiles.first.click()
    visitor.sees(0)


def test_the_strip_is_the_history_of_this_visit_only(
    serve: Serve, visit: Visit, received: list[bytes]
) -> None:
    url = serve()
    visitor = visit(url)
    expect(visitor.tiles).to_have_count(0)
    visitor.examples.nth(1).click()
    example = requests.get(f"{url}examples/scene-2.png", timeout=30).content
    visitor.sees(example)
    visitor.choose(2)
    visitor.sees(2)
    visitor.examples.nth(1).click()  # which was captioned before
    visitor.sees(example)
    expect(visitor.tiles).to_have_count(2)
    expect(visitor.tiles.first).to_have_attribute("aria-current", "true")
    assert len(received) == 2
    visitor.page.reload()
    expect(visitor.examples).to_have_count(4)
    expect(visitor.tiles).to_have_count(0)
    kept = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert visitor.page.evaluate(kept) == [0, 0, ""]


# Pasted and dropped ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_working", [False, True], ids=["at the start", "beside a picture"])
def test_a_link_or_text_gets_an_answer_in_words(
    serve: Serve, visit: Visit, is_working: bool
) -> None:
    visitor = visit(serve(), permissions=["clipboard-read", "clipboard-write"])
    if is_working:
        visitor.choose(0)
        visitor.sees(0)
    acts: list[tuple[Callable[[], None], str]] = [
        (lambda: paste(visitor, LINK), "That was a link, not a picture"),
        (lambda: paste(visitor, "two words"), "That was text, not a picture"),
        (lambda: drop(visitor, items=[{"mimeType": "text/uri-list", "data": LINK}]), "a link"),
        (lambda: paste(visitor, "data:text/html,<b>hello"), "That was"),
    ]
    for act, told in acts:
        visitor.page.keyboard.press("Escape")
        expect(visitor.notice).to_be_empty()
        act()
        expect(visitor.notice).to_contain_text(told)
        expect(visitor.notice).to_contain_text(re.compile("Copy .* and paste it, or .* its file"))
    if is_working:
        visitor.sees(0)
        visitor.shoot("link")
    visitor.choose(2)
    visitor.sees(2)
    expect(visitor.notice).to_be_empty()


def test_a_picture_in_a_data_url_is_taken(
    serve: Serve, visit: Visit, received: list[bytes]
) -> None:
    visitor = visit(serve(), permissions=["clipboard-read", "clipboard-write"])
    picture = visitor.picture(2, "PNG")
    encode = "bytes => btoa(String.fromCharCode(...bytes))"
    paste(visitor, "data:image/png;base64," + visitor.page.evaluate(encode, list(picture)))
    visitor.sees(picture)
    assert received == [picture]


def test_files_dropped_together_are_all_taken(visitor: Visitor, tmp_path: Path) -> None:
    files = []
    for seed in (0, 2):
        (tmp_path / f"{seed}.jpg").write_bytes(visitor.picture(seed))
        files.append(str(tmp_path / f"{seed}.jpg"))
    (tmp_path / "notes.txt").write_bytes(NO_PICTURE)
    (tmp_path / "folder").mkdir()
    drop(visitor, files=[*files, str(tmp_path / "notes.txt"), str(tmp_path / "folder")])
    visitor.sees(0)
    expect(visitor.tiles).to_have_count(4)
    expect(visitor.tiles.nth(1)).to_have_attribute("data-state", "done")
    for index in (2, 3):
        expect(visitor.tiles.nth(index)).to_contain_text("Failed")
