"""The page to try the endpoint on, and its examples.

index.html names a style sheet and scripts beside it. The server puts them into its text, so that
the page is one answer: no further requests, which a proxy might lead astray, and a policy that
allows exactly these texts by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fastapi import FastAPI, Response
from PIL import Image
from starlette.exceptions import HTTPException

from caption_ray import storage
from caption_ray.data import shapes, transforms

MAX_EXAMPLES = 4
"""Most example pictures that the page shows."""

NUMBERS = ("no", "one", "two", "three")


class Example(NamedTuple):
    """A picture to try."""

    title: str
    """What it is, in words for those who cannot see it; empty if that is not known."""
    data: bytes


def add(app: FastAPI, examples: str | None) -> None:
    """Add the page's routes to the app. Raises ValueError if the examples cannot be read."""
    html = read_page()
    policy = content_security_policy(html)
    pictures = _drawn_scenes() if examples is None else _pictures_in(examples)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return Response(html, media_type="text/html", headers=headers)

    @app.get("/examples", include_in_schema=False)
    async def list_examples() -> dict[str, list[dict[str, str]]]:
        found = [
            {"name": name, "title": example.title, "url": f"examples/{quote(name)}"}
            for name, example in pictures.items()
        ]
        return {"examples": found}

    @app.get("/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in pictures:
            raise HTTPException(404)
        data = pictures[name].data
        kind = Image.MIME.get(str(Image.open(io.BytesIO(data)).format))
        return Response(data, media_type=kind)


def read_page() -> str:
    """index.html with the texts of the style sheet and the scripts that it names."""
    folder = Path(__file__).parent

    def text(match: re.Match[str]) -> str:
        return (folder / match[1]).read_text(encoding="utf-8")

    html = (folder / "index.html").read_text(encoding="utf-8")
    html = re.sub(
        r'<link rel="stylesheet" href="([\w.]+)">', lambda m: f"<style>\n{text(m)}</style>", html
    )
    return re.sub(
        r'<script src="([\w.]+)"></script>', lambda m: f"<script>\n{text(m)}</script>", html
    )


def content_security_policy(html: str) -> str:
    """A policy that allows only the page's own style and scripts, and requests to this server."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)

    return (
        f"default-src 'none'; style-src {digests('style')}; script-src {digests('script')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _drawn_scenes() -> dict[str, Example]:
    """Scenes of the embedded data set: PNG files by name. The README asks for scene-1.png."""
    pictures = {}
    for number in range(MAX_EXAMPLES):
        scene, buffer = shapes.scene("val", number, seed=0), io.BytesIO()
        shapes.draw(scene).save(buffer, "PNG")
        count = len(scene.figures)
        title = f"{NUMBERS[count]} drawn shape{'s' if count > 1 else ''}"
        pictures[f"scene-{number + 1}.png"] = Example(title, buffer.getvalue())
    return pictures


def _pictures_in(folder: str) -> dict[str, Example]:
    """The first pictures in a folder or bucket prefix, by name. Raises ValueError."""
    uri = storage.resolve(folder)
    pictures = {}
    try:
        for file in storage.list_files(uri)[:MAX_EXAMPLES]:
            data = storage.read_bytes(file)
            transforms.image_size(data)
            name = storage.name(file)
            pictures[name] = Example(title_of(name), data)
    except transforms.ImageError as error:
        raise ValueError(f"examples is {folder!r}: {file} is not a picture: {error}") from error
    except OSError as error:
        raise ValueError(f"examples is {folder!r}: {error}") from error
    if not pictures:
        raise ValueError(f"examples is {folder!r}: there are no files; name a folder of pictures")
    return pictures


def title_of(name: str) -> str:
    """A file's name as words; empty if it has none, as a camera's numbers do not."""
    words = re.sub(r"[\s_-]+", " ", re.sub(r"\.\w+$", "", name)).strip()
    is_numbered = re.fullmatch(r"(?i)(img|dsc\w?|dscn|pxl|image|photo|picture)?[\W\d]*", words)
    return "" if is_numbered else words
