"""Which words name which objects: COCO's categories, and what people say instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CATEGORIES = tuple(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush".split(", ")
)
"""The categories of COCO's instances."""

SYNONYMS = {
    "person": "man men woman women boy boys girl girls people child children kid kids player "
    "players lady guy baby toddler crowd someone biker cyclist skier surfer snowboarder "
    "skateboarder climber rider runner swimmer".split(),
    "bicycle": ["bike", "bikes"],
    "motorcycle": ["motorbike", "motorbikes"],
    "airplane": ["plane", "planes", "jet"],
    "couch": ["sofa", "sofas"],
    "tv": ["television", "televisions"],
    "cell phone": ["phone", "phones", "cellphone"],
    "dining table": ["table", "tables"],
    "sheep": ["lamb", "lambs"],
    "dog": ["puppy", "puppies"],
    "cat": ["kitten", "kittens"],
    "sports ball": ["ball", "balls"],
    "potted plant": ["plant", "plants"],
    "wine glass": ["glass", "glasses"],
}
"""Other words that people use for COCO's categories."""


class Names:
    """All names of some categories, singular and plural; a name may have several words."""

    def __init__(self, categories: Iterable[str]) -> None:
        self._categories: dict[tuple[str, ...], str] = {}
        for category in categories:
            for name in (category, *SYNONYMS.get(category, ())):
                *before, last = name.split()
                for form in (last, *_plurals(last)):
                    self._categories.setdefault((*before, form), category)
        self._longest = max(map(len, self._categories), default=0)

    def at_the_end(self, words: Sequence[str]) -> str | None:
        """The category whose name the words end with; of several such names the longest wins."""
        for count in range(min(self._longest, len(words)), 0, -1):
            category = self._categories.get(tuple(words[-count:]))
            if category is not None:
                return category
        return None

    def within(self, words: Sequence[str]) -> set[str]:
        """All categories that the words name."""
        found = (self.at_the_end(words[: place + 1]) for place in range(len(words)))
        return {category for category in found if category is not None}


def _plurals(word: str) -> tuple[str, ...]:
    forms = (f"{word}s", f"{word}es")
    return (*forms, f"{word[:-1]}ies") if word.endswith("y") else forms
