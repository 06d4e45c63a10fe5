"""What all sections share: measuring several ways in turn, and printing the results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Way = Callable[[], float]
"""Does some work and returns its amount (pictures, captions, steps)."""


def in_turn(ways: Mapping[str, Way], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Work per second of each way in each round. The ways take turns, because a machine's speed
    changes within minutes; the first `warm_up` rounds are dropped."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            synchronize()
            start = time.perf_counter()
            work = way()
            synchronize()
            if number >= warm_up:
                rates[name].append(work / (time.perf_counter() - start))
    return rates


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(rates: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Ratios of rates to the baseline's rates in the same rounds."""
    return [rate / base for rate, base in zip(rates, baseline, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    """Median ± half of the range, as text."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.median(values):{form}} ± {half:{form}}"


def report(
    section: str, title: str, unit: str, rates: Mapping[str, list[float]], baseline: str
) -> dict[str, Any]:
    """Print a table of all ways and their ratios to `baseline`; returns it for `record`."""
    print(f"\n{title}")
    print(f"{'':34}{unit + '/s':>20}{'of ' + baseline:>28}")
    found = {}
    for name, own in rates.items():
        compared = ratios(own, rates[baseline])
        digits = ".2f" if statistics.median(own) < 100 else ".0f"
        print(f"{name:34}{spread(own, digits):>20}{spread(compared, '.2f'):>28}")
        found[name] = {
            f"{unit}_per_s": float(f"{statistics.median(own):.4g}"),
            "ratio": round(statistics.median(compared), 3),
        }
    return {"section": section, "title": title, "baseline": baseline, "ways": found}


def record(found: Mapping[str, Any]) -> None:
    """Print one line of JSON: the results, and what they were measured on."""
    print(json.dumps({**found, **machine()}), flush=True)


def machine() -> dict[str, Any]:
    """Date, commit and hardware."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{len(os.sched_getaffinity(0))} cores of {_processor()}"
    )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": git.stdout.strip() or None,
        "machine": device,
        "torch": torch.__version__,
    }


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.exists():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()
