"""The three ways to cut captions into words, and that a vocabulary and all that use it keep one."""

from __future__ import annotations

import json
import pickle
from typing import get_args

import pytest

from caption_ray.captioning import metrics
from caption_ray.config import TokenizerName
from caption_ray.data import ptb
from caption_ray.data.tokenizer import PTB, Tokenizer
from caption_ray.data.vocabulary import END, SPECIAL, START, Vocabulary

WHITESPACE, CHARACTERS = Tokenizer("whitespace"), Tokenizer("characters")

CAPTIONS = {
    "Chinese": "两只狗在草地上玩红色的球。",
    "Chinese with a name": "一个人在用 iPhone 拍照",
    "Japanese": "サーフボードに乗って波に乗っている男性。",
    "Thai": "ห้องครัวที่มีเตาและตู้เย็น",
    "Hindi": "एक आदमी सर्फ़बोर्ड पर",
    "Korean jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "Vietnamese, decomposed": "một con mèo",
    "English": "A man's U.S. flag, 5 1/2 feet long!",
    "emoji": "a 👩‍👩‍👧 by the 🇫🇷 flag 👍🏽",
    "case": "Ein Hund und IHRE Katze",
}


@pytest.mark.parametrize("name", get_args(TokenizerName))
@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u3000"])
def test_nothing_has_no_words(name: TokenizerName, empty: str) -> None:
    assert Tokenizer(name)(empty) == []
    assert Tokenizer(name).join([]) == ""


def test_ptb_is_cocos() -> None:
    for caption in CAPTIONS.values():
        assert PTB(caption) == PTB.scored(caption) == ptb.tokenize(caption)


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
@pytest.mark.parametrize("tokenizer", [WHITESPACE, CHARACTERS], ids=lambda one: one.name)
def test_what_was_cut_is_put_together_again(tokenizer: Tokenizer, caption: str) -> None:
    assert tokenizer.join(tokenizer(caption)) == caption
    spread = "\u3000" + caption.replace(" ", " \n") + " "
    assert tokenizer.join(tokenizer(spread)) == caption


def test_whitespace_changes_no_word() -> None:
    assert WHITESPACE("A man's  U.S. flag,\t5 1/2 !") == "A man's U.S. flag, 5 1/2 !".split()
    assert WHITESPACE("两 只 狗 。") == ["两", "只", "狗", "。"]


def test_a_character_is_what_a_reader_takes_for_one() -> None:
    assert CHARACTERS("两只狗。") == ["两", "只", "狗", "。"]
    assert CHARACTERS("เย็น") == ["เ", "ย็", "น"]  # a vowel above belongs to its consonant
    assert CHARACTERS("me\u0300o") == ["m", "e\u0300", "o"]
    assert CHARACTERS("👩‍👩‍👧 🇫🇷👍🏽") == ["👩‍👩‍👧", " ", "🇫🇷", "👍🏽"]
    assert CHARACTERS("用 iPhone") == ["用", " ", *"iPhone"]


def test_metrics_do_not_count_spaces_between_characters() -> None:
    assert CHARACTERS.scored("用 iPhone 拍") == ["用", *"iPhone", "拍"]
    spaced = metrics.score(["用 A 拍照"], [["用A拍照", "照"]], tokenizer=CHARACTERS)
    plain = metrics.score(["用A拍照"], [["用A 拍照", "照"]], tokenizer=CHARACTERS)
    assert spaced.corpus == plain.corpus


@pytest.mark.parametrize("name", get_args(TokenizerName))
def test_a_vocabulary_cuts_and_joins_with_its_own_tokenizer(name: TokenizerName) -> None:
    tokenizer = Tokenizer(name)
    for caption in CAPTIONS.values():
        words = list(dict.fromkeys(tokenizer(caption)))
        vocabulary = Vocabulary(words, tokenizer)
        ids = vocabulary.encode(caption, len(tokenizer(caption)) + 2)
        assert ids[0] == START and ids[-1] == END and all(ids[1:-1] >= len(SPECIAL))
        assert vocabulary.decode(ids.tolist()) == tokenizer.join(tokenizer(caption))


@pytest.mark.parametrize("name", get_args(TokenizerName))
def test_a_vocabulary_is_stored_with_its_tokenizer(name: TokenizerName) -> None:
    vocabulary = Vocabulary(["a", "狗", " "], Tokenizer(name))
    again = Vocabulary.from_json(vocabulary.to_json(), "v.json")
    assert again == vocabulary == pickle.loads(pickle.dumps(vocabulary))
    assert again.tokenizer.name == name
    assert again != Vocabulary(["a", "狗"], Tokenizer(name))
    assert again != Vocabulary(["a", "狗", " "], PTB if name != "ptb" else CHARACTERS)


def test_a_vocabulary_of_earlier_versions_is_ptbs() -> None:
    text = json.dumps([*SPECIAL, "a", "dog"])
    assert Vocabulary.from_json(text, "v.json").tokenizer == PTB


@pytest.mark.parametrize("name", ["bpe", None, "", 1])
def test_a_tokenizer_of_a_later_version_is_refused_by_name(name: object) -> None:
    text = json.dumps({"tokenizer": name, "words": [*SPECIAL, "a"]})
    with pytest.raises(ValueError, match=r"v\.json: tokenizer is .*knows ptb, whitespace, char"):
        Vocabulary.from_json(text, "v.json")


@pytest.mark.parametrize("words", [None, "a", {}, [1]])
def test_a_tokenizer_without_words_is_no_vocabulary(words: object) -> None:
    with pytest.raises(ValueError, match=r"v\.json: a vocabulary is a JSON list of words"):
        Vocabulary.from_json(json.dumps({"tokenizer": "characters", "words": words}), "v.json")
