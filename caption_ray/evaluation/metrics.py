"""Scores captions that are in files, without model or Ray:

    python -m caption_ray.evaluation.metrics --references captions.json --results results.json

The metrics themselves are in caption_ray/captioning/metrics.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caption_ray import storage
from caption_ray.captioning.metrics import MetricsError, Scores, score
from caption_ray.config import Uri, parse_arguments


def read_references(uri: str) -> dict[int, list[str]]:
    """Captions by image, from a COCO annotation file. Raises MetricsError."""
    document = _read_json(uri)
    try:
        references: dict[int, list[str]] = {int(image["id"]): [] for image in document["images"]}
        for annotation in document["annotations"]:
            references[int(annotation["image_id"])].append(str(annotation["caption"]))
    except (TypeError, KeyError, ValueError) as error:
        raise MetricsError(f"{uri}: no COCO captions ({error!r})") from error
    return {image: captions for image, captions in references.items() if captions}


def read_results(uri: str) -> dict[int, str]:
    """A caption by image, from a file as COCO's evaluation server takes it. Raises MetricsError."""
    results: dict[int, str] = {}
    try:
        for result in _read_json(uri):
            image = int(result["image_id"])
            if image in results:
                raise MetricsError(f"{uri}: image {image} has two captions; give one")
            results[image] = str(result["caption"])
    except (TypeError, KeyError) as error:
        raise MetricsError(
            f'{uri}: no COCO results, [{{"image_id": 1, "caption": "..."}}, ...] ({error!r})'
        ) from error
    return results


def _read_json(uri: str) -> Any:
    try:
        return json.loads(storage.read_bytes(storage.resolve(uri)))
    except (OSError, ValueError) as error:
        raise MetricsError(f"{uri}: {error}") from error


def match(
    references: Mapping[int, list[str]], results: Mapping[int, str]
) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references, by ascending image. Raises MetricsError, naming the images, if one
    has no caption or is unknown."""
    for problem, odd in (
        ("have no caption in the results", references.keys() - results.keys()),
        ("of the results are unknown to the references", results.keys() - references.keys()),
    ):
        if odd:
            shown = ", ".join(map(str, sorted(odd)[:10]))
            raise MetricsError(f"{len(odd)} images {problem}: {shown}")
    images = sorted(references)
    return [results[image] for image in images], [references[image] for image in images]


def table(scores: Scores) -> str:
    """For people."""
    lines = [f"{name:10} {value:8.4f}" for name, value in scores.corpus.items()]
    lines += [f"{name:10}        - {reason}" for name, reason in scores.skipped.items()]
    return "\n".join(lines)


@dataclass
class Arguments:
    """Score captions that are in files, without model or Ray.

    Prints a table and, as the last line, the metrics as one JSON object.
    """

    references: Uri
    """COCO caption annotations: a file or URI."""
    results: Uri
    """Captions as COCO's evaluation server takes them: a file or URI."""
    java: bool = True
    """Also METEOR and SPICE, if Java and pycocoevalcap are there."""


def main() -> None:
    arguments = parse_arguments(Arguments)
    try:
        references, results = read_references(arguments.references), read_results(arguments.results)
        scores = score(*match(references, results), java=arguments.java)
    except MetricsError as error:
        sys.exit(f"error: {error}")
    print(table(scores))
    print(json.dumps(scores.corpus))


if __name__ == "__main__":
    main()
