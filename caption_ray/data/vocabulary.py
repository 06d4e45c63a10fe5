"""Words <-> ids.

A caption becomes int32 ids of a fixed length L: START, its words, END, then PAD. Words that the
vocabulary lacks become UNKNOWN; a caption longer than L - 2 words is cut, but keeps its END.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np

from caption_ray.config import TokenizerName
from caption_ray.data.tokenizer import PTB, Tokenizer

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


class Vocabulary:
    """The words a captioner knows, and how captions are cut into them. `words[i]` is the word of id
    i; the first four are `SPECIAL`."""

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer = PTB) -> None:
        self.words = [*SPECIAL, *words]
        self.tokenizer = tokenizer
        self._ids = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

    @staticmethod
    def from_counts(
        counts: Mapping[str, int],
        min_count: int,
        max_words: int | None,
        tokenizer: Tokenizer = PTB,
    ) -> Vocabulary:
        """The words that occur `min_count` times or more, at most `max_words` of them.

        Frequent words come first, equally frequent ones in the order of their letters, so that
        the same captions in any order give the same vocabulary. Raises ValueError if there is no
        such word.
        """
        frequent = [
            word for word, count in counts.items() if count >= min_count and word not in SPECIAL
        ]
        if not frequent:
            raise ValueError(
                f"none of the {len(counts)} words of the captions occurs "
                f"--data.min-word-count={min_count} times: lower it, or check the captions"
            )
        ranked = sorted(frequent, key=lambda word: (-counts[word], word))
        return Vocabulary(ranked[:max_words], tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and vars(self) == vars(other)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The ids of a caption: int32 (length,)."""
        if length < 2:
            raise ValueError(f"length is {length}: START and END alone need 2")
        ids = [self._ids.get(word, UNKNOWN) for word in self.tokenizer(caption)[: length - 2]]
        encoded = np.full(length, PAD, np.int32)
        encoded[: len(ids) + 2] = [START, *ids, END]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The caption that ids make: their words up to the first END, without PAD and START.

        Raises ValueError for an id that the vocabulary does not have.
        """
        words = []
        for i in ids:
            if not 0 <= i < len(self.words):
                raise ValueError(f"no word has the id {i}: ids go from 0 to {len(self.words) - 1}")
            if i == END:
                break
            if i not in (PAD, START):
                words.append(self.words[i])
        return self.tokenizer.join(words)

    def to_json(self) -> str:
        """A JSON list of all words, one a line, in the order of their ids; with another tokenizer
        than `ptb`, an object of its name and that list."""
        content: Any = self.words
        if self.tokenizer != PTB:
            content = {"tokenizer": self.tokenizer.name, "words": self.words}
        return json.dumps(content, ensure_ascii=False, indent=0)

    @staticmethod
    def from_json(text: str, origin: str) -> Vocabulary:
        """The inverse of `to_json`; ValueError naming `origin` if `text` is no vocabulary."""
        try:
            words = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{origin}: no vocabulary, since no JSON ({error})") from error
        tokenizer = PTB
        if isinstance(words, dict) and "tokenizer" in words:
            name, words = words.get("tokenizer"), words.get("words")
            if name not in get_args(TokenizerName):
                raise ValueError(
                    f"{origin}: tokenizer is {name!r}, which this version does not know: it knows "
                    f"{', '.join(get_args(TokenizerName))}"
                )
            tokenizer = Tokenizer(cast(TokenizerName, name))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{origin}: a vocabulary is a JSON list of words")
        special, own = words[: len(SPECIAL)], words[len(SPECIAL) :]
        if tuple(special) != SPECIAL or not own:
            raise ValueError(
                f"{origin}: a vocabulary begins with {', '.join(SPECIAL)}, and words follow"
            )
        twice = [word for word, count in Counter(words).items() if count > 1]
        if twice:
            raise ValueError(f"{origin}: {twice[0]!r} is there twice")
        return Vocabulary(own, tokenizer)
