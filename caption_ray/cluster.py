"""Connecting to Ray, the Ray settings that all jobs share, and what the cluster offers."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from caption_ray import ray_internals, storage
from caption_ray.config import from_environment

GPU_VARIABLE = "CAPTION_RAY_NUM_GPUS"
"""Environment variable that promises GPUs although no node has one yet: clusters that start GPU
nodes on demand show none until something asks for one."""

NO_PROGRESS_TIMEOUT = 24 * 3600.0
"""Seconds. By default Ray Data aborts a run whose consumer pauses for half an hour (a long
validation, a checkpoint to slow storage)."""

WORKER_ENVIRONMENT = {
    # OpenMP threads spin by default while they wait for each other, which makes a step ten times
    # slower as soon as decoding needs one of the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    # without this cuBLAS has no deterministic kernels (--train.deterministic)
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment of training workers."""

SERVING_ENVIRONMENT = {
    # Threads spin for about 0.1 ms before they sleep. A caption has 1,500 moments at which they
    # wait for each other, and waking up takes longer than that. One picture takes 170 ms this way,
    # 240 ms otherwise.
    "GOMP_SPINCOUNT": "10000",
    # One event loop for Ray, for our code and for calls between deployments: nothing of ours blocks
    # it, and with separate loops each picture waits for several more threads to wake up.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Environment of the endpoint's processes."""

INGRESS_ENVIRONMENT = {
    # Memory of large pictures goes back to the system at once. By itself the C library would keep
    # it for others, hundreds of megabytes after the first large picture.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
"""Environment of the processes that decode pictures for the endpoint, besides the above."""

TRAIN_ENVIRONMENT = {
    # how soon workers hear that a node is being preempted: the checkpoint needs most of the seconds
    # that are left
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    # between two looks at workers and validations. With Ray's 2 s, a run of three epochs idles for
    # 6 s at its end, and a worker's death goes unnoticed for 2
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
ELASTIC_ENVIRONMENT = {
    # Ray Train counts nodes every 20 s. Just after a loss it asks for more workers than there is
    # room for, and counts again only after this time
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}
"""Settings that Ray Train takes from the driver's environment; what is set there already has
precedence. The second applies where the number of workers may change."""

RESIZE_SECONDS = 30.0
"""Seconds between checks whether there is room for more training workers (`train.min_workers`);
using it costs a restart of all workers."""


def connect(output: str | None = None) -> None:
    """Join the cluster that `ray job submit` or RAY_ADDRESS names, or one that runs on this
    machine; start a local one if there is none. `output`: URI of what the job will write; if other
    nodes may not see it, this is said."""
    if not ray.is_initialized():
        # with its dashboard: Ray Train's cleaner of placement groups queries it twice a second, and
        # complains on the console whenever it gets no answer
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
        # nobody else knows the address of a Ray that was started here (see configure_train)
        if "://" not in os.environ.get("RAY_ADDRESS", ""):
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    configure_data()
    if output is not None and storage.is_local(output) and (nodes := num_nodes()) > 1:
        print(
            f"note: {storage.resolve(output)} must be the same place on all {nodes} nodes (NFS, "
            "say); if it is not, give storage that they share, such as s3://...",
            flush=True,
        )


def configure_train(elastic: bool) -> None:
    """Ray Train's settings for this process, the driver."""
    # Without the address, its cleaner of placement groups looks for a Ray on its machine, and gives
    # up if there are two: that of this run, and that of a `serve run` beside it.
    ray_internals.pass_on_to_train("RAY_ADDRESS")
    for name, value in {**TRAIN_ENVIRONMENT, **(ELASTIC_ENVIRONMENT if elastic else {})}.items():
        os.environ.setdefault(name, value)


def configure_data() -> None:
    """Ray Data's settings for this process."""
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT
    context.enable_progress_bars = False  # the jobs show their own
    ray_internals.slow_down_polling()
    # these log details of every dataset that only interest Ray's developers
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"


def keep_data_actors_here() -> None:
    """Make Ray Data place its own actors on this process's node.

    They stay where Ray Data is first used. In a training worker that would be a GPU node, which
    then would never count as idle, and never be released.
    """
    for _ in ray.data.from_items([0]).iter_batches():
        pass


def on_this_node() -> dict[str, Any]:
    """Options of an actor that takes no CPU and lives on this process's node, so that it does not
    die with another node. Its calls, several a second, are not recorded."""
    here = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        # the head would keep a record of each of the last 100,000 in memory
        "enable_task_events": False,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise what a Ray task raised as it was, without the stack of the worker that Ray wraps it
    in."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None


def progress_bar(total: int, doing: str, shown: bool, unit: str = "image") -> tqdm[Any]:
    """A progress bar. In a log file, where each refresh adds a line, it is refreshed rarely."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, desc=doing, disable=not shown, mininterval=pause)


def num_gpus() -> int:
    """GPUs of the cluster as it stands, and at least as many as $CAPTION_RAY_NUM_GPUS promises."""
    promised = math.ceil(promised_gpus() or 0)
    return max(promised, int(ray.cluster_resources().get("GPU", 0)))


def promised_gpus() -> float | None:
    """What $CAPTION_RAY_NUM_GPUS says, None without it. Raises ValueError if that is no number."""
    promised = from_environment(GPU_VARIABLE)
    try:
        number = None if promised is None else float(promised)
        if number is None or 0 <= number < math.inf:
            return number
    except ValueError:
        pass
    raise ValueError(f"${GPU_VARIABLE} is {promised!r}: give a number of GPUs, or unset it")


def num_nodes() -> int:
    """Nodes that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def num_cpus() -> float:
    """CPUs of the cluster as it stands."""
    return float(ray.cluster_resources().get("CPU", 0))
