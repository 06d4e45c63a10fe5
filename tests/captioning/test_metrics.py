"""The metrics, against COCO's own tools on real captions."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caption_ray.captioning import metrics
from caption_ray.captioning.metrics import CiderD, MetricsError, score
from caption_ray.data.tokenizer import tokenize

Captions = list[str]


@pytest.fixture(scope="module")
def leave_one_out(coco_mini: Path) -> tuple[Captions, list[Captions]]:
    """Each human caption of coco-mini as the hypothesis, the image's others as references."""
    by_image: dict[int, Captions] = {}
    with zipfile.ZipFile(coco_mini / "annotations_trainval2017.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".json") and "captions" in name:
                for annotation in json.loads(archive.read(name))["annotations"]:
                    by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
    told, wanted = [], []
    for captions in by_image.values():
        for number, caption in enumerate(captions):
            told.append(caption)
            wanted.append(captions[:number] + captions[number + 1 :])
    assert len(told) > 700
    return told, wanted


def test_all_figures_equal_cocos_on_real_captions(
    leave_one_out: tuple[Captions, list[Captions]],
) -> None:
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    told, wanted = leave_one_out
    ours = score(told, wanted)

    def text(caption: str) -> str:
        return " ".join(tokenize(caption))

    results = {image: [text(caption)] for image, caption in enumerate(told)}
    references = {image: [text(c) for c in captions] for image, captions in enumerate(wanted)}
    bleus, of_images = bleu.Bleu(4).compute_score(references, results, verbose=0)
    theirs = {f"BLEU-{n + 1}": (bleus[n], of_images[n]) for n in range(4)}
    theirs["ROUGE-L"] = rouge.Rouge().compute_score(references, results)
    theirs["CIDEr-D"] = cider.Cider().compute_score(references, results)
    assert set(theirs) == set(ours.corpus)
    for name, (whole, values) in theirs.items():
        assert ours.corpus[name] == pytest.approx(whole, abs=1e-9), name
        for image, value in zip(ours.per_image, values, strict=True):
            assert image[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor_of_a_caption_among_its_references_is_perfect() -> None:
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    captions = ["a cat sits on the mat", "two dogs run across a field"]
    found = score(captions, [[caption, "something else"] for caption in captions], java=True)
    assert found.corpus["METEOR"] == pytest.approx(1.0)
    assert [image["METEOR"] for image in found.per_image] == pytest.approx([1.0, 1.0])
    worse = score(["a dog lies", "a cat"], [[caption] for caption in captions], java=True)
    assert worse.corpus["METEOR"] < 0.5
    assert "SPICE" in found.corpus or "SPICE" in found.skipped


def test_what_java_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = score(["a cat"], [["a cat"]], java=True)
    assert set(found.skipped) == {"METEOR", "SPICE"}
    assert all("install a Java runtime" in reason for reason in found.skipped.values())


def test_a_perfect_caption_scores_highest_and_an_alien_one_nothing() -> None:
    wanted = [["a red bus on the road"], ["two cats sleep"], ["a man rides a wave today"]]
    perfect = score([captions[0] for captions in wanted], wanted)
    assert perfect.corpus["BLEU-1"] == pytest.approx(1) and perfect.corpus["ROUGE-L"] == 1
    assert perfect.per_image[2]["CIDEr-D"] == pytest.approx(10)
    alien = score(["zebra"] * 3, wanted)
    assert all(value < 1e-6 for value in alien.corpus.values())


def test_a_repeated_word_counts_no_more_often_than_people_said_it() -> None:
    """The example of the paper on BLEU: seven times "the", of which two count."""
    found = score(["the the the the the the the"], [["the cat is on the mat"]])
    assert found.corpus["BLEU-1"] == pytest.approx(2 / 7)


def test_cider_of_words_in_all_images_is_nothing() -> None:
    scorer = CiderD([[["a", "cat"]], [["a", "dog"]]])
    assert scorer(["a"], [["a", "cat"]]) == 0
    # one unigram in two is rare, the one bigram too; no longer ones: (1 + 1) / 4 of 10
    assert scorer(["a", "cat"], [["a", "cat"]]) == pytest.approx(5)


def test_cider_takes_off_for_length_as_the_paper_says() -> None:
    scorer = CiderD([[["cat", "x", "y"]], [["dog"]]])
    same, longer = (scorer(["cat", *rest], [["cat"]]) for rest in ([], ["q"] * 6))
    # "cat" of seven words: the cosine falls by the norm, the penalty by exp(-36 / 72)
    norm = math.sqrt(1 + 36)
    assert longer == pytest.approx(same / norm * math.exp(-(6**2) / (2 * 6**2)), rel=1e-9)


@pytest.mark.parametrize(
    ("told", "wanted"), [([], []), (["a"], [[]]), (["a", "b"], [["a"]])], ids=str
)
def test_nothing_to_compare_is_an_error(told: Captions, wanted: list[Captions]) -> None:
    with pytest.raises(MetricsError, match="at least one reference"):
        score(told, wanted)


# The command ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of the command for two images."""

    def write(references: Any = None, results: Any = None) -> list[str]:
        default = {
            "images": [{"id": 1}, {"id": 2}],
            "annotations": [
                {"image_id": 1, "caption": "A cat on a mat."},
                {"image_id": 1, "caption": "The cat sits."},
                {"image_id": 2, "caption": "A dog."},
            ],
        }
        told = [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "A dog"}]
        for name, content in (("r", references or default), ("t", results or told)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return ["--references", f"{tmp_path}/r.json", "--results", f"{tmp_path}/t.json"]

    return write


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "caption_ray.evaluation.metrics", *arguments, "--no-java"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_a_table_and_one_json_line(files: Callable[..., list[str]]) -> None:
    done = run(files())
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    values = json.loads(last)
    assert set(values) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"}
    expected = score(["a cat", "A dog"], [["A cat on a mat.", "The cat sits."], ["A dog."]])
    assert values == pytest.approx(expected.corpus)
    for name, value in values.items():
        assert any(line.split()[:2] == [name, f"{value:.4f}"] for line in table)


@pytest.mark.parametrize(
    ("references", "results", "message"),
    [
        (None, [{"image_id": 1, "caption": "a"}], "1 images have no caption in the results: 2"),
        (None, [{"image_id": i, "caption": "a"} for i in (1, 2, 7)], "to the references: 7"),
        (None, [{"image_id": 1, "caption": "a"}] * 2, "image 1 has two captions"),
        (None, [{"image": 1}], "no COCO results"),
        ({"images": []}, None, "no COCO captions"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(
    files: Callable[..., list[str]], references: Any, results: Any, message: str
) -> None:
    done = run(files(references, results))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_missing_file_is_named(files: Callable[..., list[str]], tmp_path: Path) -> None:
    done = run([*files()[:2], "--results", str(tmp_path / "none.json")])
    assert done.returncode == 1 and "none.json" in done.stderr


def test_scoring_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, caption_ray.captioning.metrics as m; m.score(['a'], [['a']]); "
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_ngrams_are_all_runs_of_one_to_four_words() -> None:
    assert metrics.ngrams("a b a b a".split()) == {
        ("a",): 3, ("b",): 2, ("a", "b"): 2, ("b", "a"): 2, ("a", "b", "a"): 2, ("b", "a", "b"): 1,
        ("a", "b", "a", "b"): 1, ("b", "a", "b", "a"): 1,
    }  # fmt: skip
