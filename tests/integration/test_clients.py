"""Clients that people use, unmodified, against the endpoint on a real Ray Serve.

Each program in clients/ asks for the caption of a picture in all ways that its library has, and for
that of bytes which are no picture; it prints a line of JSON for each answer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from patience import scaled

from caption_ray.captioning.predictor import Predictor

CLIENTS = Path(__file__).parent / "clients"

TOKEN = "a-token-of-enough-length"


class Served(NamedTuple):
    url: str
    picture: Path
    caption: str


@pytest.fixture(scope="module")
def served(
    endpoint: Any,
    save_run: Callable[..., str],
    picture: Callable[..., bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """An endpoint that asks for a token, a picture, and the caption that it must get."""
    folder = tmp_path_factory.mktemp("served")
    uri = save_run(folder / "runs" / "one")
    (folder / "tokens").write_text(TOKEN)
    (folder / "picture.jpg").write_bytes(picture(1))
    endpoint.deploy({"checkpoint": uri, "tokens_file": str(folder / "tokens")})
    predictor = Predictor.from_uri(uri, torch.device("cpu"))
    caption = predictor.predict(predictor.prepare(picture(1))[None])[0][0].text
    return Served(endpoint.url, folder / "picture.jpg", caption)


def run_or_skip(command: list[str], folder: Path, what: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=scaled(240))
    if done.returncode:
        pytest.skip(f"{what} cannot be installed: {done.stderr[-200:]}")


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the clients in JavaScript import, as npm has them today."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    names = sorted(
        name
        for client in CLIENTS.glob("*.mjs")
        for name in client.read_text().splitlines()[0].removeprefix("// npm: ").split()
    )
    run_or_skip(["npm", "install", "--no-audit", "--no-fund", *names], folder, ", ".join(names))
    return folder


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with LangChain and LiteLLM, which want many other packages."""
    folder = tmp_path_factory.mktemp("venv")
    run_or_skip([sys.executable, "-m", "venv", "."], folder, "an environment")
    packages = ["langchain-openai", "litellm"]
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", *packages]
    run_or_skip(pip, folder, ", ".join(packages))
    return folder


def check(command: list[str], served: Served, **options: Any) -> None:
    asked = subprocess.run(
        [*command, served.url, str(served.picture), TOKEN],
        capture_output=True, text=True, timeout=scaled(120), **options,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("{")]
    *answers, refusal = lines
    assert len(answers) >= 2
    assert answers == [{"caption": served.caption}] * len(answers)
    assert "the picture cannot be read" in refusal["refused"]
    assert "JPEG, PNG" in refusal["refused"] or "damaged" in refusal["refused"]


@pytest.mark.parametrize("client", ["huggingface", "langchain", "openai", "vercel_ai"])
def test_a_client_in_javascript_gets_captions(npm: Path, served: Served, client: str) -> None:
    shutil.copy(CLIENTS / f"{client}.mjs", npm)  # packages are looked for beside it
    check(["node", f"{client}.mjs"], served, cwd=npm)


@pytest.mark.parametrize("client", ["huggingface_client", "openai_client"])
def test_a_client_in_python_gets_captions(served: Served, client: str) -> None:
    check([sys.executable, str(CLIENTS / f"{client}.py")], served)


@pytest.mark.parametrize("client", ["langchain_client", "litellm_client"])
def test_a_client_in_an_environment_of_its_own_gets_captions(
    venv: Path, served: Served, client: str
) -> None:
    # LiteLLM would look for its list of prices in the network first
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    check([str(venv / "bin" / "python"), str(CLIENTS / f"{client}.py")], served, env=environment)


@pytest.mark.parametrize("protocol", ["--http1.0", "--http1.1", "--http2"])
@pytest.mark.parametrize("way", ["--data-binary", "--form"])
def test_curl_gets_a_caption(served: Served, protocol: str, way: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = f"image=@{served.picture}" if way == "--form" else f"@{served.picture}"
    asked = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail-with-body", protocol,
         "--header", f"Authorization: Bearer {TOKEN}", way, body, f"{served.url}/caption"],
        capture_output=True, text=True, timeout=scaled(60),
    )  # fmt: skip
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert json.loads(asked.stdout)[0]["generated_text"] == served.caption
