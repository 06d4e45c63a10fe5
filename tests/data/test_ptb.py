from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
import shutil
import unicodedata
import zipfile
from pathlib import Path

import pytest

from caption_ray.captioning.metrics import score
from caption_ray.data import ptb
from caption_ray.data.ptb import tokenize

# What CoreNLP 3.4.1 and pycocoevalcap 1.2 gave for these captions.
EXPECTED = {
    "A man is riding a wave.": "a man is riding a wave",
    "": "",
    " . ": "",
    "Two dogs, one cat; three: birds - four?": "two dogs one cat three birds four",
    "It's the dog's bone and the dogs' bowls.": "it 's the dog 's bone and the dogs bowls",
    "He doesn't, can't and won't; they've, she'd, I'm, we'll":
        "he does n't ca n't and wo n't they 've she 'd i 'm we 'll",
    "It’s a dog’s, don’t": "it 's a dog 's do n't",
    "You cannot; I'm gonna, gotta, wanna, lemme, gimme":
        "you can not i 'm gon na got ta wan na lem me gim me",
    "'Tis more'n rock 'n' roll at 5 o'clock, y'all, ma'am":
        "'t is more 'n rock 'n' roll at 5 o'clock y' all ma'am",
    "the '90s and 1990's, get 'em 'cause": "the '90s and 1990 's get 'em 'cause",
    "O'Reilly's and d'Artagnan": "o'reilly 's and d'artagnan",
    "a t-shirt, black-and-white, a 12-year-old -- and word- -ish":
        "a t-shirt black-and-white a 12-year-old and word ish",
    '"Stop" said “the” sign ‘now’ `x`': "stop said the sign now x",
    "1,000 3.5 .5 10:30am 50-60 12/25/2010 2nd 4x4":
        "1,000 3.5 .5 10:30 am 50-60 12/25/2010 2nd 4x4",
    "5 1/2 cups and ½": "5\xa01/2 cups and 1/2",
    "$5, 5%, £3, €4, 5¢, #1, #tag": "$ 5 5 % # 3 $ 4 5 cents # 1 #tag",
    "and/or, black/white, w/ and w/o": "and/or black/white w / and w/o",
    "wait... what.. ok. . . done …": "wait what ok done",
    "Wow!! What?! Ok!": "wow !! what ?! ok",
    "A man.A dog": "a man.a dog",
    "U.S. flag at 5 p.m. in D.C.": "u.s. flag at 5 p.m. in d.c.",
    "Mr. Smith vs. Dr. Jones on St. Paul Ave. etc.":
        "mr. smith vs. dr. jones on st. paul ave. etc.",
    "The train no. 7 says no.": "the train no. 7 says no",
    "a dog., a cat": "a dog. a cat",
    "plan b. A dog": "plan b a dog",
    "(a) [b] {c} dog(s)": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- dog -lrb- s -rrb-",
    "AT&T &amp; R&B, salt&pepper, a & b": "at&t & r&b salt & pepper a & b",
    "Café piñata, naïve Ångström": "café piñata naïve ångström",
    "pizza 🍕🍕 ♥ ok": "pizza ♥ ok",
    "a smile :) or ;-) :D": "a smile :-rrb- or ;--rrb- :d",
    "me@x.com www.foo.com a_b <b>hi</b>": "me@x.com www.foo.com a_b <b> hi </b>",
    "5'6\" tall, a+b=c, * ~ 72°": "5 6 tall a + b = c * ~ 72 °",
    "tabs\tand\nlines": "tabs and lines",
    "“”a” ``b'' ’’": "``'' a b",
    "a<br/>b <a href='x y'>c</a> a\xadb": "a <br/> b <a\xa0href='x\xa0y'> c </a> ab",
    "IMG_01.jpg, 555-123-4567 ^_^ C++": "img_01 jpg 555-123-4567 ^_^ c++",
}  # fmt: skip


@pytest.mark.parametrize("caption", EXPECTED)
def test_captions_are_cut_as_the_reference_cuts_them(caption: str) -> None:
    assert " ".join(tokenize(caption)) == EXPECTED[caption]


def test_the_words_of_words_are_the_words() -> None:
    for caption in ("a man is riding a wave", "a 12-year-old and a t-shirt"):
        assert " ".join(tokenize(" ".join(tokenize(caption)))) == caption


def test_surrounding_space_and_case_do_not_matter() -> None:
    for caption in ("A dog's T-shirt.", "Don't, U.S."):
        assert tokenize(f"  {caption} \n") == tokenize(caption)
        assert tokenize(caption.upper()) == tokenize(caption)


# Sentences of many languages, and what the original makes of each, in the same order. Editors may
# not touch what looks odd in them: some accents are characters by themselves, some characters are
# invisible. After a change, with Java: python tests/data/test_ptb.py
HERE = Path(__file__).parent
SENTENCES, TOKENS = HERE / "sentences.txt", HERE / "sentences.tokens.txt"


def read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8").removesuffix("\n").split("\n")


def sentences() -> list[tuple[str, str]]:
    """Languages and sentences."""
    return [(language, text) for language, text in (x.split("\t") for x in read_lines(SENTENCES))]


def test_sentences_of_all_scripts_are_cut_as_the_reference_cut_them() -> None:
    given = sentences()
    assert len(given) > 450 and len(dict(given)) > 100
    for (language, text), expected in zip(given, read_lines(TOKENS), strict=True):
        assert " ".join(tokenize(text)) == expected, f"{language}: {text!r}"


def test_vowel_signs_and_accents_stay_in_their_words() -> None:
    assert tokenize("हिंदी में ❤️ किताब।") == ["हिंदी", "में", "❤", "किताब", "।"]
    assert tokenize("น้ำแข็ง שָׁלוֹם كِتَابٌ") == ["น้ำแข็ง", "שָׁלוֹם", "كِتَابٌ"]
    composed, apart = "à la crème", unicodedata.normalize("NFD", "à la crème")
    assert tokenize(composed) == composed.split() != tokenize(apart) == apart.split()


_PIECES = (
    "a Dog cat, lamps , cannot gonna wanna, no. no No, art. St. dog. x. . .. - it's 5 I é b.c "
    "में, ΛΌΓΟΣ"
).split()


def test_the_quick_path_cuts_as_the_rules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    captions = [
        rng.choice(("", " ", ". ", "\n")).join((" ".join(rng.choices(_PIECES, k=5)), end))
        for _ in range(2000)
        for end in ("", ".", " ", ".  ", ",", ". A")
    ]
    quick = [tokenize(caption) for caption in captions]
    nothing = re.compile(r"(?!)")
    monkeypatch.setattr(ptb, "_PLAIN", nothing)
    monkeypatch.setattr(ptb, "_LAST_WORD", nothing)
    for caption, words in zip(captions, quick, strict=True):
        assert words == tokenize(caption), caption


# Against the reference itself


def coco_captions(coco_mini: Path) -> list[str]:
    captions: list[str] = []
    with zipfile.ZipFile(coco_mini / "annotations_trainval2017.zip") as archive:
        for name in archive.namelist():
            if "captions" in name:
                captions += [it["caption"] for it in json.loads(archive.read(name))["annotations"]]
    return captions


def reference(captions: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    numbered = {i: [{"caption": caption}] for i, caption in enumerate(captions)}
    words = PTBTokenizer().tokenize(numbered)
    return [words[i][0] for i in range(len(captions))]


needs_reference = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="the reference tokenizer needs java and pycocoevalcap",
)


def differences(captions: list[str]) -> list[tuple[str, str, str]]:
    """Captions of which the reference makes something else, what it makes, and what we do."""
    # the reference looks into the next line, which is another caption
    expected = reference([line for caption in captions for line in (caption, "~")])[::2]
    found = [" ".join(tokenize(caption)) for caption in captions]
    return [
        (caption, theirs, ours)
        for caption, theirs, ours in zip(captions, expected, found, strict=True)
        if theirs.split(" ") != ours.split(" ")
    ]


@needs_reference
def test_the_table_of_expectations_is_the_references() -> None:
    assert reference(list(EXPECTED)) == list(EXPECTED.values())


@needs_reference
def test_the_words_of_the_sentences_are_the_references() -> None:
    assert reference([text for _, text in sentences()]) == read_lines(TOKENS)
    assert not differences([text for _, text in sentences()])


def random_lines(seed: int, count: int) -> list[str]:
    """Words of characters of a script or two, with marks between, and now and then any others."""
    rng = random.Random(seed)
    blocks = [range(at, at + 0x80) for at in range(0x80, 0x3100, 0x80)]
    blocks += [range(at, at + 0x80) for at in range(0xA000, 0xABFF, 0x80)]
    blocks += [range(0x4E00, 0x4F00), range(0xAC00, 0xAD00), range(0xF900, 0x10000)]
    blocks += [range(0x10000, 0x12000), range(0x1D400, 0x1D800), range(0x1F300, 0x1FA00)]
    latin = [range(0x61, 0x7B), range(0x41, 0x5B), range(0x30, 0x3A), range(0x21, 0x7F)]
    between = [" ", " ", " ", " ", ". ", ", ", "-", "'", "’", ".", "", "\xad", "\u200d", "\ufe0f"]

    def word() -> str:
        common, other = rng.choice(blocks + latin * 4), rng.choice(blocks + latin * 4)
        letters = [rng.choice(rng.choices((common, other), (4, 1))[0]) for _ in range(6)]
        return "".join(map(chr, letters[: rng.randint(1, 6)]))

    lines = ["".join(word() + rng.choice(between) for _ in range(8)) for _ in range(count)]
    # what ends a line there moves the reference to the next caption
    return [re.sub("[\v\f\r\u2028\u2029]", " ", line) for line in lines]


@needs_reference
def test_random_characters_are_cut_as_the_reference_cuts_them() -> None:
    assert not differences(random_lines(0, 2000))


@needs_reference
def test_scores_of_all_languages_are_cocos() -> None:
    """Over the words of the reference, by COCO's own scorers."""
    bleu = importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    cider = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    texts = [text for _, text in sentences()]
    told, wanted = [], []
    for one, next_one in itertools.pairwise(texts):
        told.append(one[: len(one) * 2 // 3] + next_one[len(next_one) * 2 // 3 :])
        wanted.append([one, next_one])
    cut = dict(zip(told + texts, reference(told + texts), strict=True))
    results = {image: [cut[text]] for image, text in enumerate(told)}
    references = {image: [cut[text] for text in both] for image, both in enumerate(wanted)}
    bleus, of_images = bleu.compute_score(references, results, verbose=0)
    theirs = {"BLEU-4": (bleus[3], of_images[3])}
    theirs["ROUGE-L"] = rouge.compute_score(references, results)
    theirs["CIDEr-D"] = cider.compute_score(references, results)
    ours = score(told, wanted)
    for name, (whole, values) in theirs.items():
        assert ours.corpus[name] == pytest.approx(whole, abs=1e-9), name
        for image, value in zip(ours.per_image, values, strict=True):
            assert image[name] == pytest.approx(value, abs=1e-9), name


@needs_reference
def test_real_captions_are_cut_as_the_reference_cuts_them(coco_mini: Path) -> None:
    captions = coco_captions(coco_mini)
    assert len(captions) > 500
    assert not differences(captions)


@needs_reference
def test_real_captions_with_stray_marks_are_cut_so(coco_mini: Path) -> None:
    rng = random.Random(0)
    marks = [*".,;:!?-'\"()/&%$#", "'s", "n't", "...", "--", " - ", "’", "1", "10", "½", " no. "]
    captions = []
    for caption in coco_captions(coco_mini) * 3:
        at = rng.choice([i for i, letter in enumerate(caption) if letter == " "] or [0])
        captions.append(caption[:at] + rng.choice(marks) + caption[at + rng.randrange(2) :])
    assert not differences(captions)


if __name__ == "__main__":
    TOKENS.write_text("\n".join(reference([text for _, text in sentences()])) + "\n", "utf-8")
