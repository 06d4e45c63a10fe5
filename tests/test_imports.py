"""Who may import whom: the model, the loop and the predictor run without a cluster."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "caption_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

RAY = {
    "benchmark/cache.py",
    "benchmark/runs.py",
    "benchmark/scale.py",
    "benchmark/train.py",
    "benchmark/memory.py",
    "benchmark/pipeline.py",
    "benchmark/serve.py",
    "cluster.py",
    "data/ingest.py",
    "data/pipeline.py",
    "data/reading.py",
    "training/feature_cache.py",
    "training/rewards.py",
    "training/interruption.py",
    "training/trainer.py",
    "training/validation.py",
    "training/worker.py",
    "training/console.py",
    "evaluation/evaluate.py",
    "serving/app.py",
    "serving/captioner.py",
    "serving/ingress.py",
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in _imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors(path):
    name = path.relative_to(PACKAGE).as_posix()
    assert not _uses(path, "jobs")
    if name not in RAY:
        assert not _uses(path, "ray")
    if name in ("config.py", "storage.py", "backends.py"):
        others = {n for n in _imports(path) if n.startswith("caption_ray.")}
        assert name == "storage.py" or not others
        assert all(n.startswith("caption_ray.backends") for n in others)
    if name.startswith("model/"):
        for above in ("data", "storage", "training", "evaluation", "serving"):
            assert not _uses(path, f"caption_ray.{above}")
    if name.startswith("data/"):
        for above in ("model", "training", "evaluation", "serving"):
            assert not _uses(path, f"caption_ray.{above}")
        if name not in ("data/dataset.py", "data/ingest.py", "data/sources.py"):
            assert not _uses(path, "caption_ray.storage")
    if name != "storage.py":
        assert not _uses(path, "caption_ray.backends")
    if name == "training/loop.py":
        assert not _uses(path, "caption_ray.storage")


def _loaded(module: str, *asked_for: str) -> set[str]:
    """Which of the packages are loaded with a module."""
    code = f"import sys, {module}; print(*({{*{asked_for}}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_ray():
    assert _loaded("caption_ray", "torch", "ray", "caption_ray") == {"caption_ray"}


@pytest.mark.parametrize("module", ["data.reading", "training.console"])
def test_processes_that_compute_nothing_load_no_torch(module):
    """Read tasks and small actors: torch would take each 250 MiB, and a second to start."""
    assert _loaded(f"caption_ray.{module}", "torch", "ray") == {"ray"}


def test_jobs_are_short():
    for job in (PACKAGE.parent / "jobs").glob("*.py"):
        if job.name != "benchmark.py":
            assert len(job.read_text().splitlines()) <= 60, job.name
