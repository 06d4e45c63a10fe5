from __future__ import annotations

import json

import numpy as np
import pytest
from vocabularies import vocabulary_of

from caption_ray.data.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary

CAPTIONS = ["A dog runs.", "a Dog sits", "The cat sits", "a café"]


def test_ids_of_the_special_words_are_fixed() -> None:
    assert (PAD, START, END, UNKNOWN) == (0, 1, 2, 3)
    assert Vocabulary(["a"]).words == ["<pad>", "<start>", "<end>", "<unknown>", "a"]


def test_words_are_ordered_by_count_and_then_by_letters() -> None:
    vocabulary = vocabulary_of(CAPTIONS, min_count=1, max_words=None)
    assert vocabulary.words[4:] == ["a", "dog", "sits", "café", "cat", "runs", "the"]
    assert len(vocabulary) == 11


def test_the_order_of_the_captions_does_not_matter() -> None:
    first = vocabulary_of(CAPTIONS, 1, None)
    assert first.words == vocabulary_of(reversed(CAPTIONS), 1, None).words


def test_rare_words_are_left_out() -> None:
    assert vocabulary_of(CAPTIONS, 2, None).words[4:] == ["a", "dog", "sits"]


def test_only_the_most_frequent_words_are_kept() -> None:
    assert vocabulary_of(CAPTIONS, 1, 2).words[4:] == ["a", "dog"]
    assert len(vocabulary_of(CAPTIONS, 1, 100)) == 11


@pytest.mark.parametrize(("captions", "count"), [([], 1), (["...", "!"], 1), (CAPTIONS, 4)])
def test_an_empty_vocabulary_is_refused(captions: list[str], count: int) -> None:
    with pytest.raises(ValueError, match=f"--data.min-word-count={count} times: lower it"):
        vocabulary_of(captions, count, None)


def test_words_that_look_special_do_not_become_special() -> None:
    vocabulary = vocabulary_of(["<start> a <end> b"], 1, None)
    assert vocabulary.words[4:] == ["a", "b"]
    assert vocabulary.encode("<end> a", 5).tolist() == [START, UNKNOWN, 4, END, PAD]


def test_a_caption_is_framed_and_padded() -> None:
    vocabulary = Vocabulary(["a", "dog"])
    ids = vocabulary.encode("A dog, a unicorn!", 8)
    assert ids.dtype == np.int32
    assert ids.tolist() == [START, 4, 5, 4, UNKNOWN, END, PAD, PAD]
    assert vocabulary.encode("", 3).tolist() == [START, END, PAD]


def test_a_long_caption_is_cut_but_keeps_its_end() -> None:
    vocabulary = Vocabulary(["a", "dog"])
    assert vocabulary.encode("a dog a dog a dog", 5).tolist() == [START, 4, 5, 4, END]
    assert vocabulary.encode("a dog a", 5).tolist() == [START, 4, 5, 4, END]
    assert vocabulary.encode("a dog", 2).tolist() == [START, END]


def test_there_must_be_room_for_start_and_end() -> None:
    with pytest.raises(ValueError, match="length is 1"):
        Vocabulary(["a"]).encode("a", 1)


def test_decoding_stops_at_the_first_end() -> None:
    vocabulary = Vocabulary(["a", "dog"])
    assert vocabulary.decode([START, 4, 5, END, 4, 5, END]) == "a dog"
    assert vocabulary.decode(np.array([4, PAD, 5, UNKNOWN])) == "a dog <unknown>"
    assert vocabulary.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 6, 10_000])
def test_an_unknown_id_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"no word has the id {wrong}: ids go from 0 to 5"):
        Vocabulary(["a", "dog"]).decode([4, wrong])


def test_encoding_and_decoding_gives_the_caption_back() -> None:
    vocabulary = vocabulary_of(CAPTIONS, 1, None)
    for caption in CAPTIONS:
        expected = caption.lower().rstrip(".")
        assert vocabulary.decode(vocabulary.encode(caption, 20)) == expected


def test_words_are_those_of_cocos_tokenizer_which_does_not_compose_accents() -> None:
    vocabulary = vocabulary_of(["caf\u00e9", "cafe\u0301"], 1, None)
    assert sorted(vocabulary.words[4:]) == ["cafe\u0301", "caf\u00e9"]
    assert vocabulary.decode(vocabulary.encode("cafe\u0301", 3).tolist()) == "cafe\u0301"


def test_json_gives_the_vocabulary_back_and_can_be_read() -> None:
    vocabulary = vocabulary_of(CAPTIONS, 1, None)
    text = vocabulary.to_json()
    again = Vocabulary.from_json(text, "vocabulary.json")
    assert again.words == vocabulary.words
    assert again.encode("a café", 5).tolist() == vocabulary.encode("a café", 5).tolist()
    assert '"café"' in text.splitlines()[8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ('{"a": 1}', "a JSON list of words"),
        ("[1, 2]", "a JSON list of words"),
        ('["a", "b", "c", "d", "e"]', "begins with <pad>, <start>"),
        (json.dumps(SPECIAL), "and words follow"),
        (json.dumps([*SPECIAL, "a", "a"]), "'a' is there twice"),
        (json.dumps([*SPECIAL, "a", "<pad>"]), "'<pad>' is there twice"),
    ],
)
def test_what_is_no_vocabulary_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^s3://b/vocabulary.json: .*{message}"):
        Vocabulary.from_json(text, "s3://b/vocabulary.json")
