"""Connecting to Ray, and what the cluster offers: the settings that every job shares."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import Any

import ray
import ray.data
from tqdm import tqdm

GPU_VARIABLE = "CAPTION_RAY_NUM_GPUS"
"""Environment variable that says that GPUs can be had although none is up: clusters that start GPU
nodes on demand show none until something asks for one."""

NO_PROGRESS_TIMEOUT = 24 * 3600.0
"""Seconds; Ray Data otherwise ends a run whose consumer pauses for half an hour (a long
validation, a checkpoint to slow storage)."""

WORKER_ENVIRONMENT = {
    # OpenMP threads otherwise spin while they wait for each other, which makes a step ten times
    # slower as soon as decoding needs one of the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    # without it cuBLAS has no deterministic kernels to offer (--train.deterministic)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment of training workers."""


def connect() -> None:
    """Join the cluster that `ray job submit` or RAY_ADDRESS names, else start a local one."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
    configure_data()


def configure_data() -> None:
    """Ray Data's settings for this process."""
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT
    context.enable_progress_bars = False  # the jobs show their own
    # what these say of every dataset is of interest to Ray's developers
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"


def progress_bar(total: int, doing: str, shown: bool, unit: str = "image") -> tqdm[Any]:
    """A bar that counts images, say; in a log file, where each refresh is a line, a slow one."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, desc=doing, disable=not shown, mininterval=pause)


def num_gpus() -> int:
    """GPUs of the cluster as it stands, and at least as many as $CAPTION_RAY_NUM_GPUS promises."""
    promised = math.ceil(float(os.environ.get(GPU_VARIABLE, 0)))
    return max(promised, int(ray.cluster_resources().get("GPU", 0)))


def num_cpus() -> float:
    """CPUs of the cluster as it stands."""
    return float(ray.cluster_resources().get("CPU", 0))
