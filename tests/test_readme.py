"""What the README says exists."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from caption_ray import config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _options(kind, prefix=""):
    for field in dataclasses.fields(kind):
        inner = typing.get_type_hints(kind)[field.name]
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            yield from _options(inner, f"{name}.")
        else:
            yield f"--{name}"
            if inner is bool:  # a switch
                yield f"--{prefix}no-{field.name.replace('_', '-')}"


@pytest.mark.parametrize("file", ["README.md", "cluster.yaml", "serve_config.yaml"])
def test_every_setting_that_is_named_exists(file):
    named = set(
        re.findall(r"--(?:data|model|search|train|run)\.[\w.-]*\w", (ROOT / file).read_text())
    )
    assert named <= set(_options(config.Config))
    if file == "README.md":
        assert len(named) > 5


def test_the_two_commands_stand_first():
    assert "python -m pip install -e . && python jobs/train.py" in README
    assert 'python -m pip install -e ".[test]" && python -m pytest' in README


def test_the_file_tree_is_the_real_one():
    tree = README.split("## The file tree")[1].split("```")[1]
    described = {line.split()[0].split("/")[-1] for line in tree.splitlines() if ".py " in line}
    described -= {""}
    real = {path.name for path in (ROOT / "caption_ray").rglob("*.py")} - {"__init__.py"}
    assert real == {name for name in described if name in real}, real - described
    for name in re.findall(r"(\w+\.py)  ?", tree.split("jobs/")[1]):
        assert (ROOT / "jobs" / name).exists()


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_are_described(preset):
    assert f"| `{preset}`" in README


@pytest.mark.parametrize("job", ["train", "ingest", "caption", "evaluate", "benchmark serve"])
def test_help_of_every_job_is_enough_by_itself(job):
    name, *section = job.split()
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *section]
    arguments = ["coco", "--help"] if job == "train" else ["--help"]
    shown = subprocess.run(command + arguments, capture_output=True, text=True)
    assert shown.returncode == 0
    for word in ("usage", "default" if job != "train" else "train.learning-rate"):
        assert word in shown.stdout
    # each option is explained, and none of the explanations is lost
    assert shown.stdout.count("--") > 2


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["--train.epoch", "1"], "--train.epoch"),
        ("ingest", ["--source", "/nowhere", "--out", "/tmp/none"], "/nowhere: no captions"),
        (
            "caption",
            ["--images", "x", "--out", "y", "--checkpoint", "/nowhere"],
            "/nowhere: neither",
        ),
    ],
)
def test_bad_input_ends_a_job_with_a_message_and_no_traceback(job, arguments, message, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode != 0
    assert message in said
    assert "Traceback" not in said
