"""Encoders: cutting classifiers, freezing, normalising, pooling and loading weights."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import kept_by
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ViT_B_16_Weights

from caption_ray.config import EncoderConfig
from caption_ray.model.backbone import Backbone
from caption_ray.model.encoder import Encoder, build_encoder
from caption_ray.model.weights import is_weights_uri

SMALL = EncoderConfig(name="small", weights="none", trainable_from="all", image_size=96, grid=None)
RESNET = EncoderConfig(name="resnet18", weights="none", image_size=64, grid=None)


def pictures(size: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def build(config: EncoderConfig, weights_path: str | None = None, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(dataclasses.replace(config, **changes), weights_path).eval()


# What torchvision's classifiers do between their last feature map and their head.
def mean(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3))


def pool_1x1(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3), keepdim=True)


def pool_7x7(features: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(features, 7).flatten(1)


def nothing(features: Tensor) -> Tensor:
    return features


@pytest.mark.parametrize(
    ("name", "size", "region_dim", "side", "head", "pool"),
    [
        ("resnet18", 64, 512, 2, "fc", mean),
        ("inception_v3", 96, 2048, 1, "fc", mean),
        ("googlenet", 64, 1024, 2, "fc", mean),
        ("densenet121", 64, 1024, 2, "classifier", mean),
        ("mobilenet_v2", 64, 1280, 2, "classifier", mean),
        ("mobilenet_v3_small", 64, 576, 2, "classifier", mean),
        ("efficientnet_b0", 64, 1280, 2, "classifier", mean),
        ("regnet_y_400mf", 64, 440, 2, "fc", mean),
        ("shufflenet_v2_x0_5", 64, 1024, 2, "fc", mean),
        ("squeezenet1_1", 64, 512, 3, "classifier", nothing),
        ("vgg11", 64, 512, 2, "classifier", pool_7x7),
        ("convnext_tiny", 64, 768, 2, "classifier", pool_1x1),
        ("swin_t", 64, 768, 2, "head", mean),
        ("maxvit_t", 224, 512, 7, "classifier", nothing),
    ],
)
def test_regions_are_what_the_classifier_pools(
    name: str, size: int, region_dim: int, side: int, head: str, pool: Any
) -> None:
    encoder = build(RESNET, name=name, image_size=size)
    assert (encoder.region_dim, encoder.grid) == (region_dim, (side, side))
    regions = encoder(pictures(size))
    assert regions.shape == (1, side * side, region_dim)

    classifier, images = classifier_with_weights_of(encoder, name, head), pictures(size)
    seen: list[Tensor] = []
    head_module = classifier.get_submodule(head)
    head_module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    classifier((images - encoder.mean) / encoder.std)
    feature_map = regions.transpose(1, 2).unflatten(2, (side, side))
    torch.testing.assert_close(pool(feature_map), seen[0], rtol=1e-3, atol=1e-4)


def test_regions_of_a_vision_transformer_are_its_patches() -> None:
    encoder = build(RESNET, name="vit_b_16", image_size=48)
    assert (encoder.region_dim, encoder.grid) == (768, (3, 3))
    classifier = classifier_with_weights_of(encoder, "vit_b_16", "heads", image_size=48)
    seen: list[Tensor] = []
    classifier.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    classifier((pictures(48) - encoder.mean) / encoder.std)
    torch.testing.assert_close(encoder(pictures(48)), seen[0][:, 1:])


def classifier_with_weights_of(encoder: Encoder, name: str, head: str, **options: Any) -> Any:
    """torchvision's own classifier with the encoder's weights, which must be all of its weights,
    under the same names, except for those of the head and of auxiliary heads."""
    if name in ("inception_v3", "googlenet"):
        options = {"init_weights": False, "transform_input": True}
    elif name == "vgg11":
        options = {"init_weights": False}
    classifier = models.get_model(name, **options).eval()
    missing, unexpected = classifier.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} <= {head, "AuxLogits", "aux1", "aux2"}
    assert any(key.startswith(head) for key in missing)
    return classifier


@pytest.mark.parametrize("name", ["small", "resnet18", "inception_v3", "squeezenet1_1"])
def test_every_parameter_takes_part(name: str) -> None:
    encoder = build(SMALL, name=name).train()
    encoder(pictures(96, batch=2)).square().sum().backward()
    unused = [key for key, weight in encoder.named_parameters() if weight.grad is None]
    assert not unused


def test_pixels_are_normalised_with_imagenets_mean_and_deviation() -> None:
    # no layers: these make of the pixels' last bits what the CPU's kernels happen to
    encoder, images = Encoder(Backbone(nn.Identity()), SMALL), pictures(96, batch=2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = ((images / 255 - mean) / std).flatten(2).transpose(1, 2)
    # The difference from the mean, less than 1, is of a few roundings of 2^-24, and divided by 0.22
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", [1, 2, 4, 5])
def test_grid_pools_as_adaptive_average_pooling_does(grid: int) -> None:
    whole, pooled = build(RESNET, image_size=96), build(RESNET, image_size=96, grid=grid)
    assert (whole.grid, pooled.grid) == ((3, 3), (grid, grid))
    feature_map = whole(pictures(96)).transpose(1, 2).unflatten(2, (3, 3))
    expected = F.adaptive_avg_pool2d(feature_map, grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled(pictures(96)), expected)


# The small backbone ---------------------------------------------------------------------------


def test_small_gives_regions_of_16_pixels() -> None:
    encoder = build(SMALL)
    assert encoder.grid == (6, 6)
    assert encoder(pictures(96, batch=2)).shape == (2, 36, encoder.region_dim)


def test_small_regions_do_not_depend_on_the_batch_once_trained() -> None:
    encoder, images = build(SMALL), pictures(96, batch=3)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone)


def test_small_regions_know_where_they_are() -> None:
    encoder = build(SMALL)
    blank = torch.full((1, 3, 384, 384), 200, dtype=torch.uint8)
    regions = encoder(blank).unflatten(1, (24, 24))[0]
    # Far enough from the border for it to have no effect.
    centre, left, above = regions[12, 12], regions[12, 10], regions[10, 12]
    for one, other in ((centre, left), (centre, above), (left, above)):
        assert (one - other).abs().max() > 1e-3


# Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "trainable", "frozen"),
    [
        ("resnet18", "layer4", {"layer4"}, {"conv1", "bn1", "layer1", "layer2", "layer3"}),
        ("resnet18", "all", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}, set()),
        ("small", "stage3", {"stage3", "stage4"}, {"stage1", "stage2"}),
        ("small", "none", set(), {"stage1", "stage2", "stage3", "stage4"}),
    ],
)
def test_trainable_from_splits_the_stages(
    name: str, stage: str, trainable: set[str], frozen: set[str]
) -> None:
    encoder = build(RESNET, name=name, trainable_from=stage)
    parts: dict[bool, set[str]] = {True: set(), False: set()}
    for key, parameter in encoder.backbone.named_parameters():
        parts[parameter.requires_grad].add(key.split(".")[0])
    assert (parts[True], parts[False]) == (trainable, frozen)


def test_trainable_from_takes_numbered_stages() -> None:
    encoder = build(RESNET, name="mobilenet_v3_small", trainable_from="features.11")
    stages = {
        key.split(".")[1]
        for key, parameter in encoder.backbone.named_parameters()
        if parameter.requires_grad
    }
    assert stages == {"11", "12"}


@pytest.mark.parametrize(("batch_norm", "training"), [("frozen", {}), ("train", {"layer4"})])
def test_batch_norm_learns_only_where_asked(batch_norm: Any, training: set[str]) -> None:
    encoder = build(RESNET, trainable_from="layer4", batch_norm=batch_norm).train()
    in_training = {
        name.split(".")[0]
        for name, module in encoder.backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.training
    }
    assert in_training == set(training)
    assert not any(module.training for module in encoder.eval().modules())


def test_frozen_part_keeps_no_graph() -> None:
    assert build(RESNET).train()(pictures(64)).grad_fn is None

    def saved(stage: str) -> int:
        encoder = build(RESNET, trainable_from=stage).train()
        regions, elements = kept_by(lambda: encoder(pictures(64)))
        regions.sum().backward()
        assert encoder.backbone.conv1.weight.grad is None or stage == "all"
        return elements

    weights = sum(p.numel() for p in models.resnet18().layer4.parameters())
    assert saved("layer4") < 1.1 * weights
    assert saved("all") > 1.3 * weights


def test_a_copy_is_frozen_alike() -> None:
    encoder = build(RESNET, trainable_from="layer4")
    copied = copy.deepcopy(encoder).train()
    encoder.train()
    for module, twin in zip(encoder.modules(), copied.modules(), strict=True):
        if not list(module.children()):
            assert twin.training == module.training
    trainable = [[p.requires_grad for p in e.parameters()] for e in (encoder, copied)]
    assert trainable[0] == trainable[1]


def test_training_leaves_frozen_weights_and_statistics_alone() -> None:
    encoder = build(RESNET, trainable_from="layer4", batch_norm="train").train()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    trainable = [weight for weight in encoder.parameters() if weight.requires_grad]
    encoder(pictures(64, batch=2)).square().sum().backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    for key, tensor in encoder.state_dict().items():
        changed = not torch.equal(tensor, before[key])
        assert changed == key.startswith("backbone.layer4"), key


# Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("with_head", [True, False])
def test_weights_come_from_a_file(tmp_path: Path, ending: str, with_head: bool) -> None:
    torch.manual_seed(7)
    state = models.shufflenet_v2_x0_5().state_dict()
    if not with_head:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    config = dataclasses.replace(RESNET, name="shufflenet_v2_x0_5", weights=str(path))
    encoder = build(config, str(path))
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_weights_by_name_come_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    state = models.shufflenet_v2_x0_5().state_dict()
    url = models.get_model_weights("shufflenet_v2_x0_5")["IMAGENET1K_V1"].url
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / url.rpartition("/")[2])
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        encoder = build(RESNET, name="shufflenet_v2_x0_5", weights=name)
        for key, tensor in encoder.backbone.state_dict().items():
            assert torch.equal(tensor, state[key]), key


def test_densenets_old_names_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = models.densenet121().state_dict()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor
        for key, tensor in state.items()
    }
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    config = dataclasses.replace(RESNET, name="densenet121", weights="./old.pth")
    encoder = build(config, str(tmp_path / "old.pth"))
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_vision_transformers_positions_are_interpolated_to_the_image_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = models.vit_b_16(image_size=64).state_dict()
    state["encoder.pos_embedding"].normal_()
    monkeypatch.setattr(ViT_B_16_Weights, "get_state_dict", lambda self, **options: dict(state))
    encoder = build(RESNET, name="vit_b_16", weights="IMAGENET1K_V1", image_size=112)
    positions, trained = encoder.backbone.encoder.pos_embedding, state["encoder.pos_embedding"]
    assert encoder.grid == (7, 7)
    torch.testing.assert_close(positions[:, 0], trained[:, 0])
    torch.testing.assert_close(positions[:, 1], trained[:, 1])
    torch.testing.assert_close(positions[:, 49], trained[:, 16])


@pytest.mark.parametrize(
    ("weights", "is_uri"),
    [
        ("none", False),
        ("DEFAULT", False),
        ("IMAGENET1K_V2", False),
        ("w.pth", True),
        ("w.safetensors", True),
        ("s3://bucket/w", True),
        ("/data/w", True),
    ],
)
def test_a_uri_is_told_from_a_name(weights: str, is_uri: bool) -> None:
    assert is_weights_uri(weights) is is_uri


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet51"}, r"encoder.name is 'resnet51'.*did you mean.*resnet50"),
        ({"name": "smal"}, r"encoder.name is 'smal'.*did you mean.*small"),
        ({"name": "???"}, r"encoder.name is '\?\?\?'.*such as resnet50"),
        ({"weights": "IMAGENET1K_V9"}, r"encoder.weights is 'IMAGENET1K_V9'.*IMAGENET1K_V1"),
        ({"name": "small", "weights": "DEFAULT"}, r"encoder.weights is 'DEFAULT'.*small.*none"),
        ({"weights": "a/b.pth"}, r"encoder.weights is 'a/b.pth'.*local file"),
        ({"trainable_from": "layer9"}, r"trainable-from is 'layer9'.*conv1, bn1, layer1.*layer4"),
        ({"trainable_from": "relu"}, r"trainable-from is 'relu'.*layer4"),
        ({"name": "small", "trainable_from": "layer3"}, r"'layer3'.*stage1, stage2"),
        ({"name": "inception_v3", "image_size": 32}, r"image-size is 32.*inception_v3"),
        ({"name": "vit_b_16", "image_size": 100}, r"image-size is 100.*vit_b_16"),
        ({"name": "maxvit_t", "image_size": 256}, r"image-size is 256.*maxvit_t"),
    ],
)
def test_errors_name_the_option_and_valid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(RESNET, **changes)


def test_stages_to_choose_from_are_the_coarsest() -> None:
    message = r"features.0, features.1, .*features.12$"
    with pytest.raises(ValueError, match=message):
        build(RESNET, name="mobilenet_v3_small", trainable_from="features.13")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_broken_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"broken.{ending}"
    path.write_bytes(b"these are no weights")
    with pytest.raises(ValueError, match=rf"encoder.weights is 's3://b/w'.*broken.{ending}"):
        build(RESNET, str(path), weights="s3://b/w")


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    torch.save(models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match=r"not the weights of resnet18.*layer1.2"):
        build(RESNET, str(tmp_path / "resnet34.pth"), weights="./resnet34.pth")
