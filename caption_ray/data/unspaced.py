"""Whether captions are in a language that puts no spaces between words.

COCO's tokenizer (`ptb`) takes what has no space in it for one word: each Chinese, Japanese or Thai
caption would be a word of its own, which no captioner can learn and no metric can compare.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable

from caption_ray.data.tokenizer import PTB, Tokenizer

_RUN = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao; Tibetan; Burmese; Khmer
    "\u3005-\u3007\u3040-\u30ff\uff66-\uff9f"  # kana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"  # Han
)

SAMPLE = 5000
"""Captions that tell which language a data set is in."""

LONGEST_MEAN = 6.0
"""Characters between spaces, on average, in captions whose words are parted by spaces all the same:
1.4 in Chinese, 1.8 in Japanese, 4.4 in Thai; without them 9, 14 and 26. (Counting the characters of
all words instead would not tell Chinese from Finnish and Turkish, which have 8.)"""


def warning(captions: Iterable[str]) -> str | None:
    """What to tell if these captions are mostly in such a script, without spaces between words."""
    words = [caption.split() for caption in captions]
    characters = sum(len(word) for caption in words for word in caption)
    runs = [run for caption in words for word in caption for run in _RUN.findall(word)]
    in_runs, count = sum(map(len, runs)), sum(map(len, words))
    if 2 * in_runs <= characters or not runs:
        return None
    if in_runs / len(runs) < LONGEST_MEAN and count >= 2 * len(words):
        return None
    return (
        f"warning: these captions have {count / len(words):.1f} words of {characters / count:.1f} "
        "characters on average. Their language has no spaces between words, so that the tokenizer "
        "`ptb`, which is COCO's, takes each for one word: use `characters` (--data.tokenizer of a "
        "training, --tokenizer of metrics), or put spaces between words"
    )


def warn(captions: Iterable[str], tokenizer: Tokenizer = PTB) -> None:
    """Tell it on the console if the first captions are so, unless `tokenizer` can cut them."""
    text = warning(itertools.islice(captions, SAMPLE)) if tokenizer == PTB else None
    if text is not None:
        print(text, file=sys.stderr, flush=True)
