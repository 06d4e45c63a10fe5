"""The captioner as a whole: built, trained, rebuilt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.decoder import END, PAD, START
from caption_ray.model.loss import doubly_stochastic, token_loss
from caption_ray.model.search import generate

V = 15
DECODER = DecoderConfig(embedding_dim=16, hidden_dim=32, attention_dim=16, dropout=0.0)
SMALL = ModelConfig(
    EncoderConfig(name="small", weights="none", trainable_from="all", image_size=64, grid=None),
    DECODER,
)
RESNET = ModelConfig(
    EncoderConfig(name="resnet18", weights="none", image_size=64, grid=None), DECODER
)


def build(config: ModelConfig, **encoder: Any) -> Captioner:
    torch.manual_seed(0)
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **encoder))
    return build_captioner(config, V, None, pretrained=True)


def batch(images: int = 3, k: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = torch.full((images, k, 8), PAD)
    tokens[..., 0] = START
    tokens[..., 1:5] = torch.randint(3, V, (images, k, 4), generator=generator)
    tokens[..., 5] = END
    return pixels, tokens


def loss_of(captioner: Captioner, images: Tensor, tokens: Tensor) -> Tensor:
    output = captioner(images, tokens)
    loss, _ = token_loss(output.logits, tokens[..., 1:][output.mask])
    penalty, captions = doubly_stochastic(output.attention, output.mask)
    return loss / output.mask.sum() + penalty / captions


def test_captioner_learns_pictures_by_heart_and_says_their_captions() -> None:
    captioner, (images, tokens) = build(SMALL), batch(images=4, k=1)
    optimizer = torch.optim.AdamW(captioner.parameter_groups(1e-2, 2e-3, 0.0))
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(captioner, images, tokens).backward()
        optimizer.step()
    captioner.eval()
    for beam_size in (1, 3):
        search = SearchConfig(beam_size=beam_size, max_length=7)
        found = generate(captioner, images, search, num_return=1)
        assert torch.equal(found.tokens[..., :5], tokens[..., 1:6])


def test_captions_of_an_image_equal_separate_passes() -> None:
    captioner, (images, tokens) = build(SMALL).eval(), batch(k=3)
    together = captioner(images, tokens)
    for k in range(3):
        alone = captioner(images, tokens[:, k : k + 1])
        torch.testing.assert_close(alone.attention, together.attention[:, k : k + 1])
        of_k = together.logits.view(3, 3, 5, V)[:, k].flatten(0, 1)
        torch.testing.assert_close(alone.logits, of_k)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_training_leaves_a_frozen_encoder_alone(batch_norm: str) -> None:
    captioner, (images, tokens) = build(RESNET, batch_norm=batch_norm).train(), batch()
    before = {key: tensor.clone() for key, tensor in captioner.state_dict().items()}
    optimizer = torch.optim.AdamW(captioner.parameter_groups(1e-2, 1e-2, 0.1))
    loss_of(captioner, images, tokens).backward()
    optimizer.step()
    for key, tensor in captioner.state_dict().items():
        assert torch.equal(tensor, before[key]) == key.startswith("encoder."), key


def test_parameter_groups_hold_each_trainable_parameter_once() -> None:
    captioner = build(RESNET, trainable_from="layer4")
    groups = captioner.parameter_groups(4e-4, 1e-4, 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(p) for p in captioner.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert len(trainable) < len(list(captioner.parameters()))


def test_parameter_groups_decay_matrices_and_split_learning_rates() -> None:
    captioner = build(SMALL)
    groups = captioner.parameter_groups(4e-4, 1e-4, 0.1)
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    for name, parameter in captioner.named_parameters():
        rate = 1e-4 if name.startswith("encoder.") else 4e-4
        decay = 0.0 if parameter.ndim == 1 else 0.1
        assert settings[id(parameter)] == (rate, decay), name


def test_a_frozen_encoder_has_no_group() -> None:
    assert {group["lr"] for group in build(RESNET).parameter_groups(4e-4, 1e-4, 0.0)} == {4e-4}


@pytest.mark.parametrize("weights", ["DEFAULT", "s3://bucket/resnet18.pth"])
def test_rebuilding_looks_up_no_weights(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: WeightsEnum, **options: Any) -> None:
        raise AssertionError("weights were looked up")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    encoder = dataclasses.replace(RESNET.encoder, weights=weights)
    config = dataclasses.replace(RESNET, encoder=encoder)
    captioner = build_captioner(config, V, None, pretrained=False)

    trained = build(RESNET)
    captioner.load_state_dict(trained.state_dict())
    images, tokens = batch()
    captioner.eval(), trained.eval()
    assert torch.equal(captioner(images, tokens).logits, trained(images, tokens).logits)


def test_normalisation_travels_with_the_weights() -> None:
    trained, rebuilt = build(RESNET), build(RESNET)
    trained.encoder.mean += 10
    rebuilt.load_state_dict(trained.state_dict())
    assert torch.equal(rebuilt.encoder.mean, trained.encoder.mean)


def test_own_words_replace_words_before_and_never_what_is_predicted() -> None:
    captioner, (images, tokens) = build(SMALL).eval(), batch(images=8, k=2)
    given = captioner(images, tokens)
    torch.testing.assert_close(captioner(images, tokens, 0.0).logits, given.logits)
    torch.manual_seed(0)
    own = captioner(images, tokens, own_words=0.5)
    assert torch.equal(own.mask, given.mask)
    rows = own.mask.flatten(0, 1)
    first = torch.zeros_like(rows)
    first[:, 0] = True
    same = (own.logits - given.logits).abs().amax(dim=-1) < 1e-5
    # START is never replaced, so the first word is predicted from the same input
    assert same[first[rows]].all()
    assert 0 < (~same).sum() < len(same)


def test_own_words_come_from_the_models_predictions() -> None:
    captioner, (images, tokens) = build(SMALL).eval(), batch()
    certain = 7
    with torch.no_grad():
        captioner.decoder.output_bias.fill_(-100.0)
        captioner.decoder.output_bias[certain] = 100.0
    mixed = captioner._with_own_words(captioner.encoder(images), tokens, 1.0)
    expected = torch.where((tokens == START) | (tokens == END) | (tokens == PAD), tokens, certain)
    assert torch.equal(mixed, expected)


def test_known_regions_spare_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, (images, tokens) = build(SMALL).eval(), batch()
    regions, expected = captioner.encoder(images), captioner(images, tokens)
    monkeypatch.setattr(captioner.encoder, "forward", lambda _: pytest.fail("encoded again"))
    found = captioner(regions, tokens)
    torch.testing.assert_close(found.logits, expected.logits)
