"""The embedded data set: drawn scenes with exact captions and boxes, written in COCO layout.

A scene holds one to three flat figures on a light background. Its captions follow a small
grammar, every statement of which judge.py can check against the boxes:

    caption  = [opening] figure (link figure)*
    opening  = "there is" | "we see" | "the picture shows"
    figure   = "a" size colour shape [position]
    link     = "and" | "left of" | "and to its right" | ...

A link relates the figures on both its sides; figures are named from left to right. Of the
background, which the boxes cannot confirm, nothing is said. Training scenes never show the
kinds in `HELD_OUT` (a large red star, say, but small red stars and large blue ones); every
validation scene shows one or more, so that validation asks for combinations and not for memory.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SPLITS = ("train", "val")
SIZE = 96
"""Height and width of a scene in pixels."""

RADII = {"small": (10.0, 11.5), "large": (18.0, 20.0)}
"""Half the side of a figure's box in pixels, lowest and highest."""

COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 30),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "purple": (150, 50, 180),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT = (
    ("large", "red", "star"),
    ("small", "red", "triangle"),
    ("small", "orange", "square"),
    ("large", "yellow", "circle"),
    ("large", "green", "square"),
    ("small", "green", "ring"),
    ("small", "blue", "circle"),
    ("large", "blue", "triangle"),
    ("small", "purple", "cross"),
    ("large", "black", "ring"),
)
"""Kinds (size, colour, shape) that only validation shows."""

COUNT_SHARES = (0.2, 0.4, 0.4)
"""Shares of scenes with one, two and three figures."""

POSITIONS = {
    "in the upper left": (0, 0),
    "in the upper right": (1, 0),
    "in the lower left": (0, 1),
    "in the lower right": (1, 1),
}
"""Phrase -> (column, row) of the quarter that holds the centre of the figure."""

LINKS = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
    "and to its right": (1, 0),
    "and to its left": (-1, 0),
    "and below it": (0, 1),
    "and above it": (0, -1),
}
"""Phrase -> direction (x, y) from the figure before it to the figure after it; y points down."""

OPENINGS = ("there is", "we see", "the picture shows")

FIRST_ID = {"train": 1, "val": 1_000_001}
"""First image id of each split: no id is used twice."""

GAP = 3.0  # pixels between the boxes of two figures
ORDER_MARGIN = 10.0  # pixels in x between the centres of two figures: their order is clear
MIDDLE = 9.0  # pixels from the middle, across or down: a centre nearer to it gets no position
CLEAR = 1.7  # consecutive figures are so many times further apart along one axis than the other
SUPERSAMPLING = 4
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Figure:
    """One object: its box is the square of half-side `radius` around (`x`, `y`), in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def bbox(self) -> list[float]:
        """COCO's [x, y, width, height] in pixels."""
        return [self.x - self.radius, self.y - self.radius, 2 * self.radius, 2 * self.radius]


@dataclass(frozen=True)
class Background:
    """Two light tones, mixed by a pattern."""

    pattern: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    period: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows; figures from left to right."""

    image_id: int
    background: Background
    figures: tuple[Figure, ...]


# Scenes ---------------------------------------------------------------------------------------


def scene(split: str, image_id: int, seed: int) -> Scene:
    """The scene of that id: the same one whenever it is asked for."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: give one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), image_id])
    figures = [_figure(*kind, rng) for kind in _kinds(split, rng)]
    while not _is_clear(figures):
        figures = sorted((_moved(figure, rng) for figure in figures), key=lambda figure: figure.x)
    return Scene(image_id, _background(rng), tuple(figures))


def _kinds(split: str, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(size, colour, shape) of each figure; no two of the same colour and shape.

    At most two are large: places for three are found only after thousands of attempts.
    """
    kinds = []
    if split == "val":
        kinds.append(HELD_OUT[int(rng.integers(len(HELD_OUT)))])
    count = int(rng.choice((1, 2, 3), p=COUNT_SHARES))
    while len(kinds) < count:
        choices = tuple(RADII), tuple(COLOURS), SHAPES
        size, colour, shape = (names[int(rng.integers(len(names)))] for names in choices)
        known = any((colour, shape) == kind[1:] for kind in kinds)
        crowded = [size, *(kind[0] for kind in kinds)].count("large") > 2
        held_out = split == "train" and (size, colour, shape) in HELD_OUT
        if not (known or crowded or held_out):
            kinds.append((size, colour, shape))
    return kinds


def _figure(size: str, colour: str, shape: str, rng: np.random.Generator) -> Figure:
    radius = float(rng.uniform(*RADII[size]))
    red, green, blue = (
        int(np.clip(level + rng.integers(-15, 16), 0, 255)) for level in COLOURS[colour]
    )
    return _moved(Figure(size, colour, shape, 0, 0, radius, (red, green, blue)), rng)


def _moved(figure: Figure, rng: np.random.Generator) -> Figure:
    """The figure at some other place in the picture."""
    x, y = rng.uniform(figure.radius + 1, SIZE - figure.radius - 1, 2).tolist()
    return dataclasses.replace(figure, x=x, y=y)


def _is_clear(figures: Sequence[Figure]) -> bool:
    """Whether figures are apart, their order and relations are plain and one has a position."""
    for i, right in enumerate(figures):
        for left in figures[:i]:
            dx, dy = right.x - left.x, abs(right.y - left.y)
            if dx < ORDER_MARGIN or max(dx, dy) < left.radius + right.radius + GAP:
                return False
    return all(map(_direction, figures, figures[1:])) and any(map(_position, figures))


def _background(rng: np.random.Generator) -> Background:
    level = int(rng.integers(185, 236))

    def tone() -> tuple[int, int, int]:
        near = level + int(rng.integers(-10, 11))
        red, green, blue = (near + int(rng.integers(-10, 11)) for _ in range(3))
        return red, green, blue

    return Background(
        pattern=("plain", "gradient", "stripes", "noise")[int(rng.integers(4))],
        tones=(tone(), tone()),
        angle=float(rng.uniform(0, 2 * math.pi)),
        period=float(rng.uniform(10, 30)),
        seed=int(rng.integers(2**32)),
    )


# Pictures -------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The RGB picture of a scene, SIZE x SIZE, with smooth edges."""
    image = Image.fromarray(_paint(scene.background))
    for figure in scene.figures:
        mask = Image.new("L", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
        _stencil(ImageDraw.Draw(mask), figure)
        image.paste(figure.rgb, mask=mask.reduce(SUPERSAMPLING))
    return image


def _paint(background: Background) -> np.ndarray[Any, np.dtype[np.uint8]]:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    along = x * math.cos(background.angle) + y * math.sin(background.angle)
    share = {
        "plain": np.zeros_like(along),
        "gradient": 0.5 + along / (SIZE * math.sqrt(2)),
        "stripes": np.clip(0.5 + 2 * np.sin(2 * math.pi * along / background.period), 0, 1),
        "noise": np.random.default_rng(background.seed).random(along.shape),
    }[background.pattern]
    first, second = np.asarray(background.tones, float)
    return np.asarray(np.rint(first + share[..., None] * (second - first)), np.uint8)


def _stencil(pen: ImageDraw.ImageDraw, figure: Figure) -> None:
    """Fill the figure's outline, which touches all four sides of its box."""
    scale, radius = SUPERSAMPLING, figure.radius * SUPERSAMPLING

    def at(x: float, y: float) -> tuple[float, float]:
        return figure.x * scale + x * radius - 0.5, figure.y * scale + y * radius - 0.5

    if figure.shape in ("circle", "ring"):
        pen.ellipse((*at(-1, -1), *at(1, 1)), fill=255)
        if figure.shape == "ring":
            pen.ellipse((*at(-0.5, -0.5), *at(0.5, 0.5)), fill=0)
    else:
        pen.polygon([at(x, y) for x, y in OUTLINES[figure.shape]], fill=255)


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        reach = 1.0 if i % 2 == 0 else 0.42
        points.append((reach * math.sin(i * math.pi / 5), -reach * math.cos(i * math.pi / 5)))
    width, bottom = points[2][0], points[4][1]  # stretch it to fill the box
    return [(x / width, -1 + 2 * (y + 1) / (bottom + 1)) for x, y in points]


ARM = 0.35  # half the width of a cross's arms
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _star(),
    "cross": [
        *((-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)),
        *((ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)),
    ],
}
"""Corners, in units of the radius, y down."""


# Captions -------------------------------------------------------------------------------------


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions, all different, that each name every figure and say only what is true.

    Two have no opening (one with relations, one with positions) so that this wording is the most
    likely one, which greedy decoding gives.
    """
    details = ["relations", "positions"]
    texts = [_caption(scene.figures, detail) for detail in details]
    for opening in OPENINGS:
        detail = str(rng.choice([*details, "inverse"]))
        texts.append(f"{opening} {_caption(scene.figures, detail)}")
    return texts


def _caption(figures: Sequence[Figure], detail: str) -> str:
    """Name the figures; relate each to the one before it, or place the first that can be."""
    text, placed = "", detail != "positions"
    for i, figure in enumerate(figures):
        if i:
            link = "and" if detail == "positions" else _link(figures[i - 1], figure, detail)
            text += f" {link} "
        text += f"a {figure.name}"
        position = None if placed else _position(figure)
        if position:
            text, placed = f"{text} {position}", True
    return text


def _link(before: Figure, after: Figure, detail: str) -> str:
    direction = _direction(before, after)
    fitting = [link for link, it in LINKS.items() if it == direction]
    return next(link for link in fitting if (detail == "inverse") == link.startswith("and"))


def _direction(before: Figure, after: Figure) -> tuple[int, int] | None:
    """(x, y) from one figure to the other where one axis clearly dominates."""
    dx, dy = after.x - before.x, after.y - before.y
    if abs(dx) > CLEAR * abs(dy):
        return (1 if dx > 0 else -1), 0
    if abs(dy) > CLEAR * abs(dx):
        return 0, (1 if dy > 0 else -1)
    return None


def _position(figure: Figure) -> str | None:
    """The phrase for the figure's quarter where it lies well inside."""
    if min(abs(figure.x - SIZE / 2), abs(figure.y - SIZE / 2)) < MIDDLE:
        return None
    quarter = (int(figure.x > SIZE / 2), int(figure.y > SIZE / 2))
    return next(phrase for phrase, it in POSITIONS.items() if it == quarter)


# Writing --------------------------------------------------------------------------------------


def write(folder: Path, num_train: int, num_val: int, seed: int) -> None:
    """Write both splits below `folder`: `train/`, `val/` and `annotations/` (COCO JSON).

    The same arguments give the same bytes (with the same Pillow and NumPy).
    """
    for split, count in zip(SPLITS, (num_train, num_val), strict=True):
        if not 1 <= count <= FIRST_ID["val"] - FIRST_ID["train"]:
            raise ValueError(f"{split}: {count} scenes: give 1 to a million")
        _write_split(folder, split, count, seed)


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = [f"{size} {colour} {shape}" for size in RADII for colour in COLOURS for shape in SHAPES]
    categories = [
        {"id": i, "name": name, "supercategory": name.split()[-1]}
        for i, name in enumerate(names, start=1)
    ]
    category_ids = {name: i for i, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for image_id in range(FIRST_ID[split], FIRST_ID[split] + count):
        it = scene(split, image_id, seed)
        file_name = f"{image_id:012d}.jpg"
        buffer = io.BytesIO()
        draw(it).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        (folder / split / file_name).write_bytes(buffer.getvalue())
        images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
        rng = np.random.default_rng([seed, len(SPLITS), image_id])
        for text in captions(it, rng):
            sentences.append({"id": len(sentences) + 1, "image_id": image_id, "caption": text})
        for figure in it.figures:
            bbox = [round(number, 2) for number in figure.bbox]
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[figure.name],
                    "bbox": bbox,
                    "area": round(bbox[2] * bbox[3], 2),
                    "iscrowd": 0,
                }
            )
    info = {"description": "caption_ray shapes", "split": split, "seed": seed}
    for kind, content in {
        "captions": {"info": info, "images": images, "annotations": sentences},
        "instances": {
            "info": info,
            "images": images,
            "annotations": instances,
            "categories": categories,
        },
    }.items():
        path = folder / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
