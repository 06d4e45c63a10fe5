"""Bad and odd input, and each answer: a status and a message with the reason, never a stack trace.

Pictures are sent as raw bytes, in JSON, in a form and through `/v1`: only their content counts.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

Clients = Callable[..., TestClient]
Refused = Callable[..., None]

CHAT = "/v1/chat/completions"
ACCEPTED = "JPEG, PNG, WEBP, GIF, BMP, TIFF"
NO_FORMAT = f"no picture in an accepted format: {ACCEPTED}"
LIMIT = 100_000  # bytes of a body, in these tests


# Pictures -------------------------------------------------------------------------------------


def encoded(
    kind: str, mode: str = "RGB", image: Image.Image | None = None, **options: Any
) -> bytes:
    """A noisy picture, 60 wide and 40 high, as a file."""
    if image is None:
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes = b"", bits: int = 1, colour: int = 0) -> bytes:
    """A PNG with this header and any pixel data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(pixels, 9))
        + chunk(b"IEND", b"")
    )


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def gif_frame(width: int, height: int) -> bytes:
    """A GIF whose first frame is larger than the whole."""
    return patched(GIF, GIF.index(b",", 13 + 3 * 256) + 5, struct.pack("<HH", width, height))


def resized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = encoded("JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def pages(*images: Image.Image) -> bytes:
    return encoded("TIFF", image=images[0], save_all=True, append_images=images[1:])


def bad_second_page() -> bytes:
    """A TIFF of two pages, of which the first has a bad pointer to the second."""
    image = Image.new("RGB", (60, 40), "red")
    data, first = pages(image, image), len(pages(image))
    return data[: first + 20]


def broken_exif(kind: str) -> bytes:
    return encoded(kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("picture.jpg", encoded("JPEG"))
    return buffer.getvalue()


PNG, JPEG, GIF = encoded("PNG"), encoded("JPEG"), encoded("GIF")
WEBP, BMP, TIFF = encoded("WEBP"), encoded("BMP"), encoded("TIFF")
GREY16 = np.random.default_rng(0).integers(0, 65535, (40, 60), dtype=np.uint16)
FLOATS = Image.fromarray(np.random.default_rng(0).random((40, 60), np.float32))

REFUSED: dict[str, tuple[bytes, int, str]] = {
    # cut off
    "jpeg-4-bytes": (JPEG[:4], 422, "the header is damaged"),
    "jpeg-40-bytes": (JPEG[:40], 422, "Truncated"),
    "jpeg-half": (JPEG[: len(JPEG) // 2], 422, "JPEG of 60 x 40 cannot be decoded: "),
    "jpeg-without-end": (JPEG[:-2], 422, "JPEG of 60 x 40 cannot be decoded: "),
    "png-12-bytes": (PNG[:12], 422, "the header is damaged"),
    "png-40-bytes": (PNG[:40], 422, "the header is damaged"),
    "png-half": (PNG[: len(PNG) // 2], 422, "PNG of 60 x 40 cannot be decoded: "),
    "webp-12-bytes": (WEBP[:12], 422, "the header is damaged"),
    "webp-half": (WEBP[: len(WEBP) // 2], 422, "cannot be read: "),
    "webp-without-end": (WEBP[:-2], 422, "cannot be read: "),
    "gif-4-bytes": (GIF[:4], 422, "the header is damaged"),
    "gif-half": (GIF[: len(GIF) // 2], 422, "GIF of 60 x 40 cannot be decoded: "),
    "bmp-40-bytes": (BMP[:40], 422, "Truncated"),
    "bmp-half": (BMP[: len(BMP) // 2], 422, "BMP of 60 x 40 cannot be decoded: "),
    "bmp-without-end": (BMP[:-2], 422, "BMP of 60 x 40 cannot be decoded: "),
    "tiff-12-bytes": (TIFF[:12], 422, "the header is damaged"),
    "tiff-half": (TIFF[: len(TIFF) // 2], 422, "TIFF of 60 x 40 cannot be decoded: "),
    "tiff-without-end": (TIFF[:-2], 422, "TIFF of 60 x 40 cannot be decoded: "),
    # too short to recognise their format
    "png-4-bytes": (PNG[:4], 415, NO_FORMAT),
    "webp-4-bytes": (WEBP[:4], 415, NO_FORMAT),
    "bmp-12-bytes": (BMP[:12], 422, "the header is damaged"),
    "one-byte": (b"\xff", 415, NO_FORMAT),
    # damaged
    "png-crc-of-header": (patched(PNG, 29, b"\0\0\0\0"), 422, "the header is damaged"),
    "png-crc-of-pixels": (patched(PNG, 33 + 4 + 9, b"\0" * 9), 422, "PNG of 60 x 40"),
    "png-without-pixels": (png(60, 40), 422, "PNG of 60 x 40"),
    "png-unknown-bit-depth": (png(60, 40, bits=7), 422, "the header is damaged"),
    "jpeg-damaged-header": (patched(JPEG, 4, b"\xff\xff" * 8), 422, "cannot be read: "),
    "jpeg-only-markers": (b"\xff\xd8\xff" * 400, 422, "the header is damaged"),
    "webp-damaged": (patched(WEBP, 20, b"\0" * 20), 422, "cannot be read: "),
    "gif-damaged-header": (b"GIF89a" + b"\xff" * 40, 422, "cannot be read: "),
    "tiff-loop-of-pages": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", 422, "the header is damaged"),
    "bmp-unknown-header": (patched(BMP, 14, b"\x07\0\0\0"), 422, "Unsupported BMP header"),
    # too many pixels, or none
    "png-bomb-of-18-kb": (png(12_000, 12_000, bytes(1501 * 12_000)), 422, "12000 x 12000 are more"),
    "png-10000": (png(10_000, 10_000), 422, "10000 x 10000 are more than 64000000 pixels"),
    "png-long-line": (png(1, 64_000_001), 422, "1 x 64000001 are more than 64000000 pixels"),
    "png-2-to-31": (png(2**31 - 1, 2**31 - 1), 422, "more than 64000000 pixels"),
    "gif-65535": (patched(GIF, 6, b"\xff" * 4), 422, "more than 64000000 pixels"),
    "gif-frame-65535": (gif_frame(65_535, 65_535), 422, "more than 64000000 pixels"),
    "gif-frame-9000": (gif_frame(9000, 9000), 422, "9000 x 9000 are more"),
    "jpeg-65535": (resized_jpeg(65_535, 65_535), 422, "more than 64000000 pixels"),
    "bmp-10000": (patched(BMP, 18, struct.pack("<II", 10_000, 10_000)), 422, "10000 x 10000"),
    "png-no-width": (png(0, 40), 422, "cannot be read: "),
    "jpeg-no-width": (resized_jpeg(0, 40), 422, "cannot be read: "),
    "bmp-no-size": (patched(BMP, 18, bytes(8)), 422, "the header is damaged"),
    # misleading metadata
    "png-icc-of-5-mb": (encoded("PNG", icc_profile=bytes(5_000_000)), 422, "too large"),  # packed
    # no fixed white point
    "tiff-of-floats": (encoded("TIFF", image=FLOATS), 422, "TIFF with 32 bits a channel"),
    # not pictures, or in a format that is not accepted
    "text": (b"hello, this is no picture", 415, NO_FORMAT),
    "html": (b"<!doctype html><html><body><img src='a.png'></body></html>", 415, NO_FORMAT),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", 415, NO_FORMAT),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 415, NO_FORMAT),
    "pdf": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", 415, NO_FORMAT),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), 422, "the header is damaged"),
    "avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(64), 422, "the header is damaged"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64), 415, NO_FORMAT),
    "zip": (archive(), 415, NO_FORMAT),
    "gzip": (gzip.compress(JPEG), 415, NO_FORMAT),
    "ico": (encoded("ICO"), 415, NO_FORMAT),
    "ppm": (encoded("PPM"), 415, NO_FORMAT),
    "wave-in-riff": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(32), 415, NO_FORMAT),
    "zeros": (bytes(1000), 415, NO_FORMAT),
    "newline-and-jpeg": (b"\n" + JPEG, 415, NO_FORMAT),
}  # fmt: skip

ORIENTATION_99 = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63" + bytes(6)

CAPTIONED: dict[str, bytes] = {
    "png-without-end": PNG[:-12],  # but all pixels are present
    "gif-without-end": GIF[:-1],
    "gif-no-size": patched(GIF, 6, bytes(4)),  # its frame has one
    "jpeg-and-rubbish": JPEG + bytes(500),
    "jpeg-broken-exif": broken_exif("JPEG"),
    "png-broken-exif": broken_exif("PNG"),
    "webp-broken-exif": broken_exif("WEBP"),
    "jpeg-orientation-99": encoded("JPEG", exif=ORIENTATION_99),
    "jpeg-icc-nonsense": encoded("JPEG", icc_profile=b"nonsense" * 100),
    "jpeg-icc-large": encoded("JPEG", icc_profile=bytes(70_000)),  # more than fits in one marker
    "tiff-bad-second-page": bad_second_page(),
    "jpeg-cmyk": encoded("JPEG", "CMYK"),
    "jpeg-grey": encoded("JPEG", "L"),
    "jpeg-progressive": encoded("JPEG", progressive=True),
    "png-16-bit": encoded("PNG", image=Image.fromarray(GREY16)),
    "png-1-bit": encoded("PNG", "1"),
    "png-palette": encoded("PNG", "P", transparency=3),
    "png-alpha": encoded("PNG", "RGBA"),
    "png-grey-alpha": encoded("PNG", "LA"),
    "tiff-cmyk": encoded("TIFF", "CMYK"),
    "tiff-1-bit-fax": encoded("TIFF", "1", compression="group4"),
    "webp-alpha": encoded("WEBP", "RGBA"),
    "webp-lossless": encoded("WEBP", lossless=True),
    "gif-animated": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "one-pixel": encoded("PNG", image=Image.new("RGB", (1, 1))),
    "one-line": encoded("PNG", image=Image.new("1", (30_000, 1))),
}  # fmt: skip


def ways(data: bytes) -> dict[str, Callable[[TestClient], Any]]:
    """The same picture sent in every way, each with a wrong declaration of its type."""
    text = base64.b64encode(data).decode()
    url = {"url": f"data:image/png;base64,{text}"}
    content = [{"type": "image_url", "image_url": url}]
    chat = {"model": "caption_ray", "messages": [{"role": "user", "content": content}]}
    liar = {"Content-Type": "image/png"}
    return {
        "raw": lambda http: http.post("/caption", content=data),
        "declared": lambda http: http.post("/caption", content=data, headers=liar),
        "json": lambda http: http.post("/caption", json={"inputs": text}),
        "form": lambda http: http.post("/caption", files={"image": ("a.png", data, "image/png")}),
        "chat": lambda http: http.post(CHAT, json=chat),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_picture_is_refused_for_what_it_is_by_every_way_in(
    client: Clients, refused: Refused, name: str
) -> None:
    data, status, piece = REFUSED[name]
    http = client()
    for way, send in ways(data).items():
        # OpenAI's status: LangChain tries others again, six times
        refused(send(http), 400 if way == "chat" else status, piece)


def test_a_picture_of_nearly_nothing_but_lines_is_refused(
    client: Clients, refused: Refused
) -> None:
    answer = client().post("/caption", content=png(1, 60_000_000, bytes(99)))
    refused(answer, 422, "PNG of 1 x 60000000 cannot be decoded: ")


def test_a_jpeg_that_is_mostly_colour_profile_is_captioned(client: Clients) -> None:
    data = encoded("JPEG", icc_profile=bytes(5_000_000))
    http = client(max_body_bytes=2 * len(data), max_buffered_bytes=4 * len(data))
    assert http.post("/caption", content=data).status_code == 200


@pytest.mark.parametrize("name", CAPTIONED)
def test_an_odd_picture_is_captioned_by_every_way_in(client: Clients, name: str) -> None:
    http = client(max_body_bytes=1_000_000)
    for way, send in ways(CAPTIONED[name]).items():
        answer = send(http)
        assert answer.status_code == 200, f"{way}: {answer.text}"


# Bodies and parameters ------------------------------------------------------------------------


TEXT = base64.b64encode(JPEG).decode()
WITH = f'{{"inputs": "{TEXT}", "parameters": '
ODD = base64.b64encode(b"\xfb\xff\xbf" * 9)  # of + and / alone

BODIES: dict[str, tuple[bytes | str, int, str]] = {
    "empty": (b"", 400, "the body is empty"),
    "unfinished": ('{"inputs": ', 400, "Invalid JSON: EOF"),
    "more-behind": (f'{{"inputs": "{TEXT}"}} x', 400, "Invalid JSON: trailing"),
    "single-quotes": ("{'inputs': ''}", 400, "Invalid JSON"),
    "nothing": ("{}", 400, "inputs is {}: Field required"),
    "no-inputs": ('{"parameters": {}}', 400, "inputs is {'parameters': {}}: Field required"),
    "unknown-field": ('{"inputs": "", "image": 7}', 400, "image is 7: unknown; valid: inputs, par"),
    "field-named-query": ('{"inputs": "", "query": 7}', 400, "query is 7: unknown; valid: inputs"),
    "inputs-null": ('{"inputs": null}', 400, "inputs is None: give a picture in base64"),
    "inputs-number": ('{"inputs": 5}', 400, "inputs is 5: give a picture in base64 as text"),
    "inputs-object": ('{"inputs": {"image": ""}}', 400, "inputs is {'image': ''}: give"),
    "inputs-url": ('{"inputs": "https://a.org/b.png"}', 400, "inputs is 'https:"),
    "inputs-empty": ('{"inputs": ""}', 400, "inputs is empty"),
    "inputs-blank": ('{"inputs": " \\n "}', 400, "inputs is empty"),
    "inputs-empty-list": ('{"inputs": []}', 400, "a list of 1 to 16"),
    "inputs-17": (json.dumps({"inputs": ["aGVsbG8="] * 17}), 400, "a list of 1 to 16"),
    "inputs-list-in-list": ('{"inputs": [["aGVsbG8="]]}', 400, "a list of 1 to 16"),
    "inputs-mixed": ('{"inputs": ["aGVsbG8=", null]}', 400, "a list of 1 to 16"),
    "inputs-list-with-nothing": ('{"inputs": ["aGVsbG8=", ""]}', 400, "inputs.1 is empty"),
    "base64-without-padding": ('{"inputs": "aGVsbG8"}', 415, NO_FORMAT),
    "base64-one-letter": ('{"inputs": "a"}', 400, "inputs is 'a'..., which is not base64"),
    "base64-only-padding": ('{"inputs": "===="}', 400, "inputs is empty"),
    "base64-behind-padding": ('{"inputs": "aGU=aGU="}', 400, "is not base64"),
    "base64-for-urls": (
        json.dumps({"inputs": base64.urlsafe_b64encode(b"\xfb\xff\xbf" * 9).decode()}),
        415, NO_FORMAT,
    ),
    "base64-odd-but-right": (json.dumps({"inputs": ODD.decode()}), 415, NO_FORMAT),
    "data-uri-without-base64": ('{"inputs": "data:image/png,abc"}', 400, "give base64"),
    "data-uri-of-two": ('{"inputs": "data:,a;base64,b"}', 400, "give base64"),
    "base64-not-ascii": ('{"inputs": "aGVsbG8ü"}', 400, "is not base64"),
    "base64-of-text": ('{"inputs": "aGVsbG8="}', 415, "the picture cannot be read"),
    "not-utf8": (b'{"inputs": "\xff\xfe"}', 400, "Invalid JSON"),
    "utf16": ('{"inputs": ""}'.encode("utf-16-le"), 400, "Invalid JSON"),
    "lone-surrogate": ('{"inputs": "\\ud800"}', 400, "Invalid JSON"),
    "surrogate-field": ('{"inputs": "", "\\udfff": 1}', 400, "Invalid JSON"),
    "control-character": ('{"inputs": "\0"}', 400, "Invalid JSON"),
    "deep-list": ('{"inputs": ' + "[" * 50_000, 400, "recursion limit"),
    "deep-object": ('{"inputs": ' + '{"a": ' * 10_000, 400, "recursion limit"),
    "many-fields": (
        json.dumps({f"x{number}": 0 for number in range(5000)}), 400, "5000 fields; valid: inputs",
    ),
    "many-digits": (f'{{"inputs": {"9" * 50_000}}}', 400, "the body is "),
    "last-of-duplicates-counts": (f'{{"inputs": "{TEXT}", "inputs": 5}}', 400, "inputs is 5"),
    "parameters-list": (f"{WITH}[]}}", 400, "parameters is []: Input should be an object"),
    "parameters-text": (f'{WITH}"seed=1"}}', 400, "parameters is 'seed=1'"),
    "nested-twice": (
        f'{WITH}{{"generate_kwargs": {{"generate_kwargs": {{}}}}}}}}', 400,
        "parameters.generate_kwargs.generate_kwargs is {}: unknown",
    ),
    "nested-null-field": (
        f'{WITH}{{"generation_parameters": {{"early_stopping": null}}}}}}', 400,
        "parameters.generation_parameters.early_stopping is None: unknown; valid: num_return_seq",
    ),
    "nan": (f'{WITH}{{"temperature": NaN}}}}', 400, "parameters.temperature is nan: "),
    "infinity": (f'{WITH}{{"length_penalty": Infinity}}}}', 400, "length_penalty is inf: "),
    "minus-infinity": (f'{WITH}{{"top_p": -Infinity}}}}', 400, "parameters.top_p is -inf: "),
    "overflow": (f'{WITH}{{"temperature": 1e999}}}}', 400, "parameters.temperature is inf: "),
    "null-number": (f'{WITH}{{"seed": null}}}}', 400, "parameters.seed is None: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_for_what_it_is(client: Clients, refused: Refused, name: str) -> None:
    body, status, piece = BODIES[name]
    headers = {"Content-Type": "application/json"}
    refused(client().post("/caption", content=body, headers=headers), status, piece)


@pytest.mark.parametrize("body", ["[1, 2]", '"text"', "7", "null", "true", "NaN", " ", "nonsense"])
def test_json_that_is_no_object_is_refused_where_json_is_declared(
    client: Clients, refused: Refused, body: str
) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    refused(client().post("/caption", content=body, headers=headers), 400, "the body is ")


WRONG = ("x", True, [1], {})
BOUNDS: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (0, -1, 11, 10**30, 1.5, 2.0, None, *WRONG),
    "num_beams": (0, -1, 11, 10**30, 1.5, 2.0, *WRONG),
    "max_new_tokens": (0, -1, 51, 10**30, 1.5, 2.0, *WRONG),
    "min_new_tokens": (-1, 51, 10**30, 1.5, 2.0, *WRONG),
    "no_repeat_ngram_size": (-1, 51, 10**30, 1.5, 2.0, *WRONG),
    "length_penalty": (-0.1, 5.1, 1e300, *WRONG),
    "temperature": (0, -1, 10.1, 1e-300, 1e-7, *WRONG),
    "top_k": (0, -1, 1.5, 2.0, *WRONG),
    "top_p": (0, -1, 1.1, 1e-300, 1e-7, *WRONG),
    "seed": (-1, 2**63, 10**30, 1.5, 2.0, None, *WRONG),
    "do_sample": (0, 1, "true", [True], {}),
    "return_attention": (0, 1, "true", None, [True], {}),
    "stream": (0, 1, "true", None, [True], {}),
    "format": ("", "dict", "LIST", 0, None, ["list"], {}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_parameter_out_of_its_bounds_is_refused_by_name_and_value(
    client: Clients, refused: Refused, name: str
) -> None:
    http = client()
    for value in BOUNDS[name]:
        body = {"inputs": TEXT, "parameters": {name: value}}
        refused(http.post("/caption", json=body), 400, f"parameters.{name} is {value!r}: ")
        form = {"parameters": json.dumps({name: value})}
        answer = http.post("/caption", files={"image": JPEG}, data=form)
        refused(answer, 400, f"parameters.{name} is {value!r}: ")


@pytest.mark.parametrize(
    ("query", "piece"),
    [
        ("colour=1", "colour is '1': unknown; valid: num_return_sequences, num_beams"),
        ("inputs=aGVsbG8=", "inputs is 'aGVsbG8=': unknown"),
        ("generation_parameters={}", "generation_parameters is '{}': unknown"),
        ("seed", "seed is '': Input should be a valid integer"),
        ("seed=%ff%00", "seed is '\N{REPLACEMENT CHARACTER}\\x00': "),
        ("seed=1.5", "seed is '1.5': "),
        ("seed=-1", "seed is '-1': "),
        ("seed=1&seed=x", "seed is 'x': "),
        ("num_beams=11", "num_beams is '11': Input should be less than or equal to 10"),
        ("num_beams=0x3", "num_beams is '0x3': "),
        ("num_beams=" + "9" * 5000, "num_beams is '999"),
        ("temperature=nan", "temperature is 'nan': Input should be a finite number"),
        ("temperature=inf", "temperature is 'inf': "),
        ("top_p=1e-50", "top_p is '1e-50': "),
        ("do_sample=perhaps", "do_sample is 'perhaps': Input should be a valid boolean"),
        ("format=xml", "format is 'xml': Input should be 'list' or 'object'"),
        ("do_sample=false&top_k=3", "do_sample is false, so leave out top_k"),
        ("num_beams=2&num_return_sequences=3", "the query is {"),
        ("&".join(f"x{number}=1" for number in range(2000)), "2000 fields; valid: num_return"),
    ],
)  # fmt: skip
def test_a_bad_query_is_refused_by_name_and_value(
    client: Clients, refused: Refused, query: str, piece: str
) -> None:
    refused(client().post(f"/caption?{query}", content=JPEG), 400, piece)


def test_one_request_cannot_take_gigabytes(client: Clients, refused: Refused) -> None:
    """An error message for each item of a long list would."""
    many = "0," * 300_000 + "0"
    fields = json.dumps({f"x{number}": 0 for number in range(200_000)})
    bodies = [
        (CHAT, f'{{"model": "x", "messages": [{many}]}}'),
        (CHAT, f'{{"model": "x", "messages": [{{"role": "user", "content": [{many}]}}]}}'),
        (CHAT, fields),
        ("/caption", fields),
        ("/caption", f'{{"inputs": [{many}]}}'),
        ("/caption", f'{{"inputs": "", "parameters": {{"generate_kwargs": {fields}}}}}'),
    ]
    http = client(max_body_bytes=10**7, max_buffered_bytes=10**8)
    for path, body in bodies:
        tracemalloc.start()
        try:
            refused(http.post(path, content=body), 400)
            assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
        finally:
            tracemalloc.stop()


# Sizes, paths and methods ---------------------------------------------------------------------


@pytest.mark.parametrize("announced", [None, "5", "-1", "1e3", "\u00b2", "9" * 5000, ""])
def test_what_comes_is_counted_whatever_was_announced(
    client: Clients, refused: Refused, announced: str | None
) -> None:
    def pieces(total: int) -> Iterator[bytes]:
        for start in range(0, total, 10_000):
            yield bytes(min(10_000, total - start))

    headers = {} if announced is None else {"Content-Length": announced.encode("latin-1")}
    for path in ("/caption", CHAT):
        answer = client().post(path, content=pieces(LIMIT + 1), headers=headers)
        refused(answer, 413, f"the body has more than {LIMIT} bytes")
    refused(client().post("/caption", content=pieces(LIMIT), headers=headers), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/", 405),
        ("POST", "/captions", 404),
        ("POST", "/caption/1", 404),
        ("POST", "/Caption", 404),
        ("GET", "/caption", 405),
        ("PUT", "/caption", 405),
        ("DELETE", "/caption", 405),
        ("OPTIONS", "/caption", 405),
        ("TRACE", "/caption", 405),
        ("BREW", "/caption", 405),
        ("POST", "/readyz", 405),
        ("GET", "/examples/nothing", 404),
        ("GET", "/examples/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/static-offline-docs/../../http.py", 404),
        ("GET", "/static-offline-docs/%2e%2e/%2e%2e/http.py", 404),
        ("GET", "/%ff%00", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/caption_ray", 405),
        ("POST", "/v1/completions", 404),
    ],
)
def test_other_methods_and_paths_are_refused_in_json(
    client: Clients, refused: Refused, method: str, path: str, status: int
) -> None:
    answer = client().request(method, path, content=JPEG)
    refused(answer, status, method)
    assert status != 405 or "Allow" in answer.headers


@pytest.mark.parametrize("host", ["", "[::1", "a b", "\x7f", "a" * 5000, "é"])
def test_a_strange_host_is_no_error_of_the_server(client: Clients, host: str) -> None:
    for method, path in (("GET", "/nothing"), ("POST", "/caption/"), ("POST", "/caption")):
        headers = {"Host": host.encode("latin-1")}
        answer = client().request(method, path, headers=headers, follow_redirects=False)
        assert answer.status_code < 500


def test_a_slash_behind_the_path_leads_to_it(client: Clients) -> None:
    assert client().post("/caption/", content=JPEG).status_code == 200
