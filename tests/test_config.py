import ast
import dataclasses
import inspect
import json
import re
import typing

import pytest

from caption_ray import config
from caption_ray.config import Config, from_dict, parse, to_dict


def test_no_arguments_mean_the_default_preset():
    assert parse([]) == config.PRESETS[config.DEFAULT_PRESET]()


def test_overrides_change_their_field_and_nothing_else():
    parsed = parse(
        "coco --data.shards s3://b/coco --run.name my-run --train.num-workers 8 --train.epochs 30 "
        "--model.encoder.name resnet50 --model.encoder.weights none".split()
    )
    expected = config.coco()
    expected = dataclasses.replace(
        expected,
        data=dataclasses.replace(expected.data, shards="s3://b/coco"),
        run=dataclasses.replace(expected.run, name="my-run"),
        train=dataclasses.replace(expected.train, num_workers=8, epochs=30),
        model=dataclasses.replace(
            expected.model,
            encoder=dataclasses.replace(expected.model.encoder, name="resnet50", weights="none"),
        ),
    )
    assert parsed == expected


def test_overrides_without_a_preset_apply_to_the_default_one():
    parsed = parse(["--train.epochs", "3"])
    assert parsed.train.epochs == 3
    assert parsed.model == config.PRESETS[config.DEFAULT_PRESET]().model


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.epoch", "3"], ["--train.epoch", "--train.epochs"]),
        (["--train.epochs", "many"], ["--train.epochs", "many"]),
        (["--train.schedule", "linear"], ["linear", "cosine", "constant"]),
        (["--train.epochs", "0"], ["--train.epochs is 0", "give a whole number of at least 1"]),
        (["--data.min-crop", "0"], ["--data.min-crop is 0.0", "above 0 and at most 1"]),
        (["--data.shards", "a", "--data.source", "b"], ["--data.source", "--data.shards"]),
        (["--run.name", "a/b"], ["--run.name", "a/b"]),
        (["--run.name", "a,b"], ["--run.name", "a,b"]),
        (["--search.beam-size", "0"], ["--search.beam-size is 0", "give a whole number from 1"]),
        (
            ["--search.min-length", "9", "--search.max-length", "8"],
            ["--search.min-length", "9", "give 0 to"],
        ),
        (["--search.min-length", "-1"], ["--search.min-length", "-1"]),
        (["--search.no-repeat-ngram-size", "-1"], ["--search.no-repeat-ngram-size", "-1"]),
        (
            ["--search.temperature", "1e-40"],
            ["--search.temperature", "1e-40", "give 0, or 1e-06 or more"],
        ),
        (["--search.temperature", "nan"], ["--search.temperature", "nan"]),
        (["--search.top-p", "0"], ["--search.top-p", "0", "1e-06"]),
        (["--train.min-workers", "3"], ["--train.min-workers", "3"]),
        (["--train.checkpoint-seconds", "0"], ["--train.checkpoint-seconds", "above"]),
        (["cocoo"], ["cocoo", "coco"]),
    ],
)
def test_a_bad_setting_ends_at_once_naming_option_value_and_remedy(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    assert exit.value.code not in (0, None)
    captured = capsys.readouterr()
    said = captured.out + captured.err + str(exit.value.code)
    for part in named:
        assert part in said


@pytest.mark.parametrize("preset", config.PRESETS)
def test_json_brings_back_the_same_configuration(preset):
    original = config.PRESETS[preset]()
    assert from_dict(Config, json.loads(json.dumps(to_dict(original))), "test") == original


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epocs": 1}}, r"run.json: train.epocs = 1: .*did you mean epochs"),
        ({"data": {"zzz": 1}}, r"data.zzz.*valid: shards, source"),
        (
            {"train": {"epochs": "x"}},
            r"run.json: train.epochs = 'x': give a whole number of at least 1",
        ),
        (
            {"train": {"batch_size": -1}},
            r"run.json: train.batch_size = -1: give a whole number of at least 1",
        ),
        ({"data": {"shards": ""}}, r"run.json: data.shards = '': it is empty"),
        ({"run": {"project": "\t"}}, r"run.json: --run.project is '.t': it is empty"),
        (
            {"search": {"min_length": 30}},
            r"^run.json: --search.min-length is 30: give 0 to --search.max-length, 20",
        ),
    ],
)
def test_a_saved_file_with_unknown_or_bad_keys_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values, "run.json")


def test_every_field_has_a_docstring():
    modules = [config.settings, config.search]
    for node in [node for module in modules for node in ast.parse(inspect.getsource(module)).body]:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for here, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(here, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(
                        after.value, ast.Constant
                    )
                    assert documented, f"{node.name}.{here.target.id} has no docstring"


def test_overrides_of_the_search_are_its_settings_optional_and_mean_the_same(capsys):
    own, overrides = (
        typing.get_type_hints(kind, include_extras=True)
        for kind in (config.SearchConfig, config.SearchOverrides)
    )
    assert overrides == {name: typing.Optional[hint] for name, hint in own.items()}  # noqa: UP045
    assert set(dataclasses.asdict(config.SearchOverrides()).values()) == {None}
    explained = []
    for kind in (config.SearchConfig, config.SearchOverrides):
        with pytest.raises(SystemExit):
            config.parse_arguments(kind, "", ["--help"])
        said = " ".join(capsys.readouterr().out.replace("│", "").split())
        said = re.sub(r"\{None\}\||\(default: \S+\)", "", said[said.index("--beam-size") :])
        explained.append(said.split())
    assert explained[0] == explained[1] and "n-gram" in explained[0]


def test_type_checkers_are_told_of_the_same_overrides():
    told = next(
        node
        for node in ast.walk(ast.parse(inspect.getsource(config.search)))
        if isinstance(node, ast.ClassDef) and node.name == "_AllOptional"
    )
    fields = {node.target.id: ast.unparse(node.annotation) for node in told.body[1:]}
    plain = typing.get_type_hints(config.SearchOverrides)
    assert fields == {
        name: f"{typing.get_args(kind)[0].__name__} | None" for name, kind in plain.items()
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"beam_size": 7, "top_p": 0.5}, {"beam_size": 7, "top_p": 0.5}),
        ({"temperature": 0.0}, {"temperature": 0.0}),  # not the same as None
        ({"max_length": 3}, {"max_length": 3, "min_length": 3}),
        ({"min_length": 30}, {"max_length": 30, "min_length": 30}),
        ({"min_length": 0}, {"min_length": 0}),
    ],
)
def test_a_search_is_changed_as_asked_and_what_was_not_asked_for_gives_way(asked, expected):
    default = config.SearchConfig(min_length=5, max_length=20, temperature=0.7)
    changed = config.SearchOverrides(**asked).apply(default)
    assert changed == dataclasses.replace(default, **expected)


def test_an_impossible_change_of_the_search_is_refused():
    with pytest.raises(ValueError, match="--search.min-length is 5: .*--search.max-length, 4"):
        config.SearchOverrides(min_length=5, max_length=4).apply(config.SearchConfig())


def test_the_environment_moves_the_default_storage(monkeypatch):
    monkeypatch.setenv(config.STORAGE_VARIABLE, "s3://elsewhere/runs")
    assert parse([]).run.storage == "s3://elsewhere/runs"
    assert parse(["--run.storage", "/here"]).run.storage == "/here"
