"""Every setting of every job, and of serving, refuses what cannot work: at once, and by its name.

The values are made from the settings' types, so that a new setting is tried as well.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import keyword
import math
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caption_ray import cluster, command, config
from caption_ray.config import bounds
from caption_ray.evaluation import metrics
from caption_ray.serving import app
from caption_ray.serving.auth import Tokens
from caption_ray.serving.replica import Serving
from caption_ray.training import initial, trainer

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@functools.cache
def job(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for the docstrings
    spec.loader.exec_module(module)
    return module


def kinds() -> dict[str, Any]:
    """What takes settings, by what people call it."""
    found = {"train": config.Config, "metrics": metrics.Arguments}
    found |= {name: job(name).Arguments for name in ("ingest", "evaluate", "caption")}
    sections = job("benchmark").SECTIONS
    found |= {f"benchmark {name}": kind for name, (kind, _) in sections.items()}
    return found | {"serve args": app.Arguments, "serve user_config": Serving}


class Setting(typing.NamedTuple):
    path: str
    hint: Any
    """Its type, with bounds."""
    kind: Any
    """The dataclass or model that has it."""

    @property
    def option(self) -> str:
        return f"--{self.path.replace('_', '-')}"

    @property
    def base(self) -> Any:
        """Its type, without bounds and None."""
        return without_bounds(self.plain)

    @property
    def plain(self) -> Any:
        """Its type, without None."""
        if typing.get_origin(self.hint) in (typing.Union, types.UnionType):
            (plain,) = (part for part in typing.get_args(self.hint) if part is not type(None))
            return plain
        return self.hint


def without_bounds(hint: Any) -> Any:
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def settings(kind: Any, prefix: str = "") -> Iterator[Setting]:
    for name, hint in bounds.hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, f"{prefix}{name}.")
        else:
            yield Setting(f"{prefix}{name}", hint, kind)


def bad_values(setting: Setting) -> Iterator[Any]:
    """Values of the right type that its bounds exclude, and of other types."""
    base, limits = setting.base, bounds.constraints(setting.plain)
    if base is bool:
        yield "perhaps"
    elif base in (int, float):
        yield from bad_numbers(base, limits)
        yield from ("", "many", True)
    elif base is str:
        yield from ("", " ", "\t\n", 7)
        if "max_length" in limits:
            yield "x" * (limits["max_length"] + 1)
    elif typing.get_origin(base) is typing.Literal:
        yield from ("", "nonsense", 7)
    elif typing.get_origin(base) is tuple:
        item = typing.get_args(base)[0]
        inner = Setting(setting.path, item, setting.kind)
        if "min_length" in limits:
            yield ()
        yield from ((value,) for value in bad_values(inner))
    else:
        pytest.fail(f"{setting.option}: no bad values are known for {base}")


def bad_numbers(base: type, limits: dict[str, Any]) -> Iterator[Any]:
    step = 1 if base is int else None
    for closed, opened, direction in (("ge", "gt", -math.inf), ("le", "lt", math.inf)):
        if opened in limits:
            yield base(limits[opened])
        elif closed in limits:
            edge = limits[closed]
            yield edge + math.copysign(step, direction) if step else math.nextafter(edge, direction)
    if base is float:
        yield from (math.nan, math.inf, -math.inf)
    else:
        yield 1.5


NAMED = [(name, setting) for name, kind in kinds().items() for setting in settings(kind)]
CASES = [(name, setting, value) for name, setting in NAMED for value in bad_values(setting)]
SERVING = [case for case in CASES if case[0].startswith("serve ")]
COMMANDS = [case for case in CASES if not case[0].startswith("serve ")]


def in_order(said: str) -> str:
    """A message without the frame and the line breaks that tyro gives it."""
    return "".join(said.replace("│", "").split())


def shown(value: Any) -> str:
    """As much of a value as a message must have."""
    if isinstance(value, tuple):
        return shown(value[0]) if value else "()"
    return repr(value)[:50].rstrip("'") if isinstance(value, str) and value else repr(value)


def required(kind: Any) -> dict[str, str]:
    """Values for the settings without a default."""
    return {
        field.name: "given"
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }


def with_value(section: Any, path: str, value: Any) -> Any:
    """The section with another value at a path, not checked."""
    name, _, below = path.partition(".")
    if below:
        value = with_value(getattr(section, name), below, value)
    changed = object.__new__(type(section))
    changed.__dict__.update({**vars(section), name: value})
    return changed


def test_the_walk_finds_what_there_is():
    assert len(NAMED) > 190 and len(CASES) > 950
    assert {name for name, _ in NAMED} == set(kinds())


@pytest.mark.parametrize("name", kinds())
def test_every_number_has_bounds_on_both_sides(name):
    for setting in settings(kinds()[name]):
        base, hint = setting.base, setting.plain
        if typing.get_origin(base) is tuple:
            hint = typing.get_args(base)[0]
            base = without_bounds(hint)
        if base in (int, float):
            limits = bounds.constraints(hint)
            assert limits.keys() & {"ge", "gt"}, f"{setting.option} has no lower bound"
            assert limits.keys() & {"le", "lt"}, f"{setting.option} has no upper bound"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in COMMANDS}))
def test_built_in_python_a_bad_value_is_refused_by_its_option(name):
    kind = kinds()[name]
    good = kind(**required(kind))
    config.check(good)
    for _, setting, value in (case for case in COMMANDS if case[0] == name):
        bad = with_value(good, setting.path, value)
        with pytest.raises(ValueError) as refused:
            kind(**vars(bad)) if kind is config.Config else config.check(bad)
        said = str(refused.value)
        assert said.startswith(f"{setting.option} is {repr(value)[:50]}"), said
        assert "give " in said


@pytest.mark.parametrize("name", sorted({name for name, _, _ in COMMANDS}))
def test_on_a_command_line_a_bad_value_ends_the_job_by_its_option(name, capsys):
    kind = kinds()[name]
    alone = {setting.path: only(setting) for setting in settings(kind) if name == "train"}
    for _, setting, value in (case for case in COMMANDS if case[0] == name):
        texts = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        if setting.base is str and value == 7 or value == (7,):
            continue  # as text, a name
        if kind is config.Config:  # the whole is parsed elsewhere: it takes a tenth of a second
            run, needed = functools.partial(config.parse_arguments, alone[setting.path]), []
        else:
            run, needed = functools.partial(config.parse_arguments, kind), []
            for field, given in required(kind).items():
                needed += [f"--{field}", given] if field != setting.path else []
        with pytest.raises(SystemExit) as ended:
            run("", [*needed, setting.option, *texts])
        assert ended.value.code not in (0, None)
        captured = capsys.readouterr()
        said = in_order(captured.out + captured.err + str(ended.value.code))
        assert setting.option in said, (setting.option, value, said)
        assert in_order(shown(value)).strip("'") in said, (setting.option, value, said)


def only(setting: Setting) -> Any:
    """A dataclass with one setting of `Config` alone, at the same place: quick to parse."""
    *above, name = setting.path.split(".")
    field = setting.kind.__dataclass_fields__[name]
    default: Any = {"default": field.default}
    if field.default is dataclasses.MISSING:
        default = {"default_factory": field.default_factory}
    kind = only_field(name, setting.hint, **default)
    for section in reversed(above):
        kind = only_field(section, kind, default_factory=kind)
    return kind


def only_field(name: str, hint: Any, **default: Any) -> Any:
    kind = dataclasses.make_dataclass("Only", [(name, hint, dataclasses.field(**default))])
    kind.__module__ = keyword.__name__  # tyro parses the source for docstrings: this one is short
    return kind


def test_read_from_json_a_bad_value_is_refused_by_origin_and_key():
    for _, setting, value in (case for case in COMMANDS if case[0] == "train"):
        if value is True:
            continue  # which counts as 1 there
        values: Any = value
        for name in reversed(setting.path.split(".")):
            values = {name: values}
        with pytest.raises(ValueError) as refused:
            config.from_dict(config.Config, values, "run.json")
        said = str(refused.value)
        by_key = f"run.json: {setting.path} = {repr(value)[:50]}"
        if isinstance(value, tuple) and value:  # of several, the one that is bad
            by_key = f"run.json: {setting.path}.0 = {value[0]!r}"
        assert said.startswith((by_key, f"run.json: {setting.option} is {value!r}")), said


def test_serving_refuses_a_bad_value_by_its_key():
    for name, setting, value in SERVING:
        if value is True:
            continue
        with pytest.raises(ValueError) as refused:
            if name == "serve args":
                app.build_app({setting.path: value})
            else:
                known = {"checkpoint": "best", "storage": "runs", "follow_interval_s": 30}
                config.from_dict(Serving, known | {setting.path: value}, "user_config")
        said = str(refused.value)
        assert f"{setting.path}" in said and shown(value) in said and "give " in said, said


@pytest.mark.parametrize("given", [["False"], ["true"], ["no"]])
def test_a_boolean_given_a_value_names_the_forms_that_work(given):
    for name, setting in NAMED:
        if setting.hint is not bool or name.startswith("serve "):
            continue
        section, dot, last = setting.option.removeprefix("--").rpartition(".")
        forms = f"--{section}{dot}{last}", f"--{section}{dot}no-{last}"
        for arguments in ([forms[0], *given], [forms[1], *given], [f"{forms[0]}={given[0]}"]):
            with pytest.raises(SystemExit) as ended:
                config.parse_arguments(kinds()[name], "", arguments)
            said = str(ended.value.code)
            assert f"is {given[0]!r}: it takes no value" in said
            assert f"give {forms[0]} for True, or {forms[1]} for False" in said


@pytest.mark.parametrize("name", ["a b", "lr=1e-3+x@y", "x" * 255, "run-20260101-000000", "..."])
def test_run_names_that_work_are_taken(name):
    config.check(config.RunConfig(name=name), "run.")


@pytest.mark.parametrize(
    "name",
    ["lauf-ü", "a/b", "a\\b", "a?b", "a#b", "a%b", "a,b", ".", "..", "a\nb", "", "x" * 256, "名"],
)
def test_run_names_that_a_folder_or_rays_metrics_refuse_are_refused(name):
    with pytest.raises(ValueError, match=r"^--run\.name is .*give a name of at most 255 char"):
        config.check(config.RunConfig(name=name), "run.")


@pytest.mark.parametrize("project", ["a/b", "a:b", "x" * 129])
def test_projects_that_weights_and_biases_refuses_are_refused(project):
    with pytest.raises(ValueError, match=r"^--run\.project is .*at most 128 characters without"):
        config.check(config.RunConfig(project=project), "run.")


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize(
    ("variable", "ask"),
    [
        ("CAPTION_RAY_STORAGE", lambda: config.parse([])),
        ("CAPTION_RAY_STORAGE", lambda: config.parse_arguments(kinds()["caption"], "", PICTURES)),
        ("CAPTION_RAY_STORAGE", lambda: app.build_app({})),
        ("CAPTION_RAY_CHECKPOINT", lambda: app.build_app({})),
        ("CAPTION_RAY_TOKENS_FILE", lambda: app.build_app({})),
        ("CAPTION_RAY_NUM_GPUS", lambda: app.build_app({})),
        ("CAPTION_RAY_NUM_GPUS", cluster.promised_gpus),
        ("CAPTION_RAY_TOKENS", lambda: Tokens(None)),
    ],
)
def test_an_environment_variable_that_is_set_to_nothing_is_refused_by_name(
    variable, ask, value, monkeypatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises((ValueError, SystemExit)) as refused:
        ask()
    assert f"${variable} is {value!r}: it is empty; give it a value, or unset it" in str(
        refused.value
    )


PICTURES = ["--images", "x", "--out", "y"]


@pytest.mark.parametrize("value", ["many", "nan", "inf", "-1"])
def test_what_is_no_number_of_gpus_is_refused_by_the_variables_name(value, monkeypatch):
    monkeypatch.setenv("CAPTION_RAY_NUM_GPUS", value)
    with pytest.raises(ValueError, match=r"^\$CAPTION_RAY_NUM_GPUS is .*: give a number of GPUs"):
        cluster.promised_gpus()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model.decoder.name lstm", "--model.decoder.name is 'lstm': give one of soft, "),
        ("train --data.ingest", "--data.ingest is True: it needs --data.source"),
        (
            "train --data.reading.split val=0.1",
            "--data.reading.split is 'val=0.1': it says how --data.source is read",
        ),
        ("ingest --source x --out y --split val", "--split val: give shares between 0 and 1"),
        ("ingest --source x --out y --format z", "--format z: give one of coco, webdataset"),
        ("train --model.encoder.name vgg", "--model.encoder.name is 'vgg': give 'small', one"),
        ("train --model.encoder.trainable-from x", "--model.encoder.trainable-from is 'x': for sm"),
        (
            "train --model.encoder.weights DEFAULT",
            "--model.encoder.weights is 'DEFAULT': for sm",
        ),
        (
            "train --model.decoder.name transformer --model.decoder.num-heads 7",
            "--model.decoder.hidden-dim is 256: give a multiple of --model.decoder.num-heads, 7",
        ),
        ("train coco-self-critical", "--train.stage is 'self-critical': "),
        ("train --data.features on", "--data.features is 'on', but the encoder trains"),
        ("ingest --features --encoder.weights none", "--encoder.weights is 'none': no run could"),
        ("ingest --features --encoder.name vgg", "--encoder.name is 'vgg': give 'small', one of"),
        ("ingest --images-per-shard 0", "--images-per-shard is 0: give a whole number of at least"),
        ("ingest --splits", "--splits is (): give a name, or several"),
        ("ingest --seed -1", "--seed is -1: give a whole number of at least 0"),
        ("evaluate --limit 0", "--limit is 0: give a whole number of at least 1, or None"),
        ("evaluate --limit -1", "--limit is -1: give a whole number of at least 1, or None"),
    ],
)
def test_what_cannot_work_ends_a_job_before_ray_starts(arguments, message, monkeypatch):
    name, *rest = arguments.split()
    if name != "train":
        for field, given in required(kinds()[name]).items():
            rest += [f"--{field}", given]
    monkeypatch.setattr(sys, "argv", [name, *rest])
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was to be started"))
    with pytest.raises(SystemExit) as ended:
        command.run(job(name).main)
    assert str(ended.value.code).startswith(f"error: {message}")


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_preset_stands_the_checks(preset):
    settings = config.PRESETS[preset]()
    if settings.train.stage == "self-critical":
        train = dataclasses.replace(settings.train, start_from="a run")
        settings = dataclasses.replace(settings, train=train)
    if settings.data.ingest:
        with pytest.raises(ValueError, match="it needs --data.source, the pictures to ingest"):
            trainer.check(settings)
        data = dataclasses.replace(settings.data, source="pictures")
        settings = dataclasses.replace(settings, data=data)
    trainer.check(settings)


def test_a_backbone_that_cannot_be_built_without_memory_is_not_refused_for_it():
    initial.check_encoder(config.EncoderConfig(name="regnet_y_400mf"))
