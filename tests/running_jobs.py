"""Jobs run in the tests' own process, with its Ray: neither has to start for each."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).resolve().parents[1] / "jobs"


def run_job(job: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `python jobs/JOB.py ARGUMENTS` returns and prints, started in `cwd`."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"jobs/{job}.py", *map(str, arguments)])
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
            except SystemExit as end:
                code = end.code
    status = code if isinstance(code, int) else int(code is not None)
    said = f"{err.getvalue()}{code if isinstance(code, str) else ''}"
    return subprocess.CompletedProcess([job, *map(str, arguments)], status, out.getvalue(), said)
