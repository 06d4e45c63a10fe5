"""A user of the endpoint's page: a real browser on the real HTTP application.

If $CAPTION_RAY_SCREENSHOTS names a folder, pictures of the page are saved there.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, Error, Locator, Page, Request, expect, sync_playwright
from starlette.applications import Starlette
from starlette.routing import Mount

from caption_ray.captioning.predictor import Caption, Predictor

SCREENSHOTS_VARIABLE = "CAPTION_RAY_SCREENSHOTS"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 15_000
REQUEST_ID = "request-7"
NO_PICTURE = b"only text\n" * 20

Serve = Callable[..., str]
Visit = Callable[..., "Visitor"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT_MS)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)  # None: playwright's own
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            reason = error.message.splitlines()[0]
            pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}: {reason}")
        yield browser
        browser.close()


@pytest.fixture
def serve(client: Callable[..., Any]) -> Iterator[Serve]:
    """Serves the application on `backend`: `serve(prefix, **settings)` returns the page's URL."""
    running = []

    def start(prefix: str = "", **settings: Any) -> str:
        app = Starlette(routes=[Mount(prefix, client(**settings).app)])
        added = [(b"x-request-id", REQUEST_ID.encode())]

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            """Like Ray's proxy: adds a request id, and the prefix as root path, kept in `path`."""

            async def answer(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], *added]}
                await send(message)

            await app({**scope, "headers": [*scope["headers"], *added]}, receive, answer)

        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            proxy, lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


class Visitor:
    """A user at a browser. Pictures are bytes, or the seed of a made-up one."""

    def __init__(self, page: Page, picture: Callable[..., bytes], predictor: Predictor) -> None:
        self.page, self.picture, self.predictor = page, picture, predictor
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        """Errors in the browser's console, except for its line about each failed request."""
        page.on("filechooser", lambda _: None)  # intercepted from now on, however fast one opens
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", lambda line: self._hear(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self._hear(str(error)))
        page.on("dialog", lambda dialog: self._hear(f"a dialog: {dialog.message}"))
        self.words = page.locator("#caption").get_by_role("button")
        self.alternatives = page.locator("#alternatives").get_by_role("button")
        self.examples = page.locator("#examples").get_by_role("button")
        self.chooser = page.get_by_text("Choose pictures", exact=True)
        self.alert = page.get_by_role("alert")
        self.legend = page.locator("#legend")
        self.heatmap = page.locator("#heatmap")
        self.tiles = page.get_by_role("navigation", name="Pictures of this visit").get_by_role(
            "button"
        )
        self.notice = page.get_by_role("status").and_(page.locator("#notice"))

    def _hear(self, text: str) -> None:
        if not text.startswith("Failed to load resource"):
            self.complaints.append(text)

    def _file(self, picture: int | bytes) -> Any:
        data = picture if isinstance(picture, bytes) else self.picture(picture)
        return {"name": "a", "mimeType": "image/jpeg", "buffer": data}

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=re.compile(name))

    def choose(self, picture: int | bytes) -> None:
        self.page.locator("#file").set_input_files(self._file(picture))

    def choose_all(self, pictures: dict[str, bytes]) -> None:
        """Choose several files, with their names."""
        files: Any = [
            {"name": name, "mimeType": "image/jpeg", "buffer": data}
            for name, data in pictures.items()
        ]
        self.page.locator("#file").set_input_files(files)

    def choose_by(self, act: Callable[[], None], picture: int) -> None:
        """Choose a picture in the browser's own dialog, which `act` opens."""
        with self.page.expect_file_chooser() as dialog:
            act()
        dialog.value.set_files(self._file(picture))

    def caption(self, picture: int | bytes, rank: int = 0) -> Caption:
        """The predictor's caption, if asked for three, as the page does."""
        image = self.predictor.prepare(self._file(picture)["buffer"])[None]
        search = dataclasses.replace(self.predictor.search, beam_size=3)
        return self.predictor.predict(image, search, 3)[0][rank]

    def sees(self, picture: int | bytes, rank: int = 0) -> Any:
        """Expects its caption on the page; returns the words' attention."""
        caption = self.caption(picture, rank)
        expect(self.words).to_have_text(caption.words)
        expect(self.page.locator("#caption")).to_have_text(caption.text)
        expect(self.alert).to_be_empty()
        return caption.attention

    def is_told(self, *texts: str) -> None:
        for text in texts:
            expect(self.alert).to_contain_text(text)
        expect(self.page.locator("#caption")).to_be_hidden()

    def sees_heat(self, look: Any) -> None:
        """Expects the least dimmed pixel in the cell with the largest weight."""
        expect(self.heatmap).to_have_css("opacity", "1")
        pixels = self.heatmap.evaluate(
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )
        side = math.isqrt(len(pixels) // 4)
        alpha = np.reshape(pixels, (side, side, 4))[..., 3] / 255
        peak = np.unravel_index(alpha.argmin(), alpha.shape)
        cell = [int(p * cells / side) for p, cells in zip(peak, look.shape, strict=True)]
        assert cell == [*np.unravel_index(look.argmax(), look.shape)]
        assert alpha.min() < 0.02 and alpha.max() > 0.08

    def sees_no_heat(self) -> None:
        expect(self.heatmap).to_have_css("opacity", "0")

    def shoot(self, name: str) -> None:
        if folder := os.environ.get(SCREENSHOTS_VARIABLE):
            self.page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture
def visit(browser: Browser, picture: Callable[..., bytes], predictor: Predictor) -> Iterator[Visit]:
    """Opens the page: `visit(url, **context)`. Fails on errors and on requests to other hosts."""
    visitors = []

    def visit(url: str, **options: Any) -> Visitor:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        context.set_default_timeout(TIMEOUT_MS)
        visitor = Visitor(context.new_page(), picture, predictor)
        visitors.append((url, visitor))
        visitor.page.goto(url)
        expect(visitor.examples.or_(visitor.page.locator("#token:visible")).first).to_be_visible()
        return visitor

    yield visit
    for url, visitor in visitors:
        visitor.page.context.close()
        own = ("/".join(url.split("/")[:3]) + "/", "blob:", "data:")
        assert [r.url for r in visitor.requests if not r.url.startswith(own)] == []
        assert visitor.complaints == []


@pytest.fixture
def visitor(serve: Serve, visit: Visit) -> Visitor:
    return visit(serve())


def let_it_look(backend: Any, looks: np.ndarray) -> None:
    """Have the backend look like this, (words, rows, columns), at the square in the middle of each
    picture, whatever is in it."""
    predictor = backend.predictor = copy.copy(backend.predictor)
    predictor.encoder_config = dataclasses.replace(predictor.encoder_config, image_fit="crop")
    predict = predictor.predict
    predictor.predict = lambda *asked: [
        [dataclasses.replace(caption, attention=looks) for caption in captions]
        for captions in predict(*asked)
    ]
