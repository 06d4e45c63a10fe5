"""serve_config.yaml, checked with Ray's schema and our arguments: Ray ignores unknown settings."""

from __future__ import annotations

import copy
import typing
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from caption_ray.serving.app import Arguments
from caption_ray.serving.ingress import Ingress
from caption_ray.serving.replica import DEPLOYMENT, Serving

FILE = Path(__file__).resolve().parents[1] / "serve_config.yaml"
TYPED = {"autoscaling_config": AutoscalingConfig, "args": Arguments, "user_config": Serving}
"""Settings that Ray's schema declares as a plain dict."""


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def unknown_keys(value: Any, schema: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of the keys of `value` that `schema` does not have."""
    for key, item in value.items():
        field = schema.model_fields.get(key)
        if field is None:
            yield f"{path}{key}"
            continue
        models = [TYPED[key]] if key in TYPED else list(models_in(field.annotation))
        for entry in item if isinstance(item, list) else [item]:
            if isinstance(entry, dict):
                assert models, f"{path}{key}: no schema is known; add it to TYPED"
                yield from unknown_keys(entry, models[0], f"{path}{key}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def test_every_key_is_known(config: dict[str, Any]) -> None:
    assert list(unknown_keys(config, ServeDeploySchema)) == []


def test_ray_warns_of_no_setting(config: dict[str, Any]) -> None:
    """It announces errors of later versions so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for deployment in config["applications"][0]["deployments"]:
            AutoscalingConfig(**deployment["autoscaling_config"])


@pytest.mark.parametrize(
    "path",
    [
        [],
        ["http_options"],
        ["applications", 0],
        ["applications", 0, "args"],
        ["applications", 0, "deployments", 0],
        ["applications", 0, "deployments", 0, "autoscaling_config"],
    ],
    ids=str,
)
def test_a_misspelt_key_is_noticed_at_every_level(config: dict[str, Any], path: list[Any]) -> None:
    misspelt = copy.deepcopy(config)
    place = misspelt
    for step in path:
        place = place[step]
    place["max_replica"] = 1
    found = list(unknown_keys(misspelt, ServeDeploySchema))
    assert len(found) == 1 and found[0].endswith("max_replica")


def test_values_are_valid(config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(config)
    for application in schema.applications:
        Arguments.model_validate(application.args)
        for deployment in application.deployments:
            assert isinstance(deployment.autoscaling_config, dict | AutoscalingConfig)
            if isinstance(deployment.autoscaling_config, dict):
                AutoscalingConfig.model_validate(deployment.autoscaling_config)


def test_it_configures_the_deployments_that_the_app_has(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), builder))
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {DEPLOYMENT, Ingress.__name__}


def test_one_file_serves_laptops_and_clusters(config: dict[str, Any]) -> None:
    """It fixes neither a checkpoint nor the number of GPUs: `build_app` finds them."""
    (application,) = config["applications"]
    assert not {"checkpoint", "storage", "num_gpus"} & set(application["args"])
    assert not any("ray_actor_options" in deployment for deployment in application["deployments"])


def test_a_full_batch_is_what_scales_captioners(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    targets = {deployment["name"]: deployment["autoscaling_config"]["target_ongoing_requests"]
               for deployment in application["deployments"]}  # fmt: skip
    default = Arguments.model_fields["max_batch_size"].default
    assert targets["Captioner"] == application["args"].get("max_batch_size", default)


def test_only_this_machine_can_connect(config: dict[str, Any]) -> None:
    assert config["http_options"]["host"] == "127.0.0.1"
