"""Who may import whom: every import runs downhill, and few modules need Ray.

The floors, from the ground up: settings and storage; data beside model; captioning, which the three
wings share; the wings training, evaluation and serving, which do not know each other; benchmark.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "caption_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"config", "storage", "ray_internals", "cluster"}
BELOW = {
    "config": set(),
    "storage": set(),
    "command": {"config", "storage"},
    "ray_internals": set(),
    "fetch": set(),
    "report_page": set(),
    "cluster": {"config", "storage", "ray_internals"},
    "data": {*GROUND, "fetch", "report_page"},
    "model": {"config"},
    "captioning": {"config", "storage", "data", "model"},
    "training": {*GROUND, "data", "model", "captioning"},
    "evaluation": {*GROUND, "command", "report_page", "data", "model", "captioning"},
    "serving": {*GROUND, "fetch", "data", "model", "captioning"},
}
BELOW["benchmark"] = {*BELOW} - {"benchmark"}
"""Which parts of the package each part may import, itself aside."""

NEED_RAY = {
    "cluster",
    "ray_internals",
    "data.ingest",
    "data.pipeline",
    "data.read_tasks",
    "evaluation.evaluate",
    "evaluation.scorecard",
    "serving.app",
    "serving.ingress",
    "serving.replica",
    "training.console",
    "training.feature_cache",
    "training.feed",
    "training.interruption",
    "training.permanence",
    "training.rewards",
    "training.trainer",
    "training.upload",
    "training.validation",
    "training.worker",
}
"""All that cannot be imported without Ray, benchmarks aside."""


def _name(path: Path) -> str:
    """`data.plan` of caption_ray/data/plan.py, `data` of caption_ray/data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(path): path for path in FILES}


@functools.cache
def _imports(module: str, lazy: bool) -> frozenset[str]:
    """Names that the module imports; with `lazy` also those inside of functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return frozenset(found)


def _of_ours(names: frozenset[str]) -> set[str]:
    """Those that are modules of the package, by their short names."""
    short = {name.removeprefix("caption_ray.") for name in names if name.startswith("caption_ray.")}
    return short & set(MODULES)


def _loads_with(module: str, parents: bool = True) -> set[str]:
    """The module and all modules of the package that are loaded with it; `parents`: also with the
    packages that they are in."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _of_ours(_imports(name, False))
            waiting += [name.rpartition(".")[0]] if "." in name and parents else []
    return seen


def _knows(module: str, package: str, lazy: bool = True) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in _imports(module, lazy))


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_run_downhill(module):
    part = module.partition(".")[0]
    others = {other.partition(".")[0] for other in _of_ours(_imports(module, True))} - {part, ""}
    assert others <= BELOW[part], f"{module} imports {sorted(others - BELOW[part])}"
    assert not _knows(module, "jobs")


def test_no_two_modules_import_each_other():
    for module in MODULES:
        for other in _of_ours(_imports(module, False)) - {module}:
            # a package may gather its own modules, and they may know it
            if not (other.startswith(f"{module}.") or module.startswith(f"{other}.")):
                loaded = _loads_with(other, parents=False)
                assert module not in loaded or not module, f"{module} and {other}"


def test_few_modules_need_ray():
    """Directly, or through what they import: the model, the loop and the predictor run without."""
    need = {
        module
        for module in MODULES
        if any(_knows(name, "ray", lazy=False) for name in _loads_with(module))
        and not module.startswith("benchmark")
    }
    assert need == NEED_RAY


@pytest.mark.parametrize(
    "module", ["data.ledger", "data.plan", "data.preparation", "data.transforms"]
)
def test_pure_functions_of_data_know_no_storage(module):
    assert "storage" not in _loads_with(module)


def test_the_loop_knows_no_storage():
    assert "storage" not in _loads_with("training.loop")


def test_only_storage_knows_the_kinds_of_storage():
    for module in MODULES:
        if module.partition(".")[0] != "storage":
            assert not any(name.startswith("storage.") for name in _of_ours(_imports(module, True)))


def test_only_one_module_reaches_into_ray():
    for module, path in MODULES.items():
        if module != "ray_internals":
            for private in ("_internal", "_private", "_topology", "_by_reference"):
                assert f"ray.{private}" not in path.read_text(), module
            names = _imports(module, True)
            assert not [n for n in names if n.startswith("ray.") and "._" in n], module


def _loaded(module: str, *asked_for: str) -> set[str]:
    """Which of the packages are loaded with a module."""
    code = f"import sys, {module}; print(*({{*{asked_for}}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_ray():
    assert _loaded("caption_ray", "torch", "ray", "caption_ray") == {"caption_ray"}


def test_the_predictor_is_loaded_without_ray():
    assert _loaded("caption_ray.captioning.predictor", "torch", "ray") == {"torch"}


@pytest.mark.parametrize("module", ["data.read_tasks", "training.console"])
def test_processes_that_compute_nothing_load_no_torch(module):
    """Read tasks and small actors: torch would take each 250 MiB, and a second to start."""
    assert _loaded(f"caption_ray.{module}", "torch", "ray") == {"ray"}


def test_no_file_is_longer_than_a_person_reads():
    long = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: lines for name, lines in long.items() if lines > 450}


def test_jobs_are_short():
    for job in (PACKAGE.parent / "jobs").glob("*.py"):
        if job.name != "benchmark.py":
            assert len(job.read_text().splitlines()) <= 60, job.name
