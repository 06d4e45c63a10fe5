"""From the bytes of a picture to pixels: the only decode, for ingest, training and serving.

Pictures are uint8 RGB arrays (H, W, 3) throughout.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import pillow_heif
import simplejpeg
from PIL import Image, UnidentifiedImageError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")
"""What `decode` accepts, as Pillow names it; JPEG includes MPO, several JPEGs in one file, and HEIF
is what telephones call HEIC."""

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded, ..."""
MAX_PIXELS_OF = {"WEBP": 36_000_000, "AVIF": 49_000_000}
"""... and in formats whose decoders hold a picture several times, already these, so that none takes
more than MAX_DECODING_BYTES."""

MAX_DECODING_BYTES = 600 * 2**20
"""The most memory that decoding any picture takes; see `decoding_bytes`."""

BAND_PIXELS = 1_000_000
"""Pixels that become RGB at a time; smaller pictures as a whole."""

ASPECTS = (3 / 4, 4 / 3)
"""Narrowest and widest random crop, width / height."""

JPEG_QUALITY = 90
"""Of the pictures that `shrink` writes, with 4:2:0 chroma."""

HEAD_BYTES = 16
"""What `is_picture` wants to see."""

# It applies the rotation that the file names, and leaves none in the EXIF data. One thread for each
# picture is enough, as many are decoded side by side.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
pillow_heif.options.DECODE_THREADS = 1

_ORIENTATION_TAG = 0x0112
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"mif2", b"msf1", b"avif", b"avis"),
)
"""What may follow `ftyp` in HEIF and AVIF; videos have others."""
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the caller turns Pillow's warnings into errors
)


class ImageError(ValueError):
    """Bytes that cannot become a picture; the message says why."""


class UnknownFormatError(ImageError):
    """Bytes that are no picture in an accepted format."""


Interpolation = Literal["auto", "bilinear", "bicubic"]
"""How pixels are made from those around them; `auto`, where nothing has settled it, is bilinear, as
torchvision's pretrained weights were made with."""


def mode_of(how: Interpolation) -> Literal["bilinear", "bicubic"]:
    """torch's name of it."""
    return "bicubic" if how == "bicubic" else "bilinear"


class Picture:
    """A picture that is decoded to pixels of its own kind; what is wanted of it becomes RGB in
    bands of rows. So it takes little more memory than its own pixels, where converting it as a
    whole would take up to five times as much.

    The picture is upright, the content decides on the format, the first frame is taken of an
    animation, 16-bit grey is scaled to 8 bits, and what is transparent becomes white.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        """Raises ImageError if there is no picture in `data`, it is damaged or it has more than
        `max_pixels`."""
        self._image = _open(data, max_pixels)
        with _refusing(self._image):
            self._jpeg = _decode_jpeg(self._image, data)
            if self._jpeg is None:
                self._image.load()
                _check_mode(self._image)
            self._orientation = _orientation(self._image)
        width, height = self._image.size
        self.shape = (width, height) if self._orientation >= 5 else (height, width)
        """Height and width."""

    def rows(self, top: int, bottom: int) -> Pixels:
        """uint8 RGB (bottom - top, W, 3)."""
        # where they are in what is stored, of which rows are columns or run backwards
        height, _ = self.shape
        backwards = self._orientation in (3, 4, 7, 8)
        first, last = (height - bottom, height - top) if backwards else (top, bottom)
        width, height = self._image.size
        box = (first, 0, last, height) if self._orientation >= 5 else (0, first, width, last)
        if self._jpeg is not None:
            stored = self._jpeg[box[1] : box[3], box[0] : box[2]]
        else:
            with _refusing(self._image):
                stored = _to_rgb(self._image.crop(box))
        return _upright(stored, self._orientation)

    def pixels(self) -> Pixels:
        """All of it: uint8 RGB (H, W, 3)."""
        height, width = self.shape
        bands = list(_bands(0, *self.shape))
        if len(bands) == 1:
            return self.rows(0, height)
        whole = np.empty((height, width, 3), np.uint8)
        for top, bottom in bands:
            whole[top:bottom] = self.rows(top, bottom)
        return whole

    def squeeze(self, window: Window, size: int, how: Interpolation = "auto") -> Pixels:
        """What the window shows, antialiased: (size, size, 3); the same as of `pixels()`, to the
        last bit."""
        square = self.resize(window, size, size, how)
        return square[:, ::-1] if window.is_mirrored else square

    def resize(
        self, window: Window, height: int, width: int, how: Interpolation = "auto"
    ) -> Pixels:
        """What the window shows (not mirrored), antialiased: (height, width, 3)."""
        columns = slice(window.left, window.left + window.width)
        bands = list(_bands(window.top, window.height, self.shape[1]))
        if len(bands) == 1:
            return _resize(self.rows(*bands[0])[:, columns], height, width, how)
        # Torch, as Pillow, scales rows first, each for itself, and then the columns of what it got.
        scaled = [
            _resize(self.rows(top, bottom)[:, columns], bottom - top, width, how)
            for top, bottom in bands
        ]
        return _resize(np.concatenate(scaled), height, width, how)


def _bands(top: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and the row after the last of each band."""
    rows = max(1, BAND_PIXELS // width)
    for first in range(top, top + height, rows):
        yield first, min(first + rows, top + height)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture in `data`, upright: uint8 RGB (H, W, 3); see Picture, also for what it raises."""
    return Picture(data, max_pixels).pixels()


def is_picture(head: bytes) -> bool:
    """Whether bytes that begin like this are meant as a picture in one of FORMATS."""
    return (
        head.startswith(_SIGNATURES)
        or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")
        or (head[:2], head[6:10]) == (b"BM", bytes(4))
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
    )


def format_of(data: bytes) -> str:
    """The file format, as Pillow names it. Raises ImageError if it is none that is accepted."""
    return str(_open(data, MAX_PIXELS).format)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture in `data`, read from its header.

    Raises ImageError as `decode` does, but may miss damage behind the header.
    """
    image = _open(data, MAX_PIXELS)
    if image.format == "TIFF":  # Pillow turns these itself, on loading
        height, width = Picture(data).shape
        return width, height
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def upright_jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG of which any decoder makes the same picture but for rounding:
    colour or grey, and upright as it is stored. None for all else, read from the header.

    Raises ImageError as `image_size` does.
    """
    image = _open(data, MAX_PIXELS)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or _orientation(image) != 1:
        return None
    width, height = image.size
    return height, width


def decoding_bytes(data: bytes) -> int:
    """An upper bound, close to what was measured, of the memory that `Picture(data)` and what is
    made of it take meanwhile: read from the header. Raises ImageError as `image_size` does."""
    image = _open(data, MAX_PIXELS)
    width, height = image.size
    a_pixel = _BYTES_A_PIXEL.get(str(image.format)) or (
        1.4 if image.mode in ("1", "L", "P") else 3.0 if image.mode.startswith("I;16") else 4.4
    )
    if image.format == "JPEG" and "progressive" in image.info:
        a_pixel *= 2  # its coefficients are kept, two bytes each, until the last scan is read
    return int(a_pixel * width * height) + 24 * 2**20


_BYTES_A_PIXEL = {"JPEG": 4.7, "WEBP": 16.5, "AVIF": 11.9, "HEIF": 8.9, "TIFF": 8.0}
"""Of formats that need more than Pillow's one or four for their own pixels."""


def shrink(data: bytes, shorter_side: int) -> bytes:
    """The picture as an upright RGB JPEG whose shorter side has at most so many pixels.

    A picture that is all that already (and baseline, not progressive) stays byte for byte as it
    is, once it has proved to be decodable. Raises ImageError as `decode` does.
    """
    picture = Picture(data)
    image = _open(data, MAX_PIXELS)
    is_plain = image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info
    if is_plain and _orientation(image) == 1 and min(image.size) <= shorter_side:
        return data
    height, width = picture.shape
    scale = shorter_side / min(height, width)
    if scale < 1:
        whole = Window(0, 0, height, width)
        pixels = picture.resize(whole, round(height * scale), round(width * scale))
    else:
        pixels = picture.pixels()
    buffer = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(
            buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0"
        )
    except OSError as error:
        raise ImageError(f"a picture of {width} x {height} does not fit in a JPEG") from error
    return buffer.getvalue()


def thumbnail(data: bytes, longer_side: int) -> bytes:
    """A small JPEG of the picture for people to look at. Raises ImageError as `decode` does."""
    image = Image.fromarray(np.ascontiguousarray(decode(data)))
    image.thumbnail((longer_side, longer_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


class Window(NamedTuple):
    """The part of a picture that becomes a square, in pixels."""

    top: int
    left: int
    height: int
    width: int
    is_mirrored: bool = False


Fit = Literal["stretch", "crop"]
"""How a picture becomes a square: squeezed as a whole, or cut to its centre."""


def fitting(height: int, width: int, how: Fit) -> Window:
    """What a picture of this size shows unless it is augmented."""
    if how == "stretch":
        return Window(0, 0, height, width)
    if how != "crop":
        raise ValueError(f"how is {how!r}: give stretch or crop")
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side)


def random_window(
    height: int, width: int, min_crop: float, flip: bool, rng: np.random.Generator
) -> Window:
    """A random crop of a picture of this size, mirrored half of the time if `flip`.

    The crop keeps a share in [`min_crop`, 1] of the area. Its aspect is log-uniform within
    `ASPECTS` as far as a crop of that area can have it: a long picture keeps a long crop.
    """
    aspect, share = width / height, rng.uniform(min_crop, 1)
    narrowest, widest = aspect * share, aspect / share  # beyond, it would leave the picture
    low, high = (min(max(limit, narrowest), widest) for limit in ASPECTS)
    chosen = math.exp(rng.uniform(math.log(low), math.log(high)))
    crop_width = min(width, max(1, round(math.sqrt(width * height * share * chosen))))
    crop_height = min(height, max(1, round(math.sqrt(width * height * share / chosen))))
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    return Window(top, left, crop_height, crop_width, bool(flip and rng.random() < 0.5))


def squeeze(image: Pixels, window: Window, size: int, how: Interpolation = "auto") -> Pixels:
    """What the window shows of a picture (H, W, 3), antialiased: (size, size, 3)."""
    top, left, height, width, is_mirrored = window
    square = _resize(image[top : top + height, left : left + width], size, size, how)
    return square[:, ::-1] if is_mirrored else square


def fit(image: Pixels, size: int, how: Fit) -> Pixels:
    """(H, W, 3) -> (size, size, 3): the whole picture squeezed, or its centre."""
    height, width, _ = image.shape
    return squeeze(image, fitting(height, width, how), size)


def visible(height: int, width: int, how: Fit) -> tuple[float, float, float, float]:
    """What `fit` keeps: left, top, right and bottom as fractions of the picture."""
    top, left, rows, columns, _ = fitting(height, width, how)
    return left / width, top / height, (left + columns) / width, (top + rows) / height


def mentions_side(captions: Sequence[str]) -> bool:
    """Whether a caption says left or right, so that the mirrored picture would belie it."""
    return any(_SIDES.search(caption) for caption in captions)


# Decoding -------------------------------------------------------------------------------------


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only."""
    if not data:
        raise UnknownFormatError("there are no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if is_picture(data[:HEAD_BYTES]):
            raise ImageError("the header is damaged") from error
        raise UnknownFormatError(
            f"no picture in an accepted format: {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:  # far above, even Pillow does not look further
        raise ImageError(f"more than {max_pixels} pixels") from error
    except _DECODER_ERRORS as error:
        raise ImageError(str(error)) from error
    width, height = image.size
    most = min(max_pixels, MAX_PIXELS_OF.get(str(image.format), max_pixels))
    if width * height > most:
        of_kind = f" of a {image.format}" if most < max_pixels else ""
        raise ImageError(f"{width} x {height} are more than {most} pixels{of_kind}")
    return image


def _decode_jpeg(image: Image.Image, data: bytes) -> Pixels | None:
    """A JPEG's pixels as they are stored: the same as Pillow's, to the last bit, in half of the
    time. None for others, and for damaged ones: Pillow knows how badly, and finds words for it."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    except ValueError:
        return None


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F") and not _is_deep_grey(image):
        raise ImageError(f"{image.format} with 32 bits a channel: these have no fixed white")


def _to_rgb(image: Image.Image) -> Pixels:
    """A picture that is loaded, or a part of one."""
    if image.mode.startswith("I"):  # 16 bits: _check_mode refuses what has more
        grey = np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


@contextmanager
def _refusing(image: Image.Image) -> Iterator[None]:
    """ImageError, telling what kind of picture it is, for what decoders raise."""
    try:
        yield
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        width, height = image.size
        what = f"{image.format} of {width} x {height}"
        raise ImageError(f"{what} cannot be decoded: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 if the EXIF data are missing or nonsense."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return orientation if orientation in range(2, 9) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns].copy()  # torch takes no negative strides, even of a single row


def _resize(image: Pixels, height: int, width: int, how: Interpolation) -> Pixels:
    """Antialiased. Torch's kernel gives what Pillow's does in a fifth of the time."""
    if image.shape[:2] == (height, width):
        return image
    # not for processes that only read: it takes 250 MiB of memory, and a second to load
    import torch

    image = np.require(image, requirements=("C", "W"))  # what torch takes without a warning
    # A batch of one, so that torch sees channels-last strides and leaves the channels where they
    # are: to part them takes as long as the resizing. Torch makes the batch, for numpy gives an
    # axis of one the stride 0, which is no layout torch knows.
    channels_last = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        channels_last, (height, width), mode=mode_of(how), antialias=True
    )
    return resized.permute(0, 2, 3, 1)[0].numpy()
