"""Search, compared to exhaustive enumeration on toy language models with random tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caption_ray.config import DecoderConfig, ModelConfig, SearchConfig, shapes
from caption_ray.model.captioner import build_captioner
from caption_ray.model.decoder import END, PAD, START, State, StepFn, StepOutput
from caption_ray.model.search import (
    Hypotheses,
    _largest,
    beam_search,
    begin,
    generate,
    greedy,
    sample,
)

V = 6  # PAD, START, END and three words
WORDS = (3, 4, 5)


class Toy(NamedTuple):
    """A language model for each image: the last two words determine the next word's logits."""

    tables: Tensor  # (B, V, V, V)

    def step(self, tokens: Tensor, state: State) -> StepOutput:
        """Attention is one-hot in the last word, which identifies the beam that it belongs to."""
        image = torch.arange(len(self.tables)).unsqueeze(1)
        logits = self.tables[image, state[0], tokens]
        return StepOutput(logits, (tokens,), torch.eye(V)[tokens])

    def start(self, k: int) -> State:
        return (torch.full((len(self.tables), k), START),)

    def captions(self, image: int, max_length: int) -> Iterator[tuple[list[int], float]]:
        """All captions of an image with their log-probabilities."""

        def extend(words: list[int], total: float) -> Iterator[tuple[list[int], float]]:
            if words and (words[-1] == END or len(words) == max_length):
                yield words, total
                return
            before = [START, START, *words]
            log_probs = self.tables[image, before[-2], before[-1]].log_softmax(dim=-1)
            for word in (END, *WORDS):
                yield from extend([*words, word], total + log_probs[word].item())

        return extend([], 0.0)


def toy(batch: int = 3, seed: int = 0, scale: float = 1.5) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    return Toy(scale * torch.randn(batch, V, V, V, generator=generator))


def best(model: Toy, image: int, max_length: int, penalty: float) -> list[tuple[list[int], float]]:
    captions = model.captions(image, max_length)
    return sorted(captions, key=lambda c: c[1] / len(c[0]) ** penalty, reverse=True)


def words(hypotheses: Hypotheses, image: int, rank: int) -> list[int]:
    tokens: list[int] = hypotheses.tokens[image, rank].tolist()
    length = int(hypotheses.lengths[image, rank])
    assert set(tokens[length:]) <= {PAD}
    return tokens[:length]


def assert_same(one: Hypotheses, other: Hypotheses) -> None:
    """Assert that both are equal, except for padding."""
    for image in range(len(one.tokens)):
        for rank in range(one.tokens.shape[1]):
            assert words(one, image, rank) == words(other, image, rank)
    torch.testing.assert_close(one.log_probs, other.log_probs)
    steps = min(one.tokens.shape[2], other.tokens.shape[2])
    torch.testing.assert_close(one.attention[:, :, :steps], other.attention[:, :, :steps])


# Beam search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_search_is_exhaustive(penalty: float, seed: int) -> None:
    model, max_length = toy(seed=seed), 4  # 3 ** 4 + (1 + 3 + 9 + 27) = 121 captions
    found = beam_search(
        model.step, model.start(121), max_length=max_length, length_penalty=penalty, num_return=121
    )
    for image in range(3):
        expected = best(model, image, max_length, penalty)
        assert [words(found, image, r) for r in range(121)] == [caption for caption, _ in expected]
        log_probs = torch.tensor([log_prob for _, log_prob in expected])
        torch.testing.assert_close(found.log_probs[image], log_probs)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
def test_stopping_early_changes_nothing(penalty: float) -> None:
    """Only the best few are requested, so the search may stop before all beams have ended."""
    for seed in range(20):
        model = toy(seed=seed)
        options: dict[str, Any] = {"max_length": 5, "length_penalty": penalty}
        few = beam_search(model.step, model.start(6), num_return=2, **options)
        every = beam_search(model.step, model.start(6), num_return=6, **options)
        for image in range(3):
            for rank in range(2):
                assert words(few, image, rank) == words(every, image, rank)


class Narrowing(NamedTuple):
    """A toy's step that can be narrowed to some of its images, and records how many."""

    model: Toy
    sizes: list[int]

    def __call__(self, tokens: Tensor, state: State) -> StepOutput:
        return self.model.step(tokens, state)

    def of(self, images: Tensor) -> Narrowing:
        self.sizes.append(len(images))
        return Narrowing(Toy(self.model.tables[images]), self.sizes)


@pytest.mark.parametrize("search", ["greedy", "beam search", "sampling"])
def test_leaving_out_images_that_are_done_changes_nothing(search: str) -> None:
    model, told = toy(batch=16), {False: [], True: []}

    def found(narrowing: bool) -> tuple[Hypotheses, list[int]]:
        sizes: list[int] = []
        step: Any = Narrowing(model, sizes) if narrowing else model.step
        options: dict[str, Any] = {"max_length": 30, "no_repeat_ngram_size": 3}
        options["on_step"] = lambda tokens, counts: told[narrowing].append((tokens, counts))
        if search == "greedy":
            return greedy(step, model.start(1), **options), sizes
        if search == "beam search":
            options |= {"length_penalty": 0.7, "num_return": 2}
            return beam_search(step, model.start(3), **options), sizes
        own = [torch.Generator().manual_seed(image) for image in range(16)]
        return sample(step, model.start(2), generator=own, **options), sizes

    (all_the_time, none), (narrowed, sizes) = found(False), found(True)
    assert_same(all_the_time, narrowed)
    assert not none and len(sizes) > 1 and sizes == sorted(sizes, reverse=True)
    for (tokens, counts), (same, same_counts) in zip(told[False], told[True], strict=True):
        assert torch.equal(counts, same_counts)
        for line, other, count in zip(tokens, same, counts, strict=True):
            assert torch.equal(line[:count], other[:count])


def test_one_beam_equals_greedy() -> None:
    for seed in range(20):
        model = toy(seed=seed)
        for penalty in (0.0, 0.7, 1.5):
            beam = beam_search(
                model.step, model.start(1), max_length=8, length_penalty=penalty, num_return=1
            )
            assert_same(beam, greedy(model.step, model.start(1), max_length=8))


def test_greedy_takes_the_likeliest_word_each_time() -> None:
    model = toy()
    found = greedy(model.step, model.start(1), max_length=8)
    for image in range(3):
        expected, total = [START, START], 0.0
        while expected[-1] != END and len(expected) < 10:
            log_probs = model.tables[image, expected[-2], expected[-1]].log_softmax(dim=-1)
            word = max((END, *WORDS), key=lambda word: log_probs[word].item())
            expected.append(word)
            total += log_probs[word].item()
        assert words(found, image, 0) == expected[2:]
        assert math.isclose(found.log_probs[image, 0].item(), total, rel_tol=1e-5)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_images_of_a_batch_do_not_see_each_other(beams: int) -> None:
    model = toy(batch=6, scale=3.0)
    options: dict[str, Any] = {"max_length": 9, "length_penalty": 0.7, "num_return": beams}
    together = beam_search(model.step, model.start(beams), **options)
    assert len(set(together.lengths[:, 0].tolist())) > 1  # some end before others
    for image in range(6):
        one = Toy(model.tables[image : image + 1])
        alone = beam_search(one.step, one.start(beams), **options)
        of_batch = Hypotheses(*(field[image : image + 1] for field in together))
        assert_same(alone, of_batch)


def test_few_beams_find_no_more_than_there_is() -> None:
    model = toy(seed=3)
    options: dict[str, Any] = {"max_length": 4, "length_penalty": 0.0, "num_return": 1}
    for image in range(3):
        one = Toy(model.tables[image : image + 1])
        top = best(model, image, 4, 0.0)[0][1]
        scores = [
            beam_search(one.step, one.start(k), **options).log_probs.item() for k in (1, 4, 121)
        ]
        assert max(scores) <= top + 1e-5
        assert math.isclose(scores[-1], top, rel_tol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_attention_follows_its_caption_through_reordered_beams(penalty: float) -> None:
    model = toy(batch=5)
    found = beam_search(
        model.step, model.start(4), max_length=6, length_penalty=penalty, num_return=4
    )
    for image in range(5):
        for rank in range(4):
            caption = words(found, image, rank)
            looked_at = torch.eye(V)[[START, *caption[:-1]]]  # each step's last word
            assert torch.equal(found.attention[image, rank, : len(caption)], looked_at)
            assert not found.attention[image, rank, len(caption) :].any()


def chain(*probabilities: dict[int, float]) -> StepFn:
    """A model whose word probabilities depend on the step alone; its state counts the steps."""

    def step(tokens: Tensor, state: State) -> StepOutput:
        rows = torch.full((len(probabilities), V), 1e-9)
        for row, given in zip(rows, probabilities, strict=True):
            row[list(given)] = torch.tensor(list(given.values()))
        (count,) = state
        logits = rows.log()[count.clamp(max=len(rows) - 1)]
        return StepOutput(logits, (count + 1,), torch.ones(*tokens.shape, 1))

    return step


def test_a_longer_caption_can_still_win_through_the_penalty() -> None:
    """[END] has log 0.5 = -0.69, [3, 3, END] has log 0.45 = -0.80 but three words."""
    step = chain({END: 0.5, 3: 0.45, 4: 0.05}, {3: 1.0}, {END: 1.0})
    start = (torch.zeros(1, 2, dtype=torch.int64),)
    for penalty, expected in ((0.0, [END]), (1.0, [3, 3, END])):
        found = beam_search(step, start, max_length=6, length_penalty=penalty, num_return=1)
        assert words(found, 0, 0) == expected


def test_search_stops_once_no_beam_can_win() -> None:
    steps = 0
    model = chain({END: 0.9, 3: 0.1}, {3: 1.0})

    def step(tokens: Tensor, state: State) -> StepOutput:
        nonlocal steps
        steps += 1
        return model(tokens, state)

    start = (torch.zeros(1, 2, dtype=torch.int64),)
    beam_search(step, start, max_length=50, length_penalty=0.7, num_return=1)
    assert steps == 1
    beam_search(step, start, max_length=50, length_penalty=0.7, num_return=2)
    assert steps == 1 + 50
    greedy(step, (torch.zeros(1, 1, dtype=torch.int64),), max_length=50)
    assert steps == 1 + 50 + 1


def test_captions_that_do_not_end_are_cut_without_end() -> None:
    step = chain({3: 0.6, 4: 0.4})
    start = (torch.zeros(1, 2, dtype=torch.int64),)
    found = beam_search(step, start, max_length=3, length_penalty=0.7, num_return=1)
    assert words(found, 0, 0) == [3, 3, 3]
    assert math.isclose(found.log_probs.item(), 3 * math.log(0.6), rel_tol=1e-5)
    start = (torch.zeros(1, 1, dtype=torch.int64),)
    assert words(greedy(step, start, max_length=3), 0, 0) == [3, 3, 3]


def test_captions_that_do_not_exist_are_marked() -> None:
    model = toy()
    found = beam_search(model.step, model.start(9), max_length=1, length_penalty=0.7, num_return=9)
    assert found.log_probs.isfinite().sum(dim=1).tolist() == [4, 4, 4]
    assert (found.log_probs[:, 4:] == -torch.inf).all()
    assert not found.tokens[:, 4:].any() and not found.lengths[:, 4:].any()


def test_pad_and_start_are_never_said() -> None:
    model = toy()
    model.tables[..., [PAD, START]] = 50.0
    generator = torch.Generator().manual_seed(0)
    for found in (
        greedy(model.step, model.start(1), max_length=5),
        beam_search(model.step, model.start(3), max_length=5, length_penalty=0.7, num_return=3),
        sample(model.step, model.start(3), max_length=5, generator=generator),
    ):
        for image in range(3):
            for rank in range(found.tokens.shape[1]):
                assert not {PAD, START} & set(words(found, image, rank))


@pytest.mark.parametrize("num_return", [0, 4])
def test_no_more_captions_than_beams(num_return: int) -> None:
    model = toy()
    with pytest.raises(ValueError, match=rf"--search.beam-size is 3: .*{num_return} were asked"):
        beam_search(
            model.step, model.start(3), max_length=5, length_penalty=0.7, num_return=num_return
        )


# Minimal length, and n-grams that may not be repeated ------------------------------------------


def limited(
    model: Toy, image: int, max_length: int, min_length: int, size: int
) -> Iterator[tuple[list[int], float]]:
    """All captions of an image within the limits, with their log-probabilities."""

    def repeats(words: list[int]) -> bool:
        ngrams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
        return size > 0 and len(set(ngrams)) < len(ngrams)

    def extend(words: list[int], total: float) -> Iterator[tuple[list[int], float]]:
        if words and (words[-1] == END or len(words) == max_length):
            yield words, total
            return
        may = [word for word in WORDS if not repeats([*words, word])]
        if len(words) >= min_length or not may:
            may.append(END)
        before = [START, START, *words]
        log_probs = model.tables[image, before[-2], before[-1]].log_softmax(dim=-1)
        for word in may:
            yield from extend([*words, word], total + log_probs[word].item())

    return extend([], 0.0)


LIMITS = [
    {"min_length": minimum, "no_repeat_ngram_size": size}
    for minimum, size in [(0, 1), (0, 2), (0, 3), (2, 0), (4, 0), (3, 2), (2, 1), (4, 1)]
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beam_search_is_exhaustive_within_the_limits(
    limits: dict[str, int], penalty: float
) -> None:
    model = toy(seed=1)
    found = beam_search(
        model.step, model.start(121), max_length=4, length_penalty=penalty, num_return=121, **limits
    )
    for image in range(3):
        captions = limited(model, image, 4, *limits.values())
        expected = sorted(captions, key=lambda c: c[1] / len(c[0]) ** penalty, reverse=True)
        assert len(expected) < 121, "else nothing was forbidden"
        assert [words(found, image, r) for r in range(len(expected))] == [c for c, _ in expected]
        log_probs = torch.tensor([log_prob for _, log_prob in expected])
        torch.testing.assert_close(found.log_probs[image, : len(expected)], log_probs)
        assert (found.log_probs[image, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_greedy_takes_the_likeliest_word_that_may_be_said(limits: dict[str, int]) -> None:
    model, changed = toy(), 0
    found = greedy(model.step, model.start(1), max_length=4, **limits)
    free = greedy(model.step, model.start(1), max_length=4)
    for image in range(3):
        captions = [caption for caption, _ in limited(model, image, 4, *limits.values())]
        for place, word in enumerate(said := words(found, image, 0)):
            before = [START, START, *said[:place]]
            beginning = [c for c in captions if len(c) > place and c[:place] == said[:place]]
            log_probs = model.tables[image, before[-2], before[-1]]
            assert word == max({c[place] for c in beginning}, key=lambda w: log_probs[w].item())
        changed += said != words(free, image, 0)
    assert changed or limits == {"min_length": 0, "no_repeat_ngram_size": 3}
    beam = beam_search(
        model.step, model.start(1), max_length=4, length_penalty=0.7, num_return=1, **limits
    )
    assert_same(found, beam)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_samples_keep_the_limits_and_the_models_log_probability(
    limits: dict[str, int], options: dict[str, Any]
) -> None:
    model = toy()
    found = draw(model, 200, max_length=4, **limits, **options)
    for image in range(3):
        known = {tuple(c): log_prob for c, log_prob in limited(model, image, 4, *limits.values())}
        said = [tuple(words(found, image, rank)) for rank in range(200)]
        assert set(said) <= set(known)
        torch.testing.assert_close(found.log_probs[image], torch.tensor([known[c] for c in said]))
        if not options:
            assert len(set(said)) >= 3


def test_where_no_word_is_left_a_caption_may_end_before_its_minimal_length() -> None:
    """Three words exist, none may be repeated, and the minimum is five."""
    model = toy()
    limits = {"max_length": 8, "min_length": 5, "no_repeat_ngram_size": 1}
    for found in (
        beam_search(model.step, model.start(3), length_penalty=0.7, num_return=3, **limits),
        greedy(model.step, model.start(1), **limits),
        draw(model, 50, **limits),
    ):
        assert found.log_probs.isfinite().all()
        for image in range(3):
            for rank in range(found.tokens.shape[1]):
                *three, end = words(found, image, rank)
                assert sorted(three) == list(WORDS) and end == END


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_stopping_early_changes_nothing_within_the_limits(limits: dict[str, int]) -> None:
    for seed in range(10):
        model = toy(seed=seed)
        options: dict[str, Any] = {"max_length": 6, "length_penalty": 0.7, **limits}
        few = beam_search(model.step, model.start(6), num_return=1, **options)
        every = beam_search(model.step, model.start(6), num_return=6, **options)
        for image in range(3):
            assert words(few, image, 0) == words(every, image, 0)


def test_weights_that_are_not_finite_still_show_within_the_limits() -> None:
    model = Toy(torch.full((1, V, V, V), math.nan))
    limits = {"max_length": 4, "min_length": 2, "no_repeat_ngram_size": 2}
    assert greedy(model.step, model.start(1), **limits).log_probs.isnan().all()


# Sampling -------------------------------------------------------------------------------------


def draw(model: Toy, k: int, seed: int = 0, **options: Any) -> Hypotheses:
    generator = torch.Generator().manual_seed(seed)
    return sample(model.step, model.start(k), generator=generator, **options)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_sampling_only_the_likeliest_word_equals_greedy(options: dict[str, Any]) -> None:
    model = toy()
    found = draw(model, 1, max_length=8, **options)
    assert_same(found, greedy(model.step, model.start(1), max_length=8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_as_frequent_as_they_are_probable(temperature: float) -> None:
    model = toy(batch=2)
    found = draw(model, 5000, max_length=1, temperature=temperature)
    logits = model.tables[:, START, START] / temperature
    logits[:, [PAD, START]] = -torch.inf
    for image in range(2):
        frequency = torch.bincount(found.tokens[image, :, 0], minlength=V) / 5000
        torch.testing.assert_close(frequency, logits[image].softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {3, 4}),
        ({"top_p": 0.49}, {3}),
        ({"top_p": 0.51}, {3, 4}),
        ({"top_p": 0.81}, {3, 4, END}),
        ({"top_p": 1.0}, {3, 4, END, 5}),
        ({"top_k": 50}, {3, 4, END, 5}),
    ],
)
def test_sampling_is_cut_to_the_likeliest_words(options: Any, allowed: set[int]) -> None:
    step = chain({3: 0.5, 4: 0.3, END: 0.15, 5: 0.05})
    start = (torch.zeros(1, 2000, dtype=torch.int64),)
    generator = torch.Generator().manual_seed(0)
    found = sample(step, start, max_length=1, generator=generator, **options)
    assert set(found.tokens.flatten().tolist()) == allowed


def test_a_seed_fixes_the_samples() -> None:
    model = toy()
    one, same, other = (draw(model, 4, seed, max_length=6).tokens for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_samples_come_with_the_models_own_log_probability() -> None:
    model = toy()
    found = draw(model, 5, max_length=4, temperature=3.0)
    for image in range(3):
        known = {tuple(caption): log_prob for caption, log_prob in model.captions(image, 4)}
        for rank in range(5):
            expected = known[tuple(words(found, image, rank))]
            assert math.isclose(found.log_probs[image, rank].item(), expected, rel_tol=1e-4)
        assert found.log_probs[image].diff().max() <= 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": 1e-40},  # subnormal in float32
        {"temperature": 1e-300},  # zero in float32
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_impossible_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw(toy(), 1, max_length=3, **options)


# The whole captioner --------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_generated_captions_are_scored_as_in_training(cell: Any) -> None:
    model = shapes().model
    decoder = dataclasses.replace(model.decoder, cell=cell, hidden_dim=16, embedding_dim=8)
    torch.manual_seed(0)
    captioner = build_captioner(ModelConfig(model.encoder, decoder), 12, None, pretrained=False)
    captioner.decoder.load_state_dict(
        {key: 4 * tensor for key, tensor in captioner.decoder.state_dict().items()}
    )
    captioner.eval()
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    search = SearchConfig(beam_size=4, max_length=6, length_penalty=0.7)
    found = generate(captioner, images, search, num_return=4)

    start = torch.full((3, 4, 1), START)
    tokens = torch.cat([start, found.tokens], dim=-1)
    with torch.no_grad():
        output = captioner(images, tokens)
    log_probs = output.logits.log_softmax(dim=-1)
    gained = log_probs.gather(1, tokens[..., 1:][output.mask].unsqueeze(1)).squeeze(1)
    totals = torch.zeros(output.mask.shape).masked_scatter(output.mask, gained).sum(dim=-1)
    torch.testing.assert_close(found.log_probs, totals, rtol=1e-4, atol=1e-4)
    attention = output.attention * output.mask.unsqueeze(-1)
    torch.testing.assert_close(found.attention, attention)

    one_beam = dataclasses.replace(search, beam_size=1)
    likeliest = generate(captioner, images, one_beam, num_return=1)
    memory = captioner.decoder.prepare(captioner.encoder(images))
    state = captioner.decoder.initial_state(memory, 1)
    beam = beam_search(
        lambda tokens, state: captioner.decoder.step(tokens, state, memory),
        state,
        max_length=6,
        length_penalty=0.7,
        num_return=1,
    )
    assert_same(likeliest, beam)


def test_a_captioner_in_training_mode_is_refused() -> None:
    captioner = build_captioner(shapes().model, 12, None, pretrained=False)
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"captioner.eval\(\)"):
        generate(captioner, images, SearchConfig(), num_return=1)


# Words that are certain before the end --------------------------------------------------------


def follow(found: Hypotheses, steps: list[tuple[Tensor, Tensor]]) -> int:
    """Check what `on_step` got; returns how many words were certain before the end."""
    early = 0
    for image in range(len(found.tokens)):
        final: list[int] = found.tokens[image, 0].tolist()
        known = 0
        for number, (tokens, decided) in enumerate(steps):
            count = int(decided[image])
            assert count >= known, "a word was taken back"
            assert tokens[image, :count].tolist() == (final + [PAD] * count)[:count]
            known = count
            early += count if number < len(steps) - 1 else 0
        assert known >= int(found.lengths[image, 0]), "the last step must decide everything"
    return early


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("num_return", [1, 3])
@pytest.mark.parametrize("limits", [{}, {"min_length": 3, "no_repeat_ngram_size": 2}], ids=str)
def test_a_word_that_is_decided_stands_in_the_best_caption(
    penalty: float, num_return: int, limits: dict[str, int]
) -> None:
    early = 0
    for seed in range(30):
        model = toy(seed=seed)
        steps: list[tuple[Tensor, Tensor]] = []
        found = beam_search(
            model.step, model.start(4), max_length=6, length_penalty=penalty,
            num_return=num_return, on_step=lambda *step, steps=steps: steps.append(step), **limits,
        )  # fmt: skip
        early += follow(found, steps)
    assert early > 0, "nothing was ever decided before the end"


@pytest.mark.parametrize("sampled", [False, True])
def test_greedy_and_a_single_sample_decide_a_word_each_step(sampled: bool) -> None:
    steps: list[tuple[Tensor, Tensor]] = []
    options: dict[str, Any] = {"max_length": 6, "on_step": lambda *step: steps.append(step)}
    model = toy()
    found = (sample if sampled else greedy)(model.step, model.start(1), **options)
    follow(found, steps)
    assert [decided.tolist() for _, decided in steps] == [
        [number + 1] * 3 for number in range(len(steps))
    ]


def test_of_several_samples_only_what_all_share_is_decided() -> None:
    model = toy()
    steps: list[tuple[Tensor, Tensor]] = []
    options: dict[str, Any] = {"on_step": lambda *step: steps.append(step)}
    found = draw(model, 3, max_length=6, temperature=0.3, **options)
    for image, count in enumerate(steps[-1][1].tolist()):
        beginnings = {tuple(tokens[:count].tolist()) for tokens in found.tokens[image]}
        assert len(beginnings) == 1
        if count < found.tokens.shape[2]:
            assert len({tuple(tokens[: count + 1].tolist()) for tokens in found.tokens[image]}) > 1


def test_an_images_samples_do_not_depend_on_the_batch() -> None:
    model = toy()

    def seeded(tables: Tensor, seeds: list[int]) -> Hypotheses:
        part = Toy(tables)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(part.step, part.start(3), max_length=6, generator=generators)

    together = seeded(model.tables, [7, 8, 9])
    for image, seed in enumerate((7, 8, 9)):
        alone = seeded(model.tables[image : image + 1], [seed])
        for rank in range(3):
            assert words(alone, 0, rank) == words(together, image, rank)
    other = seeded(model.tables, [1, 2, 3])
    assert other.tokens.shape != together.tokens.shape or not torch.equal(
        other.tokens, together.tokens
    )


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("decoder", ["soft", "adaptive", "updown", "transformer"])
def test_steps_after_all_captions_are_over_change_nothing(beam_size: int, decoder: str) -> None:
    torch.manual_seed(0)
    model = dataclasses.replace(
        shapes().model, decoder=DecoderConfig(name=decoder, hidden_dim=32, num_heads=2)
    )
    captioner = build_captioner(model, 12, None, pretrained=False).eval()
    named = dict(captioner.decoder.named_parameters())
    with torch.no_grad():
        (named["output_bias"] if decoder == "soft" else named["output.bias"])[END] += 2.5
    images = torch.randint(0, 256, (5, 3, 96, 96), dtype=torch.uint8)
    settings = SearchConfig(beam_size=beam_size, max_length=16)
    expected = generate(captioner, images, settings, 1)
    with torch.inference_mode():
        search = begin(captioner, images, settings, 1)
        for _ in range(settings.max_length):
            search.advance()
        found = search.found()
    rest = settings.max_length - expected.tokens.shape[-1]
    assert rest > 0, "they all end before"
    assert torch.equal(found.tokens, F.pad(expected.tokens, (0, rest)))
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.attention, F.pad(expected.attention, (0, 0, 0, rest)))


@pytest.mark.parametrize("words", [100, 599, 600, 601, 699, 5000])
def test_the_likeliest_of_many_words_are_found_wherever_they_stand(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    order = torch.rand(64, 3, words, generator=generator).argsort(dim=-1)
    logits = order.float()  # no two alike
    logits[:, 0, words // 2 :] = -torch.inf
    for found, expected in zip(_largest(logits, 5), logits.topk(5), strict=True):
        assert torch.equal(found, expected)
