"""Receipts: what each finished part of a job leaves in storage, so that an interrupted job is
completed by running it again (ingest, and the features of a frozen encoder)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from caption_ray import storage
from caption_ray.config import from_dict

THREADS = 16
"""Receipts that are read at a time."""

T = TypeVar("T")


def write(uri: str, receipt: Any) -> None:
    """Write a receipt, a dataclass of plain values; always after what it vouches for."""
    storage.write_bytes(uri, json.dumps(dataclasses.asdict(receipt), indent=1).encode())


def read_all(
    folder: str, kind: type[T], is_valid: Callable[[T], bool] = lambda receipt: True
) -> dict[str, T]:
    """The valid receipts of this kind below the folder, by their path below it without `.json`."""

    def read(uri: str) -> T | None:
        try:
            receipt = from_dict(kind, json.loads(storage.read_bytes(uri)), uri)
        except (FileNotFoundError, ValueError):
            return None  # damaged, or of another version: the work is done again
        return receipt if is_valid(receipt) else None

    base = storage.resolve(folder)
    uris = [uri for uri in storage.list_files(base) if uri.endswith(".json")]
    with ThreadPoolExecutor(THREADS) as threads:
        found = zip(uris, threads.map(read, uris), strict=True)
        return {
            uri[len(base) + 1 :].removesuffix(".json"): receipt
            for uri, receipt in found
            if receipt is not None
        }
