"""Vocabularies of a few captions."""

from collections import Counter
from collections.abc import Iterable

from caption_ray.data.ptb import tokenize
from caption_ray.data.vocabulary import Vocabulary


def vocabulary_of(
    captions: Iterable[str], min_count: int = 1, max_words: int | None = None
) -> Vocabulary:
    """The vocabulary of captions; see `Vocabulary.from_counts`."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    return Vocabulary.from_counts(counts, min_count, max_words)
