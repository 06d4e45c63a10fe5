"""From word probabilities to captions: greedy search, beam search and sampling.

All of them drive a `StepFn` and know nothing of the decoder behind it; all images and all their
sequences advance together.

Shapes: B images, K sequences per image, R sequences returned per image, T steps, N regions,
V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from caption_ray.config import SMALLEST, SearchConfig
from caption_ray.model.backtrack import Hypotheses, SearchStep, backtrack, common_beginning, decided
from caption_ray.model.captioner import Captioner
from caption_ray.model.decoder import END, PAD, START, State, StepFn, narrowed_step
from caption_ray.model.ensemble import Ensemble

WORTH_NARROWING = 0.75
"""Finished images leave the batch once at most this share of it goes on: leaving costs a copy."""

BLOCK_WORDS = 100
"""Words in each of the vocabulary's blocks that `_largest` compares."""

OnStep = Callable[[Tensor, Tensor], None]
"""Called after each step with int64 tokens (B, T) and (B,): how many of them, from the first, are
certain to begin every caption that is returned for the image or, with beams, the best one."""


def beam_search(
    step: StepFn,
    state: State,
    *,
    max_length: int,
    length_penalty: float,
    num_return: int,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    on_step: OnStep | None = None,
) -> Hypotheses:
    """The captions of highest log-probability / length ** length_penalty that K beams find.

    `state` is the initial state of K beams per image. At each step the K best continuations of an
    image's beams are kept; those that end, and all at max_length, leave the beams and compete with
    the captions that ended before. The search of an image stops when none of its beams can still
    win, so that early stopping never changes the result. One beam is greedy search. `_allowed`
    explains `min_length` and `no_repeat_ngram_size`.

    Raises ValueError unless 1 <= num_return <= K.
    """
    beams = _Beams(
        step, state, max_length, length_penalty, num_return, min_length, no_repeat_ngram_size
    )
    return _run(beams, max_length, on_step)


def greedy(
    step: StepFn,
    state: State,
    *,
    max_length: int,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    on_step: OnStep | None = None,
) -> Hypotheses:
    """The likeliest word at each step; `state` is the initial state of one sequence per image."""

    search = _Independent(step, state, _likeliest(min_length, no_repeat_ngram_size))
    return _run(search, max_length, on_step)


def _likeliest(min_length: int, no_repeat_ngram_size: int) -> Choose:
    def choose(logits: Tensor, said: Tensor, _: Tensor) -> Tensor:
        return _allowed(logits, said, min_length, no_repeat_ngram_size).argmax(dim=-1)

    return choose


def sample(
    step: StepFn,
    state: State,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_length: int = 0,
    no_repeat_ngram_size: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
) -> Hypotheses:
    """K random captions of each image; `state` is the initial state of K sequences per image.

    Words are drawn from softmax(logits / temperature), restricted to the `top_k` likeliest words
    and to the fewest words with a total probability of `top_p` (Holtzman et al., 1904.09751).
    `log_probs` are those of the decoder, before any of that. `generator` is one on the device of
    `state`, or one on the CPU for each image: then an image's captions do not depend on the others
    in the batch.

    Raises ValueError for a temperature, top_k or top_p out of bounds.
    """
    is_possible = SMALLEST <= temperature < math.inf and SMALLEST <= top_p <= 1
    if not is_possible or (top_k is not None and top_k < 1):
        raise ValueError(
            f"cannot sample with temperature {temperature}, top_k {top_k}, top_p {top_p}: give a "
            f"temperature of at least {SMALLEST}, a top_k of at least 1 or None, and a top_p from "
            f"{SMALLEST} to 1"
        )

    def draw(logits: Tensor, said: Tensor, images: Tensor) -> Tensor:
        allowed = _allowed(logits, said, min_length, no_repeat_ngram_size)
        logits = allowed / temperature  # (B, K, V)
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if top_p < 1:
            ordered, words = logits.softmax(dim=-1).sort(dim=-1, descending=True)
            enough = ordered.cumsum(dim=-1) - ordered >= top_p  # even without this word
            logits = logits.masked_fill(enough.gather(-1, words.argsort(dim=-1)), -torch.inf)
        # The word at which the cumulative distribution passes a uniform number in [0, 1). As the
        # distribution rises there, the word's probability is not zero.
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        cumulative = cumulative / cumulative[..., -1:]
        own = generator
        if own is not None and not isinstance(own, torch.Generator):
            own = [own[i] for i in images.tolist()]
        uniform = _uniform(logits.shape[:2], own, logits.device)  # (B, K)
        return torch.searchsorted(cumulative, uniform.unsqueeze(-1), right=True).squeeze(-1)

    return _run(_Independent(step, state, draw), max_length, on_step)


def _uniform(
    shape: torch.Size,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Random numbers in [0, 1), float32 (B, K)."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=device)
    rows = [torch.rand(shape[1], generator=own) for own in generator]
    return torch.stack(rows).to(device)


@torch.inference_mode()
def generate(
    captioner: Captioner | Ensemble,
    images: Tensor,
    search: SearchConfig,
    num_return: int,
    seeds: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Hypotheses:
    """The `num_return` best captions that `search` finds for images, uint8 (B, 3, S, S).

    With a temperature, that many captions are sampled; an image's captions depend on its seed
    (default 0), but not on the rest of the batch.

    Raises ValueError if more captions are asked for than there are beams, and for a captioner in
    training mode, whose dropout would spoil them.
    """
    if captioner.training:
        raise ValueError("call captioner.eval() before generating captions")
    if search.temperature == 0:
        return _run(begin(captioner, images, search, num_return), search.max_length, on_step)
    step, state = captioner.begin(images, num_return)
    return sample(
        step,
        state,
        max_length=search.max_length,
        temperature=search.temperature,
        top_k=search.top_k,
        top_p=search.top_p,
        min_length=search.min_length,
        no_repeat_ngram_size=search.no_repeat_ngram_size,
        generator=[torch.Generator().manual_seed(s) for s in seeds or [0] * len(images)],
        on_step=on_step,
    )


def begin(
    captioner: Captioner | Ensemble, images: Tensor, search: SearchConfig, num_return: int
) -> Progress:
    """The search that `generate` runs without a temperature, before its first step."""
    step, state = captioner.begin(images, search.beam_size)
    limits = search.min_length, search.no_repeat_ngram_size
    if search.beam_size == 1 and num_return == 1:
        return _Independent(step, state, _likeliest(*limits))
    return _Beams(step, state, search.max_length, search.length_penalty, num_return, *limits)


class Progress(ABC):
    """A running search, in which all images and all of their sequences advance together."""

    def __init__(self, step: StepFn, state: State) -> None:
        self._step, self._state = step, state
        self._batch, k = state[0].shape[:2]
        device = state[0].device
        self.left = torch.arange(self._batch, device=device)
        """Indices of the images that are still searched, int64 (b,)."""
        self.said = torch.full((self._batch, k, 1), START, device=device)
        """The words so far, int64 (B, K, T), START included."""
        self.over = torch.zeros(self._batch, dtype=torch.bool, device=device)
        """Images whose result no further step can change, bool (B,)."""

    @abstractmethod
    def advance(self) -> None:
        """One step. It does not depend on tensors' values, so CUDA graphs can capture it."""

    @abstractmethod
    def decided(self) -> tuple[Tensor, Tensor]:
        """What an OnStep is called with."""

    @abstractmethod
    def found(self) -> Hypotheses:
        """The best captions so far, which are final for the images that are `over`."""

    def leave_out(self) -> None:
        """Drop the images that are `over` from further steps, if they are all, or enough of the
        batch (`WORTH_NARROWING`) to be worth a copy of the others' memory."""
        over = self.over[self.left]
        going = len(over) - int(over.sum())
        if going == 0:
            self.left = self.left[:0]
        elif going <= WORTH_NARROWING * len(over):
            kept = (~over).nonzero().squeeze(1)
            narrowed = narrowed_step(self._step, kept)
            if narrowed is not None:
                self._step, self.left = narrowed, self.left[kept]
                self._state = tuple(part[kept] for part in self._state)

    def _of_left(self, values: Tensor) -> Tensor:
        """The values (b, ...) of the images `left`, of values (B, ...)."""
        return values if len(self.left) == self._batch else values[self.left]

    def _placed(self, values: Tensor, rest: float) -> Tensor:
        """Values (b, ...) of the images `left` at their places among all, `rest` elsewhere."""
        if len(self.left) == self._batch:
            return values
        whole = values.new_full((self._batch, *values.shape[1:]), rest)
        whole[self.left] = values
        return whole


def _run(search: Progress, max_length: int, on_step: OnStep | None) -> Hypotheses:
    for _ in range(max_length):
        search.advance()
        if on_step is not None:
            on_step(*search.decided())
        search.leave_out()
        if not len(search.left):
            break
    return search.found()


class _Beams(Progress):
    """See `beam_search`."""

    def __init__(
        self,
        step: StepFn,
        state: State,
        max_length: int,
        length_penalty: float,
        num_return: int,
        min_length: int,
        no_repeat_ngram_size: int,
    ) -> None:
        batch, beams = state[0].shape[:2]
        if not 1 <= num_return <= beams:
            raise ValueError(
                f"--search.beam-size is {beams}: it finds 1 to {beams} captions per image, and "
                f"{num_return} were asked for"
            )
        super().__init__(step, state)
        self._max_length, self._length_penalty = max_length, length_penalty
        self._num_return = num_return
        self._limits = min_length, no_repeat_ngram_size
        self._image = self.left.unsqueeze(1)  # (B, 1)
        # Log-probabilities of the beams; -inf once they end. All beams start alike, so a single one
        # takes the first step.
        self._beams = beams
        self._state = tuple(part[:, :1] for part in state)
        self._live = torch.zeros((batch, 1), device=self.left.device)
        # scores of ended captions
        self._best = torch.full((batch, num_return), -torch.inf, device=self.left.device)
        self._can_win = torch.ones((batch, beams), dtype=torch.bool, device=self.left.device)
        self._trace: list[SearchStep] = []

    def advance(self) -> None:
        live = self._of_left(self._live)
        said = self._of_left(self.said)[:, : live.shape[1]]
        logits, state, attention = self._step(said[..., -1], self._state)
        logits, total = _mask_special(logits)
        allowed = _allowed(logits, said, *self._limits)
        log_probs, parent, tokens = _best_continuations(live, allowed, total, self._beams)
        self._state = tuple(tensor[self._image[: len(self.left)], parent] for tensor in state)
        log_probs = self._placed(log_probs, -torch.inf)
        parent, tokens = self._placed(parent, 0), self._placed(tokens, PAD)
        attention = self._placed(attention, 0)
        self.said = torch.cat([self.said[self._image, parent], tokens.unsqueeze(-1)], dim=-1)

        length, last = len(self._trace) + 1, self._max_length
        ended = tokens == END if length < last else torch.ones_like(tokens, dtype=torch.bool)
        scores = (log_probs / length**self._length_penalty).masked_fill(~ended, -torch.inf)
        self._best = torch.cat([self._best, scores], dim=1).topk(self._num_return).values
        self._live = log_probs.masked_fill(ended, -torch.inf)
        self._trace.append(SearchStep(tokens, parent, attention, log_probs, scores))
        # Most that a beam can score: log-probabilities only fall; the last length divides by most.
        bound = self._live / last**self._length_penalty  # (B, K)
        self._can_win = bound > self._best[:, :1]
        self.over = self._best[:, -1] >= bound.amax(dim=1)

    def decided(self) -> tuple[Tensor, Tensor]:
        return decided(self._trace, self._can_win)

    def found(self) -> Hypotheses:
        return backtrack(self._trace, self._num_return)


Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Chooses the next words (b, K) from logits (b, K, V), the words so far, (b, K, T), and the images'
indices in the batch, (b,)."""


class _Independent(Progress):
    """Greedy search and sampling: K sequences per image, independent of each other."""

    def __init__(self, step: StepFn, state: State, choose: Choose) -> None:
        super().__init__(step, state)
        self._choose = choose
        self._ended = torch.zeros_like(self.said[..., 0], dtype=torch.bool)  # (B, K)
        self._total = torch.zeros(self._ended.shape, device=self.left.device)
        self._attentions: list[Tensor] = []

    def advance(self) -> None:
        said = self._of_left(self.said)
        logits, self._state, attention = self._step(said[..., -1], self._state)
        logits, normalizer = _mask_special(logits)
        tokens = self._choose(logits, said, self.left)
        gained = (logits.gather(-1, tokens.unsqueeze(-1)) - normalizer).squeeze(-1)
        tokens, gained = self._placed(tokens, PAD), self._placed(gained, 0)
        tokens = tokens.masked_fill(self._ended, PAD)
        self._total = self._total + gained.masked_fill(self._ended, 0.0)
        self.said = torch.cat([self.said, tokens.unsqueeze(-1)], dim=-1)
        attention = self._placed(attention, 0)
        self._attentions.append(attention.masked_fill(self._ended.unsqueeze(-1), 0.0))
        self._ended = self._ended | (tokens == END)
        self.over = self._ended.all(dim=1)

    def decided(self) -> tuple[Tensor, Tensor]:
        return common_beginning(self.said[..., 1:])

    def found(self) -> Hypotheses:
        total, order = self._total.sort(dim=1, descending=True)
        image = torch.arange(len(order), device=order.device).unsqueeze(1)
        found = self.said[..., 1:][image, order]  # (B, K, T)
        attention = torch.stack(self._attentions, dim=2)[image, order]  # (B, K, T, N)
        return Hypotheses(found, total, (found != PAD).sum(dim=-1), attention)


def _mask_special(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in float32, with -inf for PAD and START, which are never generated; and their
    logsumexp (..., 1) before that. A logit minus this is a log-probability.

    Computing that for the few chosen words only avoids log-probabilities of the whole vocabulary.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    logits[..., PAD] = logits[..., START] = -torch.inf
    return logits, total


def _best_continuations(
    live: Tensor, logits: Tensor, total: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image's beams with log-probabilities `live` (b, k), the `count` best continuations:
    their log-probabilities, the beams they continue and their words, all (b, count)."""
    # `count` words of each beam suffice, and a top-k among these is faster than among all words
    values, tokens = _largest(logits, min(count, logits.shape[-1]))  # (b, k, count)
    log_probs, tokens = (live.unsqueeze(-1) + (values - total)).flatten(1), tokens.flatten(1)
    missing = count - log_probs.shape[1]
    if missing > 0:  # one beam, and fewer words than beams
        log_probs = F.pad(log_probs, (0, missing), value=-torch.inf)
        tokens = F.pad(tokens, (0, missing), value=PAD)
    log_probs, index = log_probs.topk(count)
    parent = (index // values.shape[-1]).clamp(max=live.shape[1] - 1)
    return log_probs, parent, tokens.gather(1, index)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk(count)` of logits (b, k, V), on CPUs in half the time: the largest are in the `count`
    blocks of words with the largest maxima, or in the incomplete last block."""
    images, beams, num_words = logits.shape
    blocks = num_words // BLOCK_WORDS
    if blocks <= count or logits.device.type != "cpu":
        return logits.topk(count)
    words = torch.arange(num_words, device=logits.device)
    words, rest = words.tensor_split([blocks * BLOCK_WORDS])
    maxima = logits[..., : len(words)].reshape(images, beams, blocks, BLOCK_WORDS).amax(dim=-1)
    likely = words.view(blocks, BLOCK_WORDS)[maxima.topk(count).indices].flatten(-2)
    likely = torch.cat([likely, rest.expand(images, beams, -1)], dim=-1)
    values, places = logits.gather(-1, likely).topk(count)
    return values, likely.gather(-1, places)


def _allowed(logits: Tensor, said: Tensor, min_length: int, no_repeat_ngram_size: int) -> Tensor:
    """The logits (B, K, V) of the words that may follow `said`, the words so far, int64 (B, K, T)
    with START; -inf for the others.

    A caption may not end before it has `min_length` words, nor repeat an n-gram of
    `no_repeat_ngram_size` words (0: no limit; Paulus et al., 1705.04304, section 2.5). If that
    leaves no word at all, it may end nevertheless.
    """
    size, length = no_repeat_ngram_size, said.shape[-1]
    if min_length == 0 and size == 0:
        return logits
    allowed = logits.clone()
    if length - 1 < min_length:
        allowed[..., END] = -torch.inf
    if 0 < size <= length:
        ngrams = said.unfold(-1, size, 1)  # (B, K, T - size + 1, size)
        newest = said[..., length - size + 1 :].unsqueeze(-2)  # (B, K, 1, size - 1)
        again = (ngrams[..., :-1] == newest).all(dim=-1)
        # PAD is never generated anyway
        allowed.scatter_(-1, ngrams[..., -1].masked_fill(~again, PAD), -torch.inf)
    none_left = allowed.isneginf().all(dim=-1)
    allowed[..., END] = torch.where(none_left, logits[..., END], allowed[..., END])
    return allowed
