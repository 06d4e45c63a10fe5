"""Clients in other languages, unmodified, against the endpoint on a real Ray Serve."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import scaled

from caption_ray.captioning.predictor import Predictor

JAVASCRIPT = """
import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";
const [url, file] = process.argv.slice(2);
const client = new InferenceClient();
const data = new Blob([readFileSync(file)]);
console.log(JSON.stringify(await client.imageToText({ data, endpointUrl: url })));
try {
  await client.imageToText({ data: new Blob(["no picture"]), endpointUrl: url });
} catch (error) {
  console.log(JSON.stringify(`${error.message} ${JSON.stringify(error.httpResponse ?? null)}`));
}
"""


def test_huggingface_javascript_client_gets_captions(
    endpoint: Any, save_run: Callable[..., str], picture: Callable[..., bytes], tmp_path: Path
) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    install = ["npm", "install", "--no-audit", "--no-fund", "@huggingface/inference"]
    installed = subprocess.run(
        install, cwd=tmp_path, capture_output=True, text=True, timeout=scaled(120)
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install @huggingface/inference: {installed.stderr[-200:]}")
    uri = save_run(tmp_path / "runs" / "one")
    endpoint.deploy({"checkpoint": uri})
    (tmp_path / "picture.jpg").write_bytes(picture(1))
    (tmp_path / "ask.mjs").write_text(JAVASCRIPT)
    asked = subprocess.run(
        ["node", "ask.mjs", f"{endpoint.url}/caption?format=object", "picture.jpg"],
        cwd=tmp_path, capture_output=True, text=True, timeout=scaled(60),
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    answer, refusal = (json.loads(line) for line in asked.stdout.splitlines())
    predictor = Predictor.from_uri(uri, torch.device("cpu"))
    expected = predictor.predict(predictor.prepare(picture(1))[None])[0][0].text
    assert answer["generated_text"] == expected
    assert "JPEG, PNG" in refusal
