from __future__ import annotations

import io
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption_ray.data import transforms
from caption_ray.data.transforms import ImageError, Pixels, UnknownFormatError

RED, GREEN, BLUE, YELLOW = (230, 20, 20), (20, 200, 40), (30, 40, 220), (240, 220, 30)
CLOSE = 14  # levels: what JPEG's compression may change in a plain quadrant

# What each EXIF orientation says that the viewer must see where the file holds R G / B Y
# (EXIF 2.3, section 4.6.4, tag 0x0112), as rows of quadrants.
ORIENTED = {
    1: "RG/BY",
    2: "GR/YB",
    3: "YB/GR",
    4: "BY/RG",
    5: "RB/GY",
    6: "BR/YG",
    7: "YG/BR",
    8: "GY/RB",
}
COLOURS = {"R": RED, "G": GREEN, "B": BLUE, "Y": YELLOW}


def quadrants(width: int = 96, height: int = 64) -> Image.Image:
    """Red, green above blue, yellow."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate((RED, GREEN, BLUE, YELLOW)):
        left, top = (i % 2) * width // 2, (i // 2) * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    # in HEIF a box of its own says it, which pillow-heif writes if it gets the EXIF data as bytes
    return encode(quadrants(), kind, exif=exif.tobytes() if kind == "HEIF" else exif, **options)


def seen(pixels: Pixels) -> str:
    """The quadrants of a picture as rows of letters."""
    height, width = pixels.shape[:2]
    rows = []
    for y in (height // 4, 3 * height // 4):
        row = ""
        for x in (width // 4, 3 * width // 4):
            errors = {
                letter: np.abs(pixels[y, x].astype(int) - colour).max()
                for letter, colour in COLOURS.items()
            }
            letter = min(errors, key=lambda letter: errors[letter])
            assert errors[letter] <= CLOSE, (pixels[y, x], letter)
            row += letter
        rows.append(row)
    return "/".join(rows)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(coco_mini: Path) -> list[bytes]:
    with zipfile.ZipFile(coco_mini / "val2017.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        return [archive.read(name) for name in names[:12]]


# decode: formats and modes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    data = oriented(kind, orientation)
    pixels = transforms.decode(data)
    assert seen(pixels) == ORIENTED[orientation]
    assert pixels.shape == ((96, 64, 3) if orientation >= 5 else (64, 96, 3))
    assert transforms.image_size(data) == (pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("kind", [*transforms.FORMATS, "MPO"])
def test_every_accepted_format_is_decoded(kind: str) -> None:
    options = {"save_all": True, "append_images": [quadrants()]} if kind == "MPO" else {}
    pixels = transforms.decode(encode(quadrants(), kind, **options))
    assert (pixels.dtype, pixels.shape, seen(pixels)) == (np.uint8, (64, 96, 3), "RG/BY")


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 75, "subsampling": 0},
        {"quality": 60, "progressive": True},
        {"quality": 85, "keep_rgb": True},
        {"quality": 85, "restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decode_as_pillow_decodes_them(mode: str, options: dict[str, Any]) -> None:
    data = encode(noise(123, 77).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(transforms.decode(data) - expected).max() <= 1


def test_photographs_decode_as_pillow_decodes_them(photos: list[bytes]) -> None:
    for data in photos:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
        assert np.abs(transforms.decode(data) - expected).max() <= 1


def test_cmyk_jpegs_keep_their_colours() -> None:
    pixels = transforms.decode(encode(quadrants().convert("CMYK"), "JPEG", quality=95))
    assert seen(pixels) == "RG/BY"


def test_grey_is_repeated_over_the_channels() -> None:
    grey = Image.new("L", (8, 8), 77)
    for kind in ("PNG", "JPEG", "BMP", "TIFF"):
        assert (transforms.decode(encode(grey, kind)) == 77).all()


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        pixels = transforms.decode(encode(Image.fromarray(ramp), kind))
        assert np.abs(pixels - np.arange(256).reshape(16, 16, 1)).max() <= 1


def test_16_bit_colour_is_scaled_and_not_clipped() -> None:
    # Written by hand: Pillow does not write this kind of PNG.
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")

    levels = np.array([[[0, 32768, 65535], [65535, 0, 257]]], ">u2")
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(b"\0" + levels.tobytes())) + chunk(b"IEND", b"")
    expected = np.array([[[0, 128, 255], [255, 0, 1]]])
    assert np.abs(transforms.decode(data) - expected).max() <= 1


def test_32_bit_pixels_are_refused() -> None:
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match="32 bits"):
            transforms.decode(encode(Image.new(mode, (4, 4)), "TIFF"))


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True)):
        assert np.abs(transforms.decode(data)[0] - np.array(expected)).max() <= 1


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (100, 0))
    image.putpixel((1, 0), (100, 255))
    assert transforms.decode(encode(image, "PNG"))[0].tolist() == [[255] * 3, [100] * 3]


def test_transparent_colours_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        data = encode(palette, kind, transparency=0)
        assert transforms.decode(data)[0].tolist() == [[255] * 3, [200, 100, 50]]
    plain = Image.new("RGB", (2, 1), (1, 2, 3))
    plain.putpixel((1, 0), (9, 9, 9))
    data = encode(plain, "PNG", transparency=(1, 2, 3))
    assert transforms.decode(data)[0].tolist() == [[255] * 3, [9] * 3]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    other = Image.new("RGB", (96, 64), "black")
    data = encode(quadrants(), kind, save_all=True, append_images=[other], **options)
    assert seen(transforms.decode(data)) == "RG/BY"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_nonsense_exif_data_do_not_spoil_a_good_picture() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert seen(transforms.decode(encode(quadrants(), "JPEG", exif=exif))) == "RG/BY"


# decode: refusals


@pytest.mark.parametrize("data", [b"", b"no picture at all", b"\0" * 1000, b"<svg></svg>"])
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    for read in (transforms.decode, transforms.image_size):
        with pytest.raises(UnknownFormatError):
            read(data)


def test_formats_that_are_not_accepted_are_refused() -> None:
    for kind in ("EPS", "PPM", "ICO", "PDF"):
        with pytest.raises(UnknownFormatError, match="JPEG, PNG, WEBP, GIF, BMP, TIFF"):
            transforms.decode(encode(quadrants(), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "HEIF", "AVIF"])
def test_truncated_pictures_are_refused(kind: str) -> None:
    data = encode(noise(96, 64), kind)
    for length in (len(data) - 2 if kind == "JPEG" else len(data) // 2, len(data) // 3):
        with pytest.raises(ImageError):
            transforms.decode(data[:length])


def test_a_refusal_tells_format_size_and_reason() -> None:
    data = encode(noise(96, 64), "JPEG")
    with pytest.raises(ImageError, match="JPEG of 96 x 64 cannot be decoded: .*truncated"):
        transforms.decode(data[: len(data) // 2])


def test_a_damaged_header_is_not_taken_for_another_format() -> None:
    for kind in ("PNG", "WEBP", "GIF", "JPEG", "HEIF", "AVIF"):
        with pytest.raises(ImageError) as refusal:
            transforms.decode(encode(quadrants(), kind)[:14])
        assert not isinstance(refusal.value, UnknownFormatError)


def test_a_bad_checksum_is_refused() -> None:
    data = bytearray(encode(noise(96, 64), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="PNG of 96 x 64"):
        transforms.decode(bytes(data))


@pytest.mark.parametrize("side", [12_000, 20_000])  # below and above Pillow's own limit
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    data = encode(Image.new("1", (side, side)), "PNG")
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for read in (transforms.decode, transforms.image_size):
                with pytest.raises(ImageError, match="pixels"):
                    read(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_the_pixel_cap_counts_every_pixel() -> None:
    data = encode(quadrants(96, 64), "JPEG")
    assert transforms.decode(data, max_pixels=96 * 64).shape == (64, 96, 3)
    with pytest.raises(ImageError, match="96 x 64 are more than 6143 pixels"):
        transforms.decode(data, max_pixels=96 * 64 - 1)


def test_damaged_bytes_give_pixels_or_an_image_error() -> None:
    rng = np.random.default_rng(0)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("HEIF", {}),
        ("AVIF", {}),
    ]
    refused = 0
    for kind, options in kinds:
        data = encode(noise(40, 32), kind, **options)
        for _ in range(60):
            damaged = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, min(len(data), rng.choice([60, len(data)])), 4)
            damaged[places] = rng.integers(0, 256, 4)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for read in (transforms.decode, transforms.image_size):
                    try:
                        read(damaged.tobytes())
                    except ImageError:
                        refused += 1
    assert refused > 100


# fit and augment


def augmented(image, size, min_crop, flip, rng):
    """What training sees of a picture (H, W, 3): a random window of it, as a square."""
    height, width, _ = image.shape
    window = transforms.random_window(height, width, min_crop, flip, rng)
    return transforms.squeeze(image, window, size)


@pytest.mark.parametrize(("how", "expected"), [("stretch", "RG/BY"), ("crop", "RG/BY")])
def test_fit_is_square_and_keeps_its_corners_in_place(how: Any, expected: str) -> None:
    for width, height in ((96, 64), (64, 96), (40, 40), (1000, 30)):
        square = transforms.fit(np.asarray(quadrants(width, height)), 48, how)
        assert (square.dtype, square.shape, seen(square)) == (np.uint8, (48, 48, 3), expected)


def test_fit_equals_pillows_antialiased_bilinear(photos: list[bytes]) -> None:
    for data in photos[:4]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels, side = np.asarray(image), min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        centre = image.crop((left, top, left + side, top + side))
        for how, source in (("stretch", image), ("crop", centre)):
            expected = source.resize((224, 224), Image.Resampling.BILINEAR)
            difference = np.abs(transforms.fit(pixels, 224, how) - np.asarray(expected, int))  # type: ignore[arg-type]
            assert difference.max() <= 2


def test_views_are_resized_like_copies() -> None:
    pixels = np.asarray(noise(64, 48))
    for view in (pixels[::-1], pixels[:, ::-1], pixels[5:30, 7:40], pixels.transpose(1, 0, 2)):
        expected = transforms.fit(view.copy(), 16, "stretch")
        assert np.array_equal(transforms.fit(view, 16, "stretch"), expected)


def test_shrinking_a_checkerboard_gives_even_grey() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None].astype(np.uint8), 3, axis=2)
    square = transforms.fit(pixels, 32, "stretch")[2:-2, 2:-2]
    assert np.abs(square.astype(int) - 127).max() <= 3


def test_crop_leaves_the_ends_of_a_long_picture_out() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10] = pixels[:, 20:] = 255
    assert (transforms.fit(pixels, 10, "crop") == 0).all()
    assert (transforms.fit(pixels, 10, "stretch") == 255).any()


def test_fit_refuses_an_unknown_way() -> None:
    with pytest.raises(ValueError, match="'pad': give stretch or crop"):
        transforms.fit(np.zeros((4, 4, 3), np.uint8), 2, "pad")  # type: ignore[arg-type]


def coordinates(width: int, height: int) -> Pixels:
    """A picture whose red tells x and whose green tells y, from 0 to 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return pixels


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (500, 500), (900, 300)])
def test_random_crops_keep_area_and_aspect_within_bounds(width: int, height: int) -> None:
    pixels, rng = coordinates(width, height), np.random.default_rng(0)
    shares, aspects = [], []
    for _ in range(100):
        crop = augmented(pixels, 32, 0.5, False, rng).astype(float)
        assert crop.shape == (32, 32, 3)
        across = (crop[..., 0].max() - crop[..., 0].min()) / 255 * 32 / 31  # of the width
        along = (crop[..., 1].max() - crop[..., 1].min()) / 255 * 32 / 31
        shares.append(across * along)
        aspects.append(across * width / (along * height))
    assert min(shares) > 0.45
    assert max(shares) < 1.05
    assert max(shares) - min(shares) > 0.35
    longest = max(4 / 3, width / height)
    assert min(aspects) > 0.95 * min(3 / 4, 0.5 * width / height)
    assert max(aspects) < 1.05 * longest
    assert max(aspects) > 1.2 * min(aspects)


def test_without_crop_and_mirror_augment_equals_stretch() -> None:
    pixels = np.asarray(noise(120, 80))
    square = augmented(pixels, 48, 1.0, False, np.random.default_rng(0))
    assert np.array_equal(square, transforms.fit(pixels, 48, "stretch"))


def test_half_of_the_pictures_are_mirrored() -> None:
    pixels, rng = np.asarray(noise(64, 64)), np.random.default_rng(0)
    plain = transforms.fit(pixels, 32, "stretch")
    mirrored = 0
    for _ in range(400):
        square = augmented(pixels, 32, 1.0, True, rng)
        if not np.array_equal(square, plain):
            assert np.array_equal(square, plain[:, ::-1])
            mirrored += 1
    assert 160 < mirrored < 240


def test_same_random_state_gives_the_same_augmentation() -> None:
    pixels = np.asarray(noise(160, 120))
    first, second, other = (
        augmented(pixels, 48, 0.5, True, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog on the left.", True),
        ("turning RIGHT, then", True),
        ("the right-hand side", True),
        ("a bright kitchen", False),
        ("leftovers in a bowl", False),
        ("", False),
    ],
)
def test_sides_are_found_as_whole_words(caption: str, expected: bool) -> None:
    assert transforms.mentions_side(["a cat", caption]) is expected


# shrink


def test_a_small_plain_jpeg_is_kept_byte_for_byte() -> None:
    data = encode(quadrants(), "JPEG")
    assert transforms.shrink(data, 64) is data


def test_a_large_picture_is_shrunk_to_its_shorter_side(photos: list[bytes]) -> None:
    for data in photos[:4]:
        width, height = transforms.image_size(data)
        shrunk = transforms.shrink(data, 200)
        small = transforms.decode(shrunk)
        assert min(small.shape[:2]) == 200
        assert small.shape[1] / small.shape[0] == pytest.approx(width / height, rel=0.005)
        assert Image.open(io.BytesIO(shrunk)).format == "JPEG"
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        reference = expected.resize((small.shape[1], small.shape[0]), Image.Resampling.BILINEAR)
        error = np.mean((small - np.asarray(reference, float)) ** 2)
        assert 10 * np.log10(255**2 / error) > 28  # dB: compression only


@pytest.mark.parametrize("orientation", range(2, 9))
def test_shrinking_bakes_the_orientation_in(orientation: int) -> None:
    shrunk = transforms.shrink(oriented("JPEG", orientation), 64)
    raw = Image.open(io.BytesIO(shrunk))
    assert raw.getexif().get(0x0112, 1) == 1
    assert seen(np.asarray(raw)) == ORIENTED[orientation]


def test_every_other_picture_becomes_a_plain_jpeg() -> None:
    sources = [encode(quadrants(), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    sources.append(encode(quadrants().convert("CMYK"), "JPEG", quality=95))
    sources.append(encode(quadrants(), "JPEG", progressive=True, quality=95))
    for source in sources:
        image = Image.open(io.BytesIO(transforms.shrink(source, 64)))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 64))
        assert "progressive" not in image.info
        assert seen(np.asarray(image)) == "RG/BY"


def test_shrinking_refuses_what_cannot_be_decoded() -> None:
    data = encode(noise(96, 64), "JPEG")
    for shorter_side in (32, 1000):
        with pytest.raises(ImageError, match="cannot be decoded"):
            transforms.shrink(data[: len(data) // 2], shorter_side)
    with pytest.raises(ImageError, match="70000 x 1 does not fit"):
        transforms.shrink(encode(Image.new("L", (70_000, 1)), "PNG"), 32)


# bands


MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "1": ("PNG", {}),
    "L": ("PNG", {}),
    "LA": ("PNG", {}),
    "P": ("GIF", {"transparency": 3}),
    "I;16": ("PNG", {}),
    "RGB": ("TIFF", {}),
    "RGBA": ("PNG", {}),
    "CMYK": ("JPEG", {}),
    "YCbCr": ("JPEG", {}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_bands_give_what_the_whole_gives_to_the_last_bit(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = MODES[mode]
    image = noise(203, 131)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(noise(203, 131, seed=1).convert("L"))
    image = image if mode == "I;16" else image.convert(mode)
    if kind != "GIF":
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {**options, "exif": exif}
    picture = transforms.Picture(encode(image, kind, **options))
    height, width = picture.shape
    whole = picture.pixels()
    windows = [
        transforms.fitting(height, width, "stretch"),
        transforms.fitting(height, width, "crop"),
        transforms.Window(11, 7, height - 30, width - 9, is_mirrored=True),
        transforms.Window(3, 5, 32, 32),
    ]
    for rows in (1, 7, 64):
        monkeypatch.setattr(transforms, "BAND_PIXELS", rows * width)
        assert np.array_equal(picture.pixels(), whole)
        for window in windows:
            for size in (32, 96, 160):
                expected = transforms.squeeze(whole, window, size)
                assert np.array_equal(picture.squeeze(window, size), expected), (window, size)
    assert whole.shape == (height, width, 3)
    assert np.array_equal(picture.rows(5, 9), whole[5:9])
