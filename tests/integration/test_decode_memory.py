"""What decoding takes of memory is what its bound says, and goes back to the system."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from caption_ray import cluster
from caption_ray.data import transforms

SIDE = 4000
MIB = 2**20

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PNG with transparency": ("PNG", "RGBA", {}),
    "PNG with a palette": ("PNG", "P", {"transparency": 0}),
    "PNG": ("PNG", "RGB", {}),
    "grey PNG": ("PNG", "L", {}),
    "deep grey PNG": ("PNG", "I;16", {}),
    "GIF": ("GIF", "P", {}),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "turned TIFF": ("TIFF", "RGB", {"exif": 6}),
    "JPEG": ("JPEG", "RGB", {}),
    "turned JPEG": ("JPEG", "RGB", {"exif": 6}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "JPEG for print": ("JPEG", "CMYK", {}),
    "WebP": ("WEBP", "RGB", {}),
    "lossless WebP": ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}),
    "HEIC": ("HEIF", "RGB", {}),
    "HEIC with transparency": ("HEIF", "RGBA", {}),
    "AVIF": ("AVIF", "RGBA", {"speed": 10}),
}

MEASURE = """
import sys, threading, time
import numpy as np
from caption_ray.data import transforms

data = open(sys.argv[1], "rb").read()
transforms.fit(np.zeros((10, 10, 3), np.uint8), 96, "stretch")

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before, peak, over = resident(), 0, False

def watch():
    global peak
    while not over:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
for _ in range(3):
    picture = transforms.Picture(data)
    picture.squeeze(transforms.fitting(*picture.shape, "stretch"), 256)
    del picture
over = True
thread.join()
print(peak - before, resident() - before)
"""


def encoded(kind: str, side: int) -> bytes:
    format, mode, options = KINDS[kind]
    image = Image.linear_gradient("L").resize((side, side))
    options = dict(options)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options["exif"] = exif
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to measure with")
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_takes_no_more_than_its_bound_and_gives_it_back(
    kind: str, tmp_path: Path
) -> None:
    data = encoded(kind, SIDE)
    file = tmp_path / "picture"
    file.write_bytes(data)
    environment = {**os.environ, **cluster.INGRESS_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    peak, stays = map(int, done.stdout.split())
    bound = transforms.decoding_bytes(data)
    print(f"\n{kind}: peak {peak / MIB:.0f} MiB of {bound / MIB:.0f}, {stays / MIB:.0f} stay")
    assert peak <= bound
    assert stays < 32 * MIB


@pytest.mark.parametrize("kind", ["progressive JPEG", "turned TIFF", "WebP", "AVIF", "HEIC"])
def test_at_the_most_pixels_the_bound_is_that_of_all_pictures(kind: str) -> None:
    # the bound grows with the pixels, but for a constant
    per_pixel = (transforms.decoding_bytes(encoded(kind, 400)) - 24 * MIB) / 400**2
    most = transforms.MAX_PIXELS_OF.get(KINDS[kind][0], transforms.MAX_PIXELS)
    assert per_pixel * most + 24 * MIB <= transforms.MAX_DECODING_BYTES
