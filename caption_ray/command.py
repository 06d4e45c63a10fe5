"""What all jobs share: the check of their output before the work, and how they end on an error.

An error ends a job with a few lines that say what to do. Its stack is for developers of this
package: it goes to the console with `--debug`, otherwise into a file that the last line names. An
error that names its own remedy needs no stack.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caption_ray import storage
from caption_ray.config import require

PACKAGE = Path(__file__).parent
LINES = 4
"""Most lines of a message, besides the one that names the file."""
INTERRUPTED = 130
"""Exit status of a process that SIGINT ended, by the shells' convention."""


def run(main: Callable[[], None]) -> None:
    """Run a job's `main`, which reads its arguments from `sys.argv`, and end the process with
    status 1 and a short message if it raises an error. `--debug` among the arguments asks for the
    stack as well."""
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        raise SystemExit(report(error, keep_stack=not debug)) from None


def check_output(option: str, uri: str, *, folder: bool) -> None:
    """Raise ValueError, naming the option, its value and the remedy, unless the output of a job can
    be written there now and will stay there. Checked first, because all of the work would be
    lost."""
    where = storage.resolve(uri)
    require(
        not (storage.is_local(where) and _is_copy_by_ray(Path(where))),
        option,
        uri,
        "`ray job submit` runs the job in a copy of its working directory, which vanishes with all "
        "that is in it; give an absolute path on storage that all nodes share, or s3://...",
    )
    try:
        storage.check_writable(where, folder=folder)
    except (ValueError, storage.StorageError) as error:
        require(False, option, uri, str(error).removeprefix(f"{where}: "))


def _is_copy_by_ray(path: Path) -> bool:
    """Whether the path lies in Ray's copy of `--working-dir` on this node."""
    return any(
        above == "working_dir_files" and name.startswith("_ray_pkg_")
        for above, name in zip(path.parts, path.parts[1:], strict=False)
    )


def report(error: Exception, keep_stack: bool) -> str:
    """What the user reads of an error that ended a job."""
    cause = original(error)
    lines = _message(cause).splitlines()[:LINES]
    if keep_stack and not _is_explained(cause):
        lines.append(_kept(error))
    return "\n".join(lines)


def original(error: BaseException) -> BaseException:
    """The error that Ray wrapped, once or several times, with the stacks of its processes."""
    while (inner := _wrapped(error)) is not None:
        error = inner
    return error


def _wrapped(error: Any) -> BaseException | None:
    # by name, since this module does without Ray: of a task, of Ray Train's controller, and of its
    # workers, where the first is as good as any
    failures = getattr(error, "worker_failures", None) or {}
    ways = [getattr(error, name, None) for name in ("cause", "controller_failure")]
    found = [inner for inner in (*ways, *failures.values()) if isinstance(inner, BaseException)]
    return found[0] if found else None


def _message(error: BaseException) -> str:
    said = "\n".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, ImportError) and error.name:
        return f"error: {said}; install the package that has {error.name}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {error.filename}: {error.strerror}"
    # of others than these, the name tells as much as what they say
    if said and (isinstance(error, ValueError) or _is_explained(error)):
        return f"error: {said}"
    return f"error: {type(error).__name__}: {said}" if said else f"error: {type(error).__name__}"


def _is_explained(error: BaseException) -> bool:
    """Whether this package raised it on purpose, for people to read."""
    if type(error).__module__.startswith(f"{PACKAGE.name}."):
        return True
    frames = traceback.extract_tb(error.__traceback__)[-1:]  # none, where Ray brought it along
    return any(
        PACKAGE in Path(frame.filename).parents and (frame.line or "").startswith("raise ")
        for frame in frames
    )


def _kept(error: BaseException) -> str:
    """Write the stack into a file, and tell where it is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="caption-ray-error-", suffix=".txt", delete=False
        ) as file:
            file.writelines(traceback.format_exception(error))
        return f"Details: {file.name}"
    except OSError:  # no room even for this
        return "Details: run it again with --debug"
