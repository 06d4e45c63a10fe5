"""Regions that know their place and each other, before any decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caption_ray.captioning import checkpoint
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import DECODERS, Captioner, build_captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.model.loss import token_loss
from caption_ray.model.refiner import Refiner, build_refiner, sinusoids
from caption_ray.model.search import generate
from caption_ray.training import self_critical

GRID, E, D, V = (2, 3), 5, 8, 15
CONFIG = DecoderConfig(
    embedding_dim=6, hidden_dim=D, attention_dim=7, num_layers=1, num_heads=2, feedforward_dim=12,
    dropout=0.0, num_encoder_layers=2,
)  # fmt: skip
SMALL = EncoderConfig(name="small", weights="none", trainable_from="all", image_size=48)


def refiner(**changes: Any) -> Refiner:
    torch.manual_seed(0)
    built = build_refiner(dataclasses.replace(CONFIG, **changes), E, GRID)
    assert built is not None
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return built.eval()


def captioner(name: str, **changes: Any) -> Captioner:
    torch.manual_seed(0)
    decoder = dataclasses.replace(CONFIG, name=name, **changes)
    return build_captioner(ModelConfig(SMALL, decoder), V, None, pretrained=False).eval()


def pictures(count: int = 2, size: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def words() -> Tensor:
    tokens = torch.tensor([[[START, 5, 6, 7, END]], [[START, 8, 9, END, PAD]]])
    return tokens.expand(-1, 3, -1).clone()


def test_layers_follow_the_papers_equations() -> None:
    built = refiner()
    regions = torch.randn(1, 6, E)
    project: Any = built.project
    x = F.layer_norm(regions @ project[0].weight.T + project[0].bias, (D,), *_of(project[1]))
    x = (x + built.places @ built.from_place.weight.T)[0]
    for layer in built.layers:
        normed = F.layer_norm(x, (D,), *_of(layer.norm1))
        q, k, v = (normed @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(
            3, dim=1
        )
        heads = []
        for own in (slice(0, 4), slice(4, 8)):
            weights = (q[:, own] @ k[:, own].T / 2).softmax(dim=1)  # the root of 4
            heads.append(weights @ v[:, own])
        out = layer.self_attn.out_proj
        x = x + torch.cat(heads, dim=1) @ out.weight.T + out.bias
        inner = F.layer_norm(x, (D,), *_of(layer.norm2)) @ layer.linear1.weight.T
        inner = F.gelu(inner + layer.linear1.bias)
        x = x + inner @ layer.linear2.weight.T + layer.linear2.bias
    expected = F.layer_norm(x, (D,), *_of(built.norm))
    with torch.no_grad():
        torch.testing.assert_close(built(regions)[0], expected)


def _of(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def test_places_are_sinusoids_of_rows_and_columns() -> None:
    places = sinusoids((2, 4))
    assert places.shape == (8, 64)
    # the slowest along rows: half a turn from top to bottom
    top, bottom = torch.tensor([0.25, 0.75]) * torch.pi
    torch.testing.assert_close(places[:4, 0], top.sin().expand(4))
    torch.testing.assert_close(places[4:, 16], bottom.cos().expand(4))
    columns = torch.tensor([0.125, 0.375, 0.625, 0.875]) * torch.pi
    torch.testing.assert_close(places[4:, 32], columns.sin())
    torch.testing.assert_close(places[4:, 47], (64 * columns).sin(), atol=1e-4, rtol=0)
    distances = torch.cdist(places, places) + torch.eye(8) * 9
    assert distances.min() > 0.5


def test_places_alone_begin_as_no_change() -> None:
    built = build_refiner(
        dataclasses.replace(CONFIG, num_encoder_layers=0, region_positions=True), E, GRID
    )
    assert built is not None and built.region_dim == E
    regions = torch.randn(2, 6, E)
    assert torch.equal(built(regions), regions)
    assert built(regions).sum().backward() is None
    assert built.from_place.weight.grad.abs().min() > 0  # though they can learn at once


def test_without_places_and_layers_there_is_no_refiner() -> None:
    assert build_refiner(dataclasses.replace(CONFIG, num_encoder_layers=0), E, GRID) is None


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"hidden-dim is 8: .*num-encoder-layers.*num-heads, 3"):
        refiner(num_heads=3)


@pytest.mark.parametrize("name", sorted(DECODERS))
@pytest.mark.parametrize("changes", [{}, {"num_encoder_layers": 0, "region_positions": True}])
def test_every_decoder_learns_searches_and_comes_back_from_a_checkpoint(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    built, images, tokens = captioner(name, **changes), pictures(), words()
    with torch.no_grad():
        built.refiner.from_place.weight.normal_()  # type: ignore[union-attr]
    output = built(images, tokens)
    token_loss(output.logits, output.targets(tokens))[0].backward()
    idle = [n for n, p in built.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    grouped = sum(len(g["params"]) for g in built.parameter_groups(1e-3, 1e-3, 0.1))
    assert grouped == len(list(built.parameters()))

    for search in (
        SearchConfig(beam_size=1, max_length=5),
        SearchConfig(beam_size=3, max_length=5),
        SearchConfig(beam_size=1, temperature=1.0, max_length=5),
    ):
        found = generate(built, images, search, num_return=1)
        regions = built.encode(images)
        again = generate(built, regions, search, num_return=1)  # as from a feature cache
        assert torch.equal(found.tokens, again.tokens)
        with torch.no_grad():
            given = torch.cat([torch.full((2, 1, 1), START), found.tokens], dim=2)
            scored = built(images, given)
        told = given[..., 1:][scored.mask].unsqueeze(1)
        likelihood = torch.zeros(scored.mask.shape)
        likelihood[scored.mask] = scored.logits.log_softmax(dim=1).gather(1, told)[:, 0]
        torch.testing.assert_close(likelihood.sum(dim=2), found.log_probs, rtol=1e-4, atol=1e-4)

    model = ModelConfig(SMALL, dataclasses.replace(CONFIG, name=name, **changes))
    vocabulary = Vocabulary([f"w{i}" for i in range(V - 4)])
    state = checkpoint.State(1, 1, 0, {}, None)
    checkpoint.save(tmp_path, built, vocabulary, model, SearchConfig(), state, {}, Ledger([1]))
    loaded = checkpoint.load(str(tmp_path))
    with torch.no_grad():
        expected = built(images, tokens).logits
        assert torch.equal(loaded.captioner.eval()(images, tokens).logits, expected)


def test_a_captioner_goes_on_with_another_image_size() -> None:
    small = captioner("soft")
    config = ModelConfig(
        dataclasses.replace(SMALL, image_size=96), dataclasses.replace(CONFIG, name="soft")
    )
    larger = build_captioner(config, V, None, pretrained=False).eval()
    larger.load_state_dict(small.state_dict())
    assert larger(pictures(size=96), words()).attention.shape[-1] == 36


def test_self_critical_training_refines_once() -> None:
    built, images = captioner("soft"), pictures()
    self_critical.as_policy(built)
    regions = built.encode(images)
    drawn = [
        self_critical.draw(built, regions, 3, 5, torch.Generator().manual_seed(0)) for _ in range(2)
    ]
    assert torch.equal(*drawn)
    start = torch.full((2, 3, 1), START)
    tokens = torch.cat([start, drawn[0]], dim=-1)
    outputs = [built(inputs, tokens).logits for inputs in (images, regions)]
    torch.testing.assert_close(*outputs)
