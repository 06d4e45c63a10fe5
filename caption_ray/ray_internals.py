"""Every use of Ray that its public interface does not promise, in one place.

Each is guarded: with a Ray that has changed here, the run goes on without the gain, and says so
once in the log. `cluster.py` and the serving ingress call these; nobody else reaches into Ray.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from typing import Any

import ray
import ray.data

DATA_STEP_SECONDS = 0.02
"""Between two looks of Ray Data at its tasks."""

logger = logging.getLogger(__name__)


@functools.cache
def _say_lost(gain: str, reason: str) -> None:
    logger.warning("Ray %s has changed: %s (%s)", ray.__version__, gain, reason)


class UnhurriedExecution:
    """Makes Ray Data pause between looks at its tasks while none of them has made progress.

    Ray Data polls without a pause wherever blocks are ready that nobody wants yet, which in
    training is nearly always: a thread inside the training process that takes a core, and Python's
    lock, from the training itself. (Two workers of one thread: 80 images/s instead of 250.)
    """

    def __init__(self) -> None:
        self._last = 0.0
        self._done: list[tuple[int, int, int]] = []

    def on_execution_step(self, executor: Any) -> None:
        try:
            metrics = [operator.metrics for operator in executor._topology]
            done = [
                (m.num_tasks_submitted, m.num_task_outputs_generated, m.num_outputs_taken)
                for m in metrics
            ]
        except (AttributeError, TypeError) as error:
            _say_lost("Ray Data polls its tasks without a pause", repr(error))
            return
        if done == self._done:
            time.sleep(max(0.0, self._last + DATA_STEP_SECONDS - time.monotonic()))
        self._last, self._done = time.monotonic(), done


def slow_down_polling() -> None:
    """Register `UnhurriedExecution` for all Ray Data executions of this process."""
    try:
        registered = ray.data.DataContext.get_current().custom_execution_callback_classes
        callback = _unhurried_callback()
        if callback not in registered:
            registered.append(callback)
    except (ImportError, AttributeError, TypeError) as error:
        _say_lost("Ray Data polls its tasks without a pause", repr(error))


@functools.cache
def _unhurried_callback() -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return type("UnhurriedCallback", (UnhurriedExecution, ExecutionCallback), {})


def submission_id() -> str | None:
    """What `ray job stop` calls the job that this process drives; None if it was not submitted."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        found: str | None = config.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError) as error:
        _say_lost("a run cannot say which job it is", repr(error))
        return None
    return found


def pass_on_to_train(variable: str) -> None:
    """Have Ray Train's controller and its helpers see this environment variable of the driver."""
    try:
        # not for those who do not train: ray.train takes a while to load
        from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

        ENV_VARS_TO_PROPAGATE.add(variable)
    except (ImportError, AttributeError) as error:
        _say_lost(f"Ray Train does not see ${variable}", repr(error))


def without_object_store(handle: Any) -> Any:
    """A Serve handle that sends its arguments straight to the replica. By default Ray leads what is
    above 100 kB (a picture of 256 x 256) through its object store, which takes 5 ms more."""
    try:
        return handle.options(_by_reference=False)
    except TypeError as error:
        _say_lost("pictures take 5 ms longer from ingress to captioner", repr(error))
        return handle
