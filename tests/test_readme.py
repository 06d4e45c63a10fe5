"""What the markdown files say exists, exists: commands, settings, files, links and modules."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image
from running_jobs import run_job

from caption_ray import config
from caption_ray.data.formats import find_splits
from caption_ray.data.locations import read_picture

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "caption_ray"
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *PACKAGE.rglob("*.md"), *(ROOT / ".github").glob("*.md")]
}

FOREIGN_OPTIONS = {
    "--address", "--data-binary", "--metrics-export-port", "--working-dir", "--help", "--debug",
}  # fmt: skip
"""Of ray, serve and curl; the last two of every job."""

PLACEHOLDER = "mine"
"""What the recipes call the reader's own."""

every_page = pytest.mark.parametrize("page", PAGES)


# Reading markdown -----------------------------------------------------------------------------


def blocks(text: str, language: str | None = None) -> list[str]:
    """The fenced blocks, of one language or of all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if language in (None, kind)]


def prose(text: str) -> str:
    """All but the fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """The code in the prose, a span each, which may go over a line's end."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[list[str]]:
    """All that is typed into a shell, in blocks and in spans, word by word."""
    lines = [
        line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").split("\n")
    ]
    return [
        shlex.split(part, comments=True) for line in [*lines, *code(text)]
        for part in re.split(r" && | \| ", line) if _is_typed(line)
    ]  # fmt: skip


def _is_typed(line: str) -> bool:
    return bool(re.search(r"\bjobs/\w+\.py\b|\bpython |^-", line)) and "'" not in line


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text))


# What there is --------------------------------------------------------------------------------


def options_of(kind: typing.Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        inner = typing.get_type_hints(kind)[field.name]
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            yield from options_of(inner, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            if inner is bool:
                yield f"--{prefix}no-{name}"


@functools.cache
def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@functools.cache
def job_options(name: str, section: str = "") -> frozenset[str]:
    """The options of a job; of jobs/benchmark.py those of a section, or of all."""
    if name == "train":
        return frozenset(options_of(config.Config))
    if name != "benchmark":
        return frozenset(options_of(job(name).Arguments))
    sections = job(name).SECTIONS
    kinds = [kind for known, (kind, _) in sections.items() if section in ("", known)]
    return frozenset(option for kind in kinds for option in options_of(kind))


JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


@functools.cache
def module_options(module: str) -> frozenset[str]:
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return frozenset(re.findall(r"--[a-z][\w.-]*", shown.stdout))


# Tests ----------------------------------------------------------------------------------------


@every_page
def test_every_option_of_a_command_is_one_of_that_job(page: str) -> None:
    for words in commands(PAGES[page]):
        start = next((n for n, word in enumerate(words) if word.startswith("jobs/")), None)
        if start is not None:
            name, arguments = Path(words[start]).stem, words[start + 1 :]
            given = {word for word in arguments if word.startswith("--")} - {"--help"}
            section = arguments[0] if name == "benchmark" and arguments else ""
            if section and section != "SECTION":
                assert section in job("benchmark").SECTIONS, words
            known = job_options(name, section.replace("SECTION", ""))
            if name == "train" and arguments and not arguments[0].startswith(("-", "[", ".")):
                assert arguments[0] in config.PRESETS, words
            assert given <= known | {"--section.setting"}, f"{words}: {given - known}"
        elif "-m" in words and words[words.index("-m") + 1].startswith("caption_ray."):
            given = {word for word in words if word.startswith("--")}
            assert given <= module_options(words[words.index("-m") + 1]), words


@every_page
def test_every_option_that_is_named_alone_exists(page: str) -> None:
    known = FOREIGN_OPTIONS.union(*(job_options(name) for name in JOBS))
    for span in code(PAGES[page]):
        if span.startswith("--"):
            assert span.split()[0] in known, span


@pytest.mark.parametrize("file", ["cluster.yaml", "serve_config.yaml"])
def test_every_setting_that_a_file_names_exists(file: str) -> None:
    text = (ROOT / file).read_text()
    named = set(re.findall(r"--(?:data|model|search|train|run)\.[\w.-]*\w", text))
    assert named <= job_options("train")


@every_page
def test_every_file_that_is_named_exists(page: str) -> None:
    text, here = PAGES[page], (ROOT / page).parent
    names = {path.name for path in ROOT.rglob("*.py")}
    for named in re.findall(r"(?<![\w/.:-])[\w./-]+\.(?:py|yaml|toml|md|html)\b", text):
        if PLACEHOLDER in Path(named).stem or named in ("report.html", "index.html"):
            continue
        if "/" in named:
            assert (ROOT / named).exists() or (here / named).exists(), named
        else:
            assert named in names or (ROOT / named).exists() or (here / named).exists(), named
    for named in re.findall(r"`((?:caption_ray|jobs|tests)/[^`\s]*)`", text):
        if PLACEHOLDER not in named:
            assert (ROOT / named).exists(), named


@every_page
def test_every_module_and_environment_variable_that_is_named_exists(page: str) -> None:
    for module in set(re.findall(r"\bcaption_ray(?:\.\w+)+", PAGES[page])):
        assert importlib.util.find_spec(module) is not None, module
    sources = [path.read_text() for path in [*PACKAGE.rglob("*.py"), ROOT / "tests/conftest.py"]]
    for variable in set(re.findall(r"\bCAPTION_RAY_\w+", PAGES[page])):
        assert any(f'"{variable}"' in source for source in sources), variable
    for metric in set(re.findall(r"\bray_(caption_ray_\w+)", PAGES[page])):
        own = metric.removesuffix("_total")  # as counters are exported
        assert any(f'"{own}"' in source for source in sources), metric


@every_page
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links(PAGES[page]):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.read_text()), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page not in PAGES:
            continue
        seen.add(page)
        for link in links(PAGES[page]):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            if target.is_relative_to(ROOT):
                waiting.append(str(target.relative_to(ROOT)))
    assert seen == set(PAGES)


@every_page
def test_what_is_fenced_can_be_read(page: str) -> None:
    for block in blocks(PAGES[page], "python"):
        ast.parse(block)
    for block in blocks(PAGES[page], "json"):
        json.loads(block)
    for block in blocks(PAGES[page], "yaml"):
        yaml.safe_load(block)


FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_explained_beside_it(folder: Path) -> None:
    # | `module.py` | what it is for |, and perhaps a link around the first
    explained = re.findall(
        r"^\| \[?`(\w+(?:\.py|/))`\S* \| .{10,} \|$",
        (folder / "README.md").read_text(),
        re.MULTILINE,
    )
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    inner = {
        f"{path.name}/" for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"
    }
    assert sorted(explained) == sorted(modules | inner)


def test_the_readme_is_for_people_in_a_hurry() -> None:
    assert len(README.splitlines()) <= 200
    install, serve, ask, test = (block.strip() for block in blocks(README, "sh")[:4])
    assert install == "python -m pip install -e . && python jobs/train.py"
    assert serve == "serve run serve_config.yaml"
    assert ask.startswith("curl ") and "picture" not in ask  # see tests/serving/test_http.py
    assert test == 'python -m pip install -e ".[test]" && python -m pytest'


def test_coco_takes_five_commands_and_ones_own_pictures_two() -> None:
    for title, count in (("COCO in five commands", 5), ("Your own pictures in two", 2)):
        section = README.split(f"## {title}")[1].split("\n## ")[0]
        (block,) = blocks(section, "sh")
        assert len(block.replace("\\\n", "").splitlines()) == count, title


def test_ones_own_pictures_are_found_where_the_readme_has_them(tmp_path: Path) -> None:
    (text,) = blocks(README.split("## Your own pictures in two")[1].split("\n## ")[0], "json")
    (image,) = json.loads(text)["images"]
    for split in ("train", "val"):
        (tmp_path / f"captions_{split}.json").write_text(text)
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / image["file_name"])
    for found in find_splits(str(tmp_path)).values():
        (record,) = found.records
        assert record.picture.captions == [json.loads(text)["annotations"][0]["caption"]]
        assert read_picture(record.location)


def test_the_file_tree_is_the_real_one() -> None:
    tree = README.split("## The file tree")[1].split("```")[1]
    described = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("no git checkout")
    real = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert described == {name for name in real if not name.startswith(".")} - {"README.md"}
    (jobs,) = re.findall(r"^jobs/ +(.*)$", tree, re.MULTILINE)
    assert set(jobs.rstrip(".").split(", ")) == {f"{name}.py" for name in JOBS}


def test_presets_are_described() -> None:
    assert set(re.findall(r"^\| `([\w-]+)`(?: \(default\))? \| .* \|$", README, re.MULTILINE)) == (
        set(config.PRESETS)
    )
    assert f"| `{config.DEFAULT_PRESET}` (default)" in README


@pytest.mark.parametrize("name", ["train", "ingest", "caption", "evaluate", "benchmark serve"])
def test_help_of_every_job_is_enough_by_itself(name: str, tmp_path: Path) -> None:
    name, *section = name.split()
    arguments = ["coco", "--help"] if name == "train" else [*section, "--help"]
    shown = run_job(name, *arguments, cwd=tmp_path)
    assert shown.returncode == 0
    for word in ("usage", "default" if name != "train" else "train.learning-rate"):
        assert word in shown.stdout
    # each option is explained, and none of the explanations is lost
    assert shown.stdout.count("--") > 2
    for option in job_options(name, *section):
        assert option in shown.stdout, option


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["--train.epoch", "1"], "--train.epoch"),
        (
            "ingest",
            ["--source", "/nowhere", "--out", "/tmp/none"],
            "/nowhere: no captions in a format that is known",
        ),
        (
            "caption",
            ["--images", "x", "--out", "y", "--checkpoint", "/nowhere"],
            "/nowhere: neither",
        ),
    ],
)
def test_bad_input_ends_a_job_with_a_message_and_no_traceback(
    job: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode != 0
    assert message in said
    assert "Traceback" not in said
