"""Ensembles, compared to the mean of their members' separate predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.model.captioner import DECODERS, Captioner, build_captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.model.ensemble import Ensemble
from caption_ray.model.search import generate

V, B, SIZE, MAX_LENGTH = 9, 3, 32, 6
SEARCHES = {
    "greedy": SearchConfig(beam_size=1, max_length=MAX_LENGTH),
    "beams": SearchConfig(beam_size=4, max_length=MAX_LENGTH, no_repeat_ngram_size=2),
    "sampling": SearchConfig(temperature=0.8, top_p=0.9, max_length=MAX_LENGTH),
}


def build(decoder: str, seed: int, grid: int | None = None) -> Captioner:
    """A captioner with weights so large that captions depend on the picture."""
    torch.manual_seed(seed)
    model = ModelConfig(
        EncoderConfig(
            name="small", weights="none", trainable_from="all", image_size=SIZE, grid=grid
        ),
        DecoderConfig(
            name=decoder, embedding_dim=16, hidden_dim=16, attention_dim=16, num_layers=2,
            num_heads=2, feedforward_dim=16,
        ),
    )  # fmt: skip
    captioner = build_captioner(model, V, None, pretrained=False).eval()
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(1.9)
    return captioner


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 100, (B, 3, SIZE, SIZE), generator=generator)
    return (noise + 70 * torch.arange(B).view(B, 1, 1, 1)).clamp(max=255).to(torch.uint8)


def mean_log_probs(members: list[Captioner], image: Tensor, words: list[int]) -> Tensor:
    """log of the members' mean probability of each word after START and after each of `words`,
    (len(words) + 1, V), by teacher forcing, without step, state or search."""
    tokens = torch.tensor([[[START, *words, END]]])
    with torch.no_grad():
        logits = [member(image.unsqueeze(0), tokens).logits for member in members]
    return torch.stack(logits).double().softmax(dim=-1).mean(dim=0).log()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_a_captioner_with_itself_says_exactly_what_it_says_alone(
    images: Tensor, decoder: str, search: str
) -> None:
    captioner = build(decoder, seed=0)
    together = Ensemble([captioner, captioner]).eval()
    how, seeds = SEARCHES[search], [5, 6, 7]
    number = 1 if search == "greedy" else 2
    alone, ours = (generate(one, images, how, number, seeds) for one in (captioner, together))
    assert torch.equal(ours.tokens, alone.tokens)
    torch.testing.assert_close(ours.log_probs, alone.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.attention, alone.attention, atol=1e-5, rtol=0)


PAIRS = [
    ("soft", "transformer"),
    ("adaptive", "soft"),
    ("updown", "transformer"),
    ("transformer", "transformer"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_greedy_takes_the_word_of_highest_mean_probability(
    images: Tensor, pair: tuple[str, str]
) -> None:
    """The members differ in their decoders and their encoders' grids."""
    members = [build(pair[0], seed=4), build(pair[1], seed=14, grid=1)]
    found = generate(Ensemble(members).eval(), images, SEARCHES["greedy"], 1)
    for image in range(B):
        words: list[int] = []
        total = 0.0
        while len(words) < MAX_LENGTH and END not in words:
            log_probs = mean_log_probs(members, images[image], words)[-1]
            log_probs[[PAD, START]] = -torch.inf
            words.append(int(log_probs.argmax()))
            total += log_probs[words[-1]].item()
        assert (
            found.tokens[image, 0].tolist()
            == (words + [PAD] * MAX_LENGTH)[: found.tokens.shape[-1]]
        )
        assert found.log_probs[image, 0].item() == pytest.approx(total, abs=1e-4)
    alone = [generate(member, images, SEARCHES["greedy"], 1).tokens.tolist() for member in members]
    assert found.tokens.tolist() not in alone, "else the mean would not show"


@pytest.mark.parametrize("search", ["beams", "sampling"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_captions_have_the_probability_that_the_mean_gives_them(
    images: Tensor, pair: tuple[str, str], search: str
) -> None:
    """So each member's state is reordered with the beams, and returned to the right member."""
    members = [build(pair[0], seed=4), build(pair[1], seed=14)]
    found = generate(Ensemble(members).eval(), images, SEARCHES[search], 3, [1, 2, 3])
    for image in range(B):
        for rank in range(3):
            words = found.tokens[image, rank][: int(found.lengths[image, rank])].tolist()
            log_probs = mean_log_probs(members, images[image], words[:-1])
            expected = log_probs[range(len(words)), words].sum().item()
            assert found.log_probs[image, rank].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("grid", [None, 1])
def test_words_look_where_members_look_on_average_if_their_grids_agree(
    images: Tensor, grid: int | None
) -> None:
    members = [build("soft", seed=4), build("adaptive", seed=14, grid=grid)]
    ensemble = Ensemble(members).eval()
    assert ensemble.grid == members[0].grid == (2, 2)
    found = generate(ensemble, images, SEARCHES["greedy"], 1)
    tokens = torch.cat([torch.full((B, 1, 1), START), found.tokens], dim=-1)
    with torch.no_grad():
        of_members: list[Any] = [member(images, tokens) for member in members]
    expected = of_members[0].attention
    if grid is None:
        expected = (expected + of_members[1].attention) / 2
    expected = expected * of_members[0].mask.unsqueeze(-1)
    torch.testing.assert_close(found.attention, expected)
