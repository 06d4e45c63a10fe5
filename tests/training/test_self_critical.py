"""Self-critical training against what can be computed by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from caption_ray import config
from caption_ray.captioning.metrics import CiderD
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import DECODERS, build_captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.training import loop, self_critical

SIZE, V = 32, 9
CPU = torch.device("cpu")


def _captioner(name="soft", dropout=0.5):
    preset = config.shapes().model
    encoder = dataclasses.replace(preset.encoder, image_size=SIZE)
    decoder = dataclasses.replace(
        preset.decoder, name=name, embedding_dim=8, hidden_dim=16, attention_dim=8, dropout=dropout,
        num_layers=1, num_heads=2, feedforward_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = dataclasses.replace(preset, encoder=encoder, decoder=decoder)
    return build_captioner(model, V, None, pretrained=True)


def _settings(**changes):
    return config.TrainConfig(stage="self-critical", samples_per_image=4, **changes)


def _example(images=3):
    tokens = np.full((images, 1, 5), PAD, np.int32)
    tokens[..., :4] = [START, 4, 5, END]
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)
    return loop.to_device(pixels, tokens, SIZE, CPU)


def _scored_by(reward):
    """A `Score` at once, by a function of ids (B, K, T)."""
    return lambda tokens, captions: lambda: np.float32(reward(tokens))


def _likes(word):
    return _scored_by(lambda tokens: (tokens == word).mean(axis=-1))


def _step(captioner, score, settings, example, optimizer, seed=0, model=None):
    return self_critical.train_step(
        model or captioner, captioner, example, score, optimizer,
        settings, max_length=3, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def test_the_mean_gradient_is_that_of_the_expected_reward():
    """One word, whose distribution is a softmax: all captions can be enumerated."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, -0.5, 2.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits.softmax(0) @ reward, logits)

    # every way to draw three captions, each weighted by its probability
    total = torch.zeros(4, dtype=torch.float64)
    probabilities = logits.softmax(0).detach()
    for drawn in itertools.product(range(4), repeat=3):
        k = torch.tensor(drawn)
        above = self_critical.advantages(reward[k][None])[0]
        likelihood = logits.log_softmax(0)[k]
        (gradient,) = torch.autograd.grad((above * likelihood).sum() / 3, logits)
        total += probabilities[k].prod() * gradient
    torch.testing.assert_close(total, expected)


def test_each_caption_is_measured_against_the_others_of_its_picture():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3 - 0.0]])
    torch.testing.assert_close(self_critical.advantages(rewards), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_the_likelihood_that_is_learnt_is_that_of_the_draw(name):
    """Teacher forcing over drawn captions gives what drawing them gave, but for the two words that
    are never drawn and leave their probability to the others."""
    captioner = _captioner(name)
    self_critical.as_policy(captioner)
    images = _example().inputs
    with torch.no_grad():
        regions = captioner.encoder(images)
        drawn = self_critical.draw(captioner, regions, 4, 6, torch.Generator().manual_seed(1))
        tokens = torch.cat([torch.full((3, 4, 1), START), drawn], dim=-1)
        output = captioner(images, tokens)
        found = self_critical.log_likelihood(output.logits, drawn[output.mask], output.mask)

        memory = captioner.decoder.prepare(regions)
        state = captioner.decoder.initial_state(memory, 4)
        expected = torch.zeros(3, 4)
        words = tokens[..., 0]
        for place in range(drawn.shape[-1]):
            logits, state, _ = captioner.decoder.step(words, state, memory)
            logits[..., [PAD, START]] = -torch.inf
            words = drawn[..., place]
            # PAD is what follows the end, and counts for nothing
            real = words != PAD
            gained = logits.log_softmax(-1).gather(-1, words.unsqueeze(-1)).squeeze(-1)
            expected += torch.where(real, gained, torch.zeros(()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not (drawn == START).any()


@pytest.mark.parametrize("name", DECODERS)
def test_a_reward_for_a_word_makes_it_likelier(name):
    captioner = _captioner(name)
    self_critical.as_policy(captioner)
    optimizer = torch.optim.Adam(captioner.parameters(), lr=5e-3)
    rewards = []
    for step in range(60):
        sums, _, _ = _step(captioner, _likes(6), _settings(), _example(), optimizer, seed=step)
        rewards.append(sums.rewards()["reward"])
    assert rewards[0] < 0.4
    assert np.mean(rewards[-5:]) > 0.9


def test_equal_rewards_move_nothing():
    captioner = _captioner()
    self_critical.as_policy(captioner)
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    optimizer = torch.optim.SGD(captioner.parameters(), lr=1.0)
    score = _scored_by(lambda tokens: np.full(tokens.shape[:2], 0.7))
    _, norm, _ = _step(captioner, score, _settings(), _example(), optimizer)
    assert float(norm) < 1e-6
    for name, value in captioner.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name, atol=1e-6, rtol=0)


def test_known_features_teach_what_their_pictures_do():
    found = []
    for known in (False, True):
        captioner = _captioner()
        captioner.encoder.requires_grad_(False)
        self_critical.as_policy(captioner)
        example = _example()
        if known:
            example.inputs = captioner.encoder(example.inputs)
        optimizer = torch.optim.SGD(captioner.decoder.parameters(), lr=1.0)
        sums, norm, _ = _step(captioner, _likes(6), _settings(), example, optimizer)
        found.append((sums.nll, norm, captioner.decoder.output_bias.detach()))
    assert float(found[0][1]) > 0
    torch.testing.assert_close(found[0], found[1])


def test_a_stand_in_batch_is_not_scored_and_moves_nothing():
    captioner = _captioner()
    self_critical.as_policy(captioner)
    optimizer = torch.optim.SGD(captioner.parameters(), lr=1.0)
    before = captioner.decoder.output_bias.clone()
    sums, norm, _ = _step(
        captioner,
        lambda *_: pytest.fail("scored nothing"),
        _settings(),
        loop.to_device(None, None, SIZE, CPU),
        optimizer,
    )
    assert float(norm) == float(sums.captions) == 0
    assert torch.equal(captioner.decoder.output_bias, before)


def test_a_policy_has_no_dropout_and_keeps_its_batch_statistics():
    captioner = _captioner()
    self_critical.as_policy(captioner)
    before = [b.clone() for b in captioner.encoder.buffers()]
    images, tokens = _example().inputs, torch.tensor([[[START, 4, END]]] * 3)
    first, second = captioner(images, tokens).logits, captioner(images, tokens).logits
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, captioner.encoder.buffers()))
    assert not any(m.training for m in captioner.modules() if isinstance(m, nn.Dropout))


def test_rewards_are_ciderd_with_the_end_as_a_word():
    vocabulary = Vocabulary(["a", "red", "circle", "square", "blue"])
    written = [["a red circle", "a circle"], ["a blue square", "blue square"]]
    references = [
        [self_critical.as_scored(c, vocabulary.tokenizer) for c in captions] for captions in written
    ]
    cider = CiderD(references)
    rewards = self_critical.Rewards(cider, vocabulary)
    told = [["a red circle", "a red"], ["square", "a blue square"]]
    tokens = np.zeros((2, 2, 6), np.int64)
    for b, k in itertools.product(range(2), range(2)):
        ids = vocabulary.encode(told[b][k], 6)[1:]
        tokens[b, k, : len(ids)] = ids
    tokens[0, 1][tokens[0, 1] == END] = PAD  # this one breaks off
    found = rewards(tokens, written)
    for b, k in itertools.product(range(2), range(2)):
        words = told[b][k].split() + ([] if (b, k) == (0, 1) else ["<end>"])
        assert found[b, k] == pytest.approx(cider(words, references[b]), rel=1e-6)
    assert found[0, 0] > found[0, 1] > 0
    unread = rewards(tokens, [written[0], []])
    assert (unread[1] == 0).all() and (unread[0] == found[0]).all()


def test_forgetting_rare_ngrams_changes_no_score():
    captions = [[["a", "b", "c"], ["a", "b"]], [["a", "c"]], [["b", "c", "d"]]]
    whole, slim = CiderD(captions), CiderD()
    for one in captions:
        slim.add(CiderD([one]))
    slim.forget_rare()
    assert len(slim.frequency) < len(whole.frequency)
    for told in (["a", "b"], ["b", "c", "d"], ["x"]):
        for references in captions:
            assert slim(told, references) == whole(told, references)
