"""How captions are searched for: the settings, and what a command or request overrides of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caption_ray.config.bounds import (
    Count,
    Length,
    LengthOrZero,
    PositiveOrZero,
    Section,
    Temperature,
    TopP,
    check,
    require,
)


@dataclass(frozen=True)
class SearchConfig(Section):
    """From word probabilities to a caption."""

    beam_size: Length = 3
    """Beams per picture; 1 is greedy search."""

    max_length: Length = 20
    """Largest number of words in a caption."""

    min_length: LengthOrZero = 0
    """Smallest number of words in a caption."""

    no_repeat_ngram_size: LengthOrZero = 0
    """Never repeat an n-gram of this length within a caption; 0 turns this off, 3 blocks repeated
    trigrams."""

    length_penalty: PositiveOrZero = 0.7
    """Rank beams by log-probability / length ** length_penalty; 0 ranks by log-probability alone.
    """

    temperature: Temperature = 0.0
    """Above 0, draw words from softmax(logits / temperature) instead of searching for the likeliest
    caption."""

    top_k: Count | None = None
    """Draw only among this many of the likeliest words; None draws among all."""

    top_p: TopP = 1.0
    """Draw only among the fewest words whose probabilities add up to this (nucleus sampling)."""


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _AllOptional(Section):
        """What is made below, for type checkers, which cannot run it: names and types alone."""

        beam_size: int | None = None
        max_length: int | None = None
        min_length: int | None = None
        no_repeat_ngram_size: int | None = None
        length_penalty: float | None = None
        temperature: float | None = None
        top_k: int | None = None
        top_p: float | None = None

else:

    class _AllOptional(SearchConfig):
        """The settings of a search with their bounds and meaning, optional, and None by default."""

    for _field in dataclasses.fields(SearchConfig):
        _AllOptional.__annotations__[_field.name] = f"{_field.type} | None"
        setattr(_AllOptional, _field.name, None)
    dataclass(frozen=True)(_AllOptional)


@dataclass(frozen=True)
class SearchOverrides(_AllOptional):
    """Another way to search than the checkpoint's own; None leaves a setting to the checkpoint."""

    def apply(self, default: SearchConfig) -> SearchConfig:
        """`default`, changed as asked for. Of two lengths that contradict each other, the one that
        was not asked for gives way.

        Raises ValueError as `validate_search` does.
        """
        names = [field.name for field in dataclasses.fields(SearchConfig)]
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.min_length is None and self.max_length is not None:
            asked["min_length"] = min(default.min_length, self.max_length)
        if self.max_length is None and self.min_length is not None:
            asked["max_length"] = max(default.max_length, self.min_length)
        search = dataclasses.replace(default, **asked)
        validate_search(search)
        return search


def validate_search(search: SearchConfig) -> None:
    """Raise ValueError naming the option, its value and the remedy where a search cannot work."""
    check(search, "search.")
    check_lengths(search)


def check_lengths(search: SearchConfig) -> None:
    """Raise ValueError where the lengths contradict each other."""
    require(
        search.min_length <= search.max_length,
        "search.min-length",
        search.min_length,
        f"give 0 to --search.max-length, {search.max_length}",
    )
