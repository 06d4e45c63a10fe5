"""How good captions are, as COCO's evaluation measures it: BLEU, ROUGE-L, CIDEr-D, METEOR, SPICE.

The first three, and the tokenizer before them, are plain Python and give what pycocoevalcap gives.
METEOR and SPICE are Java programs that pycocoevalcap brings (`pip install caption-ray[metrics]`).
Captions that are in files are scored by `python -m caption_ray.evaluation.metrics`.

Throughout, a caption is a list of words, and an image has one hypothesis and several references.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from caption_ray.data.tokenizer import PTB, Tokenizer

Words = Sequence[str]
Ngram = tuple[str, ...]

MAX_N = 4
CIDER_SIGMA = 6.0
"""Width of CIDEr-D's penalty on a difference in length, in words."""
ROUGE_BETA = 1.2
"""How much more recall counts than precision in ROUGE-L."""
JAVA_METRICS = ("METEOR", "SPICE")


class MetricsError(ValueError):
    """Captions that cannot be scored, or a metric whose programs are missing."""


@dataclass(frozen=True)
class Scores:
    """Metrics by name."""

    corpus: dict[str, float]
    per_image: list[dict[str, float]]
    """In the order of the hypotheses. BLEU is not the mean of these."""
    skipped: dict[str, str]
    """Metrics that were not computed, and why."""


def score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    java: bool = False,
    tokenizer: Tokenizer = PTB,
) -> Scores:
    """All metrics of one caption for each image, against what people wrote of it.

    METEOR and SPICE are computed if `java` and everything they need is there. Only the scores of
    the tokenizer `ptb` are those of COCO's evaluation. Raises MetricsError if there is nothing to
    compare.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise MetricsError(
            f"{len(hypotheses)} captions for {len(references)} images, of which "
            f"{sum(not r for r in references)} have no reference: give one caption for each image, "
            "and at least one reference"
        )
    told = [tokenizer.scored(caption) for caption in hypotheses]
    wanted = [[tokenizer.scored(caption) for caption in captions] for captions in references]
    corpus: dict[str, float] = {}
    per_image: list[dict[str, float]] = [{} for _ in told]
    # COCO's BLEU and CIDEr-D part words at every kind of space, also at the one that the tokenizer
    # leaves inside of "5 1/2" (U+00A0); its ROUGE-L does not
    told_apart = [_apart(words) for words in told]
    wanted_apart = [[_apart(words) for words in captions] for captions in wanted]
    of_corpus, of_images = bleu(told_apart, wanted_apart)
    for n in range(MAX_N):
        corpus[f"BLEU-{n + 1}"] = of_corpus[n]
        for image, values in zip(per_image, of_images, strict=True):
            image[f"BLEU-{n + 1}"] = values[n]
    cider_d = CiderD(wanted_apart)
    for name, values in (
        ("ROUGE-L", [rouge_l(h, r) for h, r in zip(told, wanted, strict=True)]),
        ("CIDEr-D", [cider_d(h, r) for h, r in zip(told_apart, wanted_apart, strict=True)]),
    ):
        _add(corpus, per_image, name, sum(values) / len(values), values)
    skipped = {} if java else {name: "not asked for" for name in JAVA_METRICS}
    for name in JAVA_METRICS if java else ():
        try:
            _add(corpus, per_image, name, *_by_java(name, told, wanted))
        except MetricsError as error:
            skipped[name] = str(error)
    return Scores(corpus, per_image, skipped)


def _apart(words: Words) -> Words:
    return " ".join(words).split()


def _add(
    corpus: dict[str, float],
    per_image: list[dict[str, float]],
    name: str,
    whole: float,
    values: list[float],
) -> None:
    corpus[name] = whole
    for image, value in zip(per_image, values, strict=True):
        image[name] = value


# BLEU -----------------------------------------------------------------------------------------


def bleu(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to -4 (Papineni et al., 2002) of the corpus, and of each image.

    The reference length is that of the closest reference, the shorter of two. As in COCO's
    evaluation, counts get a tiny number added, so that a caption without a match scores almost, not
    exactly, zero.
    """
    per_image = []
    totals = [0.0] * MAX_N, [0.0] * MAX_N
    total_length = total_reference = 0
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        length = len(hypothesis)
        closest = min((abs(len(caption) - length), len(caption)) for caption in captions)[1]
        allowed: Counter[Ngram] = Counter()
        for caption in captions:
            allowed |= ngrams(caption)
        matches, possible = [0] * MAX_N, [max(0, length - n) for n in range(MAX_N)]
        for ngram, count in ngrams(hypothesis).items():
            matches[len(ngram) - 1] += min(count, allowed[ngram])
        for n in range(MAX_N):
            totals[0][n] += matches[n]
            totals[1][n] += possible[n]
        total_length += length
        total_reference += closest
        per_image.append(_bleu(matches, possible, length, closest))
    return _bleu(*totals, total_length, total_reference), per_image


def _bleu(
    matches: Sequence[float], possible: Sequence[float], length: int, reference: int
) -> list[float]:
    ratio = (length + 1e-15) / (reference + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= (matches[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def ngrams(words: Words) -> Counter[Ngram]:
    """How often each sequence of one to four words occurs."""
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, MAX_N + 1)
        for start in range(len(words) - n + 1)
    )


# ROUGE-L --------------------------------------------------------------------------------------


def rouge_l(hypothesis: Words, references: Sequence[Words]) -> float:
    """ROUGE-L (Lin, 2004): F-measure of the longest common subsequence, from the best precision
    and the best recall that any reference gives."""
    common = [_longest_common_subsequence(caption, hypothesis) for caption in references]
    precision = max(common) / max(1, len(hypothesis))
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(one: Words, other: Words) -> int:
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, candidate in enumerate(other):
            row.append(before[place] + 1 if word == candidate else max(before[place + 1], row[-1]))
        before = row
    return before[-1]


# CIDEr-D --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vector:
    """A caption as CIDEr-D compares it."""

    weights: tuple[dict[Ngram, float], ...]
    """For each n, the tf-idf weights of its n-grams."""
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D (Vedantam et al., 1411.5726): tf-idf weighted n-gram similarity to the references.

    Document frequencies are those of all references it was made with: an n-gram counts once for
    each image of which anybody used it.
    """

    def __init__(self, references: Iterable[Sequence[Words]] = ()) -> None:
        self.frequency: Counter[Ngram] = Counter()
        self.images = 0
        for captions in references:
            self.images += 1
            self.frequency.update({ngram for caption in captions for ngram in ngrams(caption)})

    def add(self, other: CiderD) -> None:
        """Count the references of `other` as well."""
        self.frequency.update(other.frequency)
        self.images += other.images

    def forget_rare(self) -> None:
        """Drop what one image has: its weight is that of what no image has, and it is most of the
        memory."""
        self.frequency = Counter({ngram: n for ngram, n in self.frequency.items() if n > 1})

    def __call__(self, hypothesis: Words, references: Sequence[Words]) -> float:
        """The score of one caption, 0 to 10."""
        return self.compare(self.vector(hypothesis), [self.vector(r) for r in references])

    def vector(self, words: Words) -> _Vector:
        """What `compare` wants: worth keeping of references that are used again."""
        weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(MAX_N))
        squares = [0.0] * MAX_N
        log_images = math.log(self.images) if self.images else 0.0
        for ngram, count in ngrams(words).items():
            idf = log_images - math.log(max(1, self.frequency[ngram]))
            weight = count * idf
            weights[len(ngram) - 1][ngram] = weight
            squares[len(ngram) - 1] += weight * weight
        # The reference implementation counts pairs of words where it means words.
        return _Vector(weights, tuple(map(math.sqrt, squares)), max(0, len(words) - 1))

    def compare(self, hypothesis: _Vector, references: Sequence[_Vector]) -> float:
        total = 0.0
        for reference in references:
            penalty = math.exp(
                -((hypothesis.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2)
            )
            for n in range(MAX_N):
                norms = hypothesis.norms[n] * reference.norms[n]
                if norms:
                    theirs = reference.weights[n]
                    common = sum(
                        min(weight, theirs[ngram]) * theirs[ngram]
                        for ngram, weight in hypothesis.weights[n].items()
                        if ngram in theirs
                    )
                    total += penalty * common / norms
        return 10.0 * total / MAX_N / len(references)


# METEOR and SPICE -----------------------------------------------------------------------------


def _by_java(
    name: str, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, list[float]]:
    """The score of the corpus and of each image by a metric that is a Java program.

    Raises MetricsError if it cannot run.
    """
    if shutil.which("java") is None:
        raise MetricsError("java is not on the PATH: install a Java runtime")
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.spice.spice import Spice
    except ImportError as error:
        raise MetricsError(f"{error}: pip install caption-ray[metrics]") from error
    told = {image: [" ".join(words)] for image, words in enumerate(hypotheses)}
    wanted = {
        image: [" ".join(words) for words in captions] for image, captions in enumerate(references)
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # they report what they download
            if name == "METEOR":
                whole, values = Meteor().compute_score(wanted, told)
            else:
                whole, details = Spice().compute_score(wanted, told)
                values = [detail["All"]["f"] for detail in details]
    except Exception as error:  # of programs that fail in many ways: no memory, no download
        raise MetricsError(f"{name} cannot run: {error!r}") from error
    return float(whole), [float(value) for value in values]
