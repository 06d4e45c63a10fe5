"""How captions are cut into words, and how words become a caption again.

A vocabulary carries its tokenizer with it, so that training, metrics and serving all cut and join
captions in the same way:

- `ptb`, the default, cuts as COCO's evaluation does (see ptb.py): lower case, no punctuation. Only
  its scores can be compared with published ones.
- `whitespace` cuts at spaces and changes nothing else, for captions that another tool has cut.
- `characters` takes each character for a word, for languages that put no spaces between words. A
  character is what a reader takes for one: a letter with its marks, an emoji with its modifiers
  (an extended grapheme cluster, Unicode's UAX #29). A space is a character as well.

The last two keep capitals and punctuation as they stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import regex

from caption_ray.config import TokenizerName
from caption_ray.data import ptb

SPACE = " "


@dataclass(frozen=True)
class Tokenizer:
    """One of the three ways, by name."""

    name: TokenizerName

    @property
    def separator(self) -> str:
        """What stands between two words of a caption."""
        return "" if self.name == "characters" else SPACE

    def __call__(self, caption: str) -> list[str]:
        """The words that a captioner reads and writes."""
        if self.name == "ptb":
            return ptb.tokenize(caption)
        words = caption.split()
        return words if self.name == "whitespace" else regex.findall(r"\X", SPACE.join(words))

    def scored(self, caption: str) -> list[str]:
        """The words that metrics compare: all but spaces."""
        return [word for word in self(caption) if word != SPACE]

    def join(self, words: Iterable[str]) -> str:
        """The caption that these words make."""
        return self.separator.join(words)


PTB = Tokenizer("ptb")
