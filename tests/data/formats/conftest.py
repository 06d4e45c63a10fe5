"""Fixtures of the formats' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from captioned import Photo, pictures_of

from caption_ray.data.formats import find_splits


@pytest.fixture(scope="session")
def photos(coco_mini: Path) -> list[Photo]:
    """Twelve photographs of COCO with five captions each."""
    split = find_splits(str(coco_mini), splits=("val",))["val"]
    return [
        Photo(record.picture.file_name, data, record.picture.captions[:5])
        for record, data in zip(split.records[:12], pictures_of(split), strict=False)
        if isinstance(data, bytes)
    ]
