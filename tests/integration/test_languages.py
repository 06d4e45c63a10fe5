"""The whole road in a language without spaces between words: each character is a word."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import requests
from tiny_runs import tiny_config

from caption_ray.captioning import metrics, run_folder
from caption_ray.data.dataset import open_shards
from caption_ray.data.ingest import ingest
from caption_ray.data.tokenizer import PTB, Tokenizer
from caption_ray.evaluation import scorecard
from caption_ray.training import trainer

pytestmark = pytest.mark.usefixtures("local_ray")

CHARACTERS = Tokenizer("characters")
FIRST_HAN = 0x4E00


@pytest.fixture(scope="module")
def chinese(scenes, tmp_path_factory):
    """The drawn scenes, with a Chinese character for each word and no spaces; as shards."""
    folder, out = tmp_path_factory.mktemp("scenes"), str(tmp_path_factory.mktemp("shards"))
    known: dict[str, str] = {}
    for split in ("train", "val"):
        (folder / split).symlink_to(scenes / split)
        (annotations,) = Path(scenes, "annotations").glob(f"captions_{split}*.json")
        document = json.loads(annotations.read_text())
        for annotation in document["annotations"]:
            words = re.findall(r"\w+", annotation["caption"].lower())
            annotation["caption"] = "".join(
                known.setdefault(word, chr(FIRST_HAN + len(known))) for word in words
            )
        (folder / annotations.name).write_text(json.dumps(document))
    ingest(str(folder), out, image_size=None, images_per_shard=15, seed=0,
           splits=("train", "val"), progress=False)  # fmt: skip
    return out, set(known.values())


def with_tokenizer(settings, tokenizer, **data):
    data = dataclasses.replace(settings.data, tokenizer=tokenizer, min_word_count=1, **data)
    return dataclasses.replace(settings, data=data)


def test_characters_are_words_from_the_captions_to_the_stream_of_the_endpoint(
    chinese, scenes, endpoint, tmp_path, capsys
):
    shards, characters = chinese
    settings = with_tokenizer(tiny_config(shards, tmp_path, "run", epochs=1), "characters")
    finished = trainer.train(settings)
    loaded = run_folder.load(finished.run)
    assert loaded.vocabulary.tokenizer == CHARACTERS
    assert set(loaded.vocabulary.words[4:]) == characters
    assert "are longer than" not in capsys.readouterr().out

    with pytest.raises(ValueError, match="differs in data.tokenizer, which was characters"):
        trainer.train(with_tokenizer(settings, "whitespace"))
    other = dataclasses.replace(
        settings,
        run=dataclasses.replace(settings.run, name="other"),
        train=dataclasses.replace(settings.train, start_from=finished.run),
    )
    with pytest.raises(ValueError, match=r"--data\.tokenizer is 'ptb': .* those of characters"):
        trainer.train(with_tokenizer(other, "ptb"))

    card = scorecard.make(loaded, open_shards(shards), "val", java=False, progress=False)
    lines = (Path(card.out) / scorecard.PER_IMAGE_FILE).read_text().splitlines()
    told = {line["image_id"]: line["caption"] for line in map(json.loads, lines)}
    assert not any(" " in caption for caption in told.values())
    wanted = {
        row["image_id"]: row["captions"]
        for unit in open_shards(shards).splits["val"]
        for row in unit.read(["image_id", "captions"])
    }
    for tokenizer, same in ((CHARACTERS, True), (PTB, False)):
        scores = metrics.score(
            list(told.values()), [wanted[image] for image in told], tokenizer=tokenizer
        )
        assert (scores.corpus["BLEU-1"] == pytest.approx(card.figures["BLEU-1"])) is same

    endpoint.deploy({"checkpoint": finished.run})
    assert requests.get(f"{endpoint.url}/info").json()["model"]["tokenizer"] == "characters"
    picture = next(Path(scenes, "val").iterdir()).read_bytes()
    answer = requests.post(f"{endpoint.url}/caption?return_attention=true", data=picture).json()[0]
    assert answer["generated_text"] == "".join(answer["words"])


def test_captions_that_are_cut_are_told(chinese, tmp_path, capsys):
    settings = with_tokenizer(
        tiny_config(chinese[0], tmp_path, "run"), "characters", caption_length=5
    )
    dataset = trainer.open_data(settings)
    trainer._vocabulary(settings.data, dataset)
    printed = capsys.readouterr().out
    captions = list(dataset.training_captions())
    cut = sum(len(caption) > 3 for caption in captions)
    assert f"warning: {cut} of {len(captions)} training captions are longer than" in printed
    assert "--data.caption-length 5" in printed
