"""The metrics, against COCO's own tools on real captions."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import caption_ray.command
from caption_ray.captioning import metrics
from caption_ray.captioning.metrics import CiderD, MetricsError, score
from caption_ray.config import TokenizerName
from caption_ray.data.ptb import tokenize
from caption_ray.data.tokenizer import PTB, Tokenizer
from caption_ray.evaluation.metrics import main

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
    assert_as_cocos(*leave_one_out)


def test_a_word_with_a_space_inside_counts_as_in_cocos_tools() -> None:
    told = ["a board 5 1/2 feet long", "a cake of 2 3/4 pounds", "two dogs"]
    wanted = [["the board is 5 1/2 feet long", "a long board"], ["a 2 3/4 pounds cake"], ["dogs"]]
    assert any("\xa0" in word for caption in told for word in tokenize(caption))
    assert_as_cocos(told, wanted)


@pytest.mark.parametrize(
    ("name", "cut"), [("characters", lambda text: "".join(text.split())), ("whitespace", str.split)]
)
def test_other_words_are_scored_as_by_cocos_metrics(
    name: TokenizerName, cut: Callable[[str], Iterable[str]]
) -> None:
    told = ["一只狗在草地上奔跑。", "两只 猫 在 树下睡觉", "a 红色 的球", "IPhone 和 狗"]
    wanted = [["一只狗在草地上跑", "狗在草地上。"], ["两只猫 在 睡觉"], ["红色 的球"], ["狗"]]
    assert_as_cocos(told, wanted, Tokenizer(name), cut)


def assert_as_cocos(
    told: Captions,
    wanted: list[Captions],
    tokenizer: Tokenizer = PTB,
    cut: Callable[[str], Iterable[str]] = tokenize,
) -> None:
    """Corpus and images have the figures that pycocoevalcap gives for the words of `cut`."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    ours = score(told, wanted, tokenizer=tokenizer)

    def text(caption: str) -> str:
        return " ".join(cut(caption))

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


@pytest.mark.slow
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


def told(image_id: Any, caption: Any = "a dog") -> dict[str, Any]:
    return {"image_id": image_id, "caption": caption}


def refs(odd: Any) -> dict[str, Any]:
    """References with other images, or with one annotation more."""
    if isinstance(odd, list):
        return {"images": odd, "annotations": []}
    return {"images": [{"id": 1}, {"id": 2}], "annotations": [told(1), odd]}


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
        both = [told(1, "a cat"), told(2, "A dog")]
        for name, content in (("r", references or default), ("t", results or both)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return ["--references", f"{tmp_path}/r.json", "--results", f"{tmp_path}/t.json"]

    return write


def command(arguments: list[str]) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["metrics", *arguments, "--no-java"])
        caption_ray.command.run(main)


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
        (None, {"1": "a"}, 't.json: no COCO results, [{"image_id": 1, "caption": "..."}, ...]'),
        (None, [{"image": 1}], "t.json: results[0] has no 'image_id'"),
        (None, [told(1), told(2, None)], "t.json: results[1]: caption is None, not of type str"),
        (None, [told(1), told(2, ["a"])], "results[1]: caption is ['a'], not of type str"),
        (None, [told(1), told(2, 5)], "results[1]: caption is 5, not of type str"),
        (None, [told(1), told(2, "\ud83d")], "caption is '\\ud83d', which is not Unicode text"),
        (None, [told(1.7)], "results[0]: image_id is 1.7, not of type int"),
        (None, [told(1.0)], "results[0]: image_id is 1.0, not of type int"),
        (None, [told("1")], "results[0]: image_id is '1', not of type int"),
        (None, [told("a.jpg")], "results[0]: image_id is 'a.jpg', not of type int"),
        (None, [told(True)], "results[0]: image_id is True, not of type int"),
        (None, [told(None)], "results[0]: image_id is None, not of type int"),
        (None, [told(math.nan)], "results[0]: image_id is nan, not of type int"),
        (None, [told(math.inf)], "results[0]: image_id is inf, not of type int"),
        (None, [told(2**63)], "image_id is 9223372036854775808, beyond 64 bits"),
        (None, ["a"], "results[0] is 'a', not an object"),
        (None, 5, "no COCO results"),
        ({"images": []}, None, "r.json: not the layout of COCO's annotations: no list 'ann"),
        ([told(1)], None, "no list 'images'; it is a list of 1"),
        (refs([{"id": "1"}]), None, "r.json: images[0]: id is '1', not of type int"),
        (refs([{"id": 1}, {"id": 1}]), None, "r.json: images[1]: id 1 is there twice"),
        (refs(told(2, None)), None, "annotations[1]: caption is None, not of type str"),
        (refs(told(2, "...")), None, "annotations[1]: caption is '...', without a word"),
        (refs({"image_id": 2}), None, "annotations[1] has no 'caption'"),
        (refs(told(7)), None, "annotations[1]: image_id is 7, which is none of the images"),
        (refs(told(False)), None, "annotations[1]: image_id is False, not of type int"),
    ],
)
def test_files_that_do_not_fit_are_named(
    files: Callable[..., list[str]], references: Any, results: Any, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(files(references, results))
    assert str(ended.value).startswith("error: ") and message in str(ended.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"[" * 100_000, "[]".encode("utf-16"), '[{"caption": "é"}]'.encode("latin-1")],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_not_json_is_named(
    files: Callable[..., list[str]], tmp_path: Path, data: bytes
) -> None:
    arguments = files()
    for file in ("t.json", "r.json"):
        (tmp_path / file).write_bytes(data)
        with pytest.raises(SystemExit, match=rf"error: .*{file}: not JSON in UTF-8"):
            command(arguments)


def test_a_byte_order_mark_does_no_harm(files: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = files()
    for file in (tmp_path / "t.json", tmp_path / "r.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    command(arguments)


def test_a_captioner_may_have_nothing_to_say(
    files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command(files(results=[told(1, ""), told(2, "...")]))
    printed = capsys.readouterr()
    assert "2 captions of" in printed.err and "have no word" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["ROUGE-L"] == 0


def test_captions_of_one_word_each_are_warned_of(
    files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command(files())
    assert capsys.readouterr().err == ""
    chinese = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [told(1, "一只狗在草地上奔跑"), told(2, "两只狗")],
    }
    command(files(chinese))
    assert (
        "no spaces between words, so that the tokenizer `ptb`, which is COCO's, takes each for one "
        "word: use `characters` (--data.tokenizer of a training, --tokenizer of metrics)"
        in capsys.readouterr().err
    )
    command([*files(chinese), "--tokenizer", "characters"])
    assert capsys.readouterr().err == ""


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
