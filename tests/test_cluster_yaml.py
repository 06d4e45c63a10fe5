"""cluster.yaml, checked without AWS: by Ray's own validation, and for what its comments promise."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.util import prepare_config, validate_config

from caption_ray.serving.app import TOKENS_FILE_VARIABLE
from caption_ray.serving.auth import Tokens

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "caption_ray"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file as `ray up` reads it, with Ray's defaults filled in."""
    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands")
            for command in value]  # fmt: skip


def machines(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind["node_config"] for name, kind in config["available_node_types"].items()}


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    kinds = config["available_node_types"]
    return {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


def test_every_node_type_states_its_resources(config: dict[str, Any]) -> None:
    for name, kind in config["available_node_types"].items():
        assert kind["resources"], name
        has_gpu = kind["node_config"]["InstanceType"].startswith(("g5", "g6"))
        assert ("GPU" in kind["resources"]) == has_gpu, name


def test_head_takes_no_work(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_are_spot_machines_that_scale_from_none_to_some(config: dict[str, Any]) -> None:
    kinds = workers(config)
    assert any("GPU" in kind["resources"] for kind in kinds.values())
    assert any("GPU" not in kind["resources"] for kind in kinds.values())
    for name, kind in kinds.items():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
        assert kind["max_workers"] > kind["min_workers"], name
        if "GPU" in kind["resources"]:
            assert kind["min_workers"] == 0, "an idle GPU costs money"


def test_released_ray_that_our_package_allows(config: dict[str, Any]) -> None:
    text = "\n".join(commands(config))
    assert "nightly" not in text and ".whl" not in text and "wheels" not in text
    installed = re.findall(r"ray\[([\w,]+)\]==([\d.]+)", text)
    assert {version for _, version in installed} == {"2.60.0"}
    assert all({"default", "train", "serve", "data"} <= set(extras.split(","))
               for extras, _ in installed)  # fmt: skip
    pyproject = (ROOT / "pyproject.toml").read_text()
    bounds = re.search(r'"ray\[[\w,]+\]>=([\d.]+),<([\d.]+)"', pyproject)
    assert bounds, "pyproject.toml no longer names the versions of Ray"
    lowest, beyond = (tuple(map(int, bound.split("."))) for bound in bounds.groups())
    assert lowest <= (2, 60, 0) < beyond


def test_no_old_image(config: dict[str, Any]) -> None:
    for name, machine in machines(config).items():
        assert machine["ImageId"].startswith(("ami-", "resolve:ssm:/aws/service/")), name
        assert machine["ImageId"] not in aws.DEFAULT_AMI.values(), name


def test_only_ssh_is_open_to_the_world(config: dict[str, Any]) -> None:
    extended = config["provider"]["security_group"].get("IpPermissions", [])
    assert all("SecurityGroupIds" not in machine for machine in machines(config).values())
    rules = aws._create_default_inbound_rules({"sg-cluster"}, extended)
    public = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in public] == [(22, 22)]


def test_dashboard_listens_on_loopback_only(config: dict[str, Any]) -> None:
    starts = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert len(starts) == 1
    options = dict(
        word.partition("=")[::2] for word in shlex.split(starts[0]) if word.startswith("--")
    )
    assert options["--dashboard-host"] == "127.0.0.1"


def test_nodes_reach_s3_by_their_role(config: dict[str, Any]) -> None:
    profiles = {name: machine["IamInstanceProfile"]["Name"]
                for name, machine in machines(config).items()}  # fmt: skip
    head = profiles.pop(config["head_node_type"])
    assert set(profiles.values()) == {"caption-ray-worker"} and head == "caption-ray-head"
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_secret|AWS_SECRET|WANDB_API_KEY=(?!\.\.\.)", text)


def test_token_and_secrets_reach_every_node(config: dict[str, Any]) -> None:
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["~/caption_ray/secrets.env"] == "~/.caption_ray/secrets.env"
    assert mounts["~/caption_ray/tokens"] == "~/.caption_ray/tokens"
    in_checkout = [local for local in mounts.values() if not local.startswith("~")]
    missing = [local for local in in_checkout if not (ROOT / local).exists()]
    assert not missing, f"ray up would fail: {missing} are not in the checkout"
    assert PACKAGE in in_checkout and "pyproject.toml" in in_checkout


def test_every_shell_of_a_node_has_the_environment(config: dict[str, Any], tmp_path: Path) -> None:
    """Really runs the set-up commands that need no network; then a shell as Ray opens it."""
    (tmp_path / "caption_ray").mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    (tmp_path / "caption_ray/secrets.env").write_text("WANDB_API_KEY=k e y\n".replace(" ", ""))
    (tmp_path / "caption_ray/tokens").write_text("a-token-that-is-long-enough\n")
    (tmp_path / ".bashrc").write_text("")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def run(command: str) -> str:
        shell = ["bash", "-c", f"source ~/.bashrc; ({command})"]
        return subprocess.run(
            shell, env=environment, check=True, capture_output=True, text=True
        ).stdout

    offline = [command for command in config["setup_commands"] if "uv" not in command]
    assert len(offline) == 3
    for _ in range(2):  # `ray up` runs them again when they change
        for command in offline:
            run(command)
    values = dict(line.split("=", 1) for line in run("env").splitlines() if "=" in line)
    assert values["RAY_AUTH_MODE"] == "token"
    assert values["WANDB_API_KEY"] == "key"
    assert values["CAPTION_RAY_STORAGE"] == "s3://YOUR-BUCKET/runs"
    assert values["CAPTION_RAY_NUM_GPUS"] == "1"
    tokens = Tokens(values[TOKENS_FILE_VARIABLE])
    assert tokens.required and tokens.accept("Bearer a-token-that-is-long-enough")
    assert values["AWS_DEFAULT_REGION"] == config["provider"]["region"]
    assert int(values["RAY_JOB_STOP_WAIT_TIME_S"]) > 3, "no better than Ray's default"
    assert values["PATH"].startswith(f"{tmp_path}/caption_ray/venv/bin:")
    assert (tmp_path / ".bashrc").read_text().count("environment") == 1
    for secret in (".ray/auth_token", "caption_ray/tokens", "caption_ray/secrets.env"):
        assert (tmp_path / secret).stat().st_mode & 0o077 == 0


def test_the_bucket_is_the_only_placeholder() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    settings = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    assert re.findall(r"YOUR-\w+|<\w+>|CHANGE\w*|TODO|xxx", settings) == ["YOUR-BUCKET"]
