"""Scores captions that are in files; needs neither a model nor Ray:

    python -m caption_ray.evaluation.metrics --references captions.json --results results.json

The metrics themselves are in caption_ray/captioning/metrics.py.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caption_ray import command, storage
from caption_ray.captioning.metrics import MetricsError, Scores, score
from caption_ray.config import TokenizerName, Uri, parse_arguments
from caption_ray.data import json_entries, unspaced
from caption_ray.data.ptb import tokenize
from caption_ray.data.tokenizer import Tokenizer


def read_references(uri: str) -> dict[int, list[str]]:
    """The reference captions of each image id, from a COCO annotation file. Raises ValueError.

    Every entry must be valid: nobody could tell from a score that a reference was left out.
    """
    document = _read_json(uri)
    references: dict[int, list[str]] = {}
    for i, image in enumerate(json_entries.entries(uri, document, "images")):
        json_entries.check(f"{uri}: images[{i}]", image, {"id": int})
        if image["id"] in references:
            raise ValueError(f"{uri}: images[{i}]: id {image['id']} is there twice")
        references[image["id"]] = []
    for i, annotation in enumerate(json_entries.entries(uri, document, "annotations")):
        where = f"{uri}: annotations[{i}]"
        json_entries.check(where, annotation, {"image_id": int, "caption": str})
        if annotation["image_id"] not in references:
            raise ValueError(
                f"{where}: image_id is {annotation['image_id']}, which is none of the images"
            )
        if not tokenize(annotation["caption"]):
            raise ValueError(f"{where}: caption is {annotation['caption']!r:.80}, without a word")
        references[annotation["image_id"]].append(annotation["caption"])
    return {image: captions for image, captions in references.items() if captions}


def read_results(uri: str) -> dict[int, str]:
    """The caption of each image id, from a results file in the format of COCO's evaluation server.
    Raises ValueError."""
    document = _read_json(uri)
    if not isinstance(document, list):
        raise ValueError(
            f'{uri}: no COCO results, [{{"image_id": 1, "caption": "..."}}, ...]: it is '
            f"{json_entries.outline(document)}"
        )
    results: dict[int, str] = {}
    for i, result in enumerate(document):
        where = f"{uri}: results[{i}]"
        json_entries.check(where, result, {"image_id": int, "caption": str})
        if result["image_id"] in results:
            raise ValueError(f"{where}: image {result['image_id']} has two captions; give one")
        results[result["image_id"]] = result["caption"]
    return results


def _read_json(uri: str) -> Any:
    try:
        return json_entries.parse(uri, io.BytesIO(storage.read_bytes(storage.resolve(uri))))
    except OSError as error:
        why = error.strerror or str(error).removeprefix(f"{storage.resolve(uri)}: ")
        raise ValueError(f"{uri}: {why}") from error


def match(
    references: Mapping[int, list[str]], results: Mapping[int, str]
) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references, in ascending order of image ids. Raises MetricsError, naming the
    images, if an image has no caption or a caption has no image."""
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
    """The scores as a table for people."""
    lines = [f"{name:10} {value:8.4f}" for name, value in scores.corpus.items()]
    lines += [f"{name:10}        - {reason}" for name, reason in scores.skipped.items()]
    return "\n".join(lines)


@dataclass
class Arguments:
    """Score captions that are in files; needs neither a model nor Ray.

    Prints a table and, as the last line, the metrics as one JSON object.
    """

    references: Uri
    """COCO caption annotations: a file or URI."""
    results: Uri
    """Captions in the results format of COCO's evaluation server: a file or URI."""
    tokenizer: TokenizerName = "ptb"
    """How captions are split into words (see --data.tokenizer of training). Only scores with `ptb`,
    which COCO uses, can be compared with published ones."""
    java: bool = True
    """Also compute METEOR and SPICE, if Java and pycocoevalcap are installed."""


def main() -> None:
    arguments = parse_arguments(Arguments)
    references, results = read_references(arguments.references), read_results(arguments.results)
    told, wanted = match(references, results)
    tokenizer = Tokenizer(arguments.tokenizer)
    scores = score(told, wanted, arguments.java, tokenizer)
    unspaced.warn((caption for captions in wanted for caption in captions), tokenizer)
    empty = sum(not tokenizer(caption) for caption in told)
    if empty:  # which a captioner may well say, so it scores
        print(f"note: {empty} captions of {arguments.results} have no word", file=sys.stderr)
    print(table(scores))
    print(json.dumps(scores.corpus))


if __name__ == "__main__":
    command.run(main)
