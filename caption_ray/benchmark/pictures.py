"""Made-up pictures and captions to measure with, as costly as COCO's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 640, 480
"""Pixels, as of most of COCO's pictures."""


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG as large and as costly to decode as one of COCO's: soft shapes with grain."""
    coarse = rng.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, (HEIGHT, WIDTH, 1))
    pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption(rng: np.random.Generator) -> str:
    """A caption with as many words and punctuation marks as COCO's, of which 78 % end with a full
    stop, 5 % have a comma and 2 % an apostrophe: marks cost a tokenizer more than words."""
    colour, shape = rng.choice(("red", "pale", "green")), rng.choice(("shape", "cloud", "patch"))
    comma, own, end = (rng.random() < share for share in (0.05, 0.02, 0.78))
    place = "at the picture's edge" if own else "near the edge"
    text = f"A {colour}{', soft' if comma else ''} {shape} beside some larger ones {place}"
    return text + "." * end


def write_coco(folder: Path, count: int) -> None:
    """Write photographs with five captions each in COCO's layout: `count` for train, 1 for val."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(count if split == "train" else 1):
            name = f"{number:012d}.jpg"
            (folder / split / name).write_bytes(photograph(rng))
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for k in range(5):
                annotations.append(
                    {"id": 5 * number + k, "image_id": number, "caption": caption(rng)}
                )
        whole = {"images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(whole))
