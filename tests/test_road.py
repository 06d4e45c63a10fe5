"""The whole road on one local Ray: pictures -> shards -> two workers -> checkpoint -> resume ->
captions -> endpoint."""

import json
from pathlib import Path

import pytest
import requests
from tiny_runs import latest_of, tiny_config

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.evaluation import evaluate
from caption_ray.training import trainer


@pytest.mark.usefixtures("local_ray")
def test_from_pictures_to_the_answer_of_the_endpoint(shards, scenes, endpoint, tmp_path):
    settings = {"num_workers": 2, "batch_size": 10}
    first = trainer.train(tiny_config(shards, tmp_path, "road", epochs=1, **settings))
    assert checkpoint.read_about(latest_of(first)).state.step == 2  # 40 pictures, 2 x 10 a step
    second = trainer.train(tiny_config(shards, tmp_path, "road", epochs=2, **settings))
    state = checkpoint.read_about(latest_of(second)).state
    assert (state.step, state.epoch, state.pictures) == (4, 2, 80), "resumed, nothing seen twice"
    assert [p["step"] for p in second.history if "val/loss" in p] == [2, 4]

    loaded, out = run_folder.load(second.run), tmp_path / "captions.jsonl"
    picture = next(Path(scenes, "val").iterdir())
    assert evaluate.caption_files(loaded, [str(picture)], str(out), progress=False) == 0
    caption = json.loads(out.read_text())["caption"]

    endpoint.deploy({"checkpoint": second.run})
    answer = requests.post(f"{endpoint.url}/caption", data=picture.read_bytes(), timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Checkpoint"] == loaded.uri.rsplit("/", 1)[1]
    assert answer.json()[0]["generated_text"] == caption
