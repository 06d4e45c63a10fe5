"""The encoder: from pixels to a grid of regions.

Shapes: B images, S their height and width in pixels, (h, w) the backbone's feature map,
N regions, E region dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from caption_ray.config import EncoderConfig
from caption_ray.model import timm_backbones, torchvision_backbones, weights
from caption_ray.model.backbone import Backbone, wrong_image_size, wrong_weights
from caption_ray.model.weights import is_weights_uri


class Encoder(nn.Module):
    """A backbone without its classifier, its feature map pooled to a grid of regions.

    Everything before the stage `trainable_from` is frozen: its weights get no gradients, it stays
    in evaluation mode under `train()`, and autograd saves none of its activations, as neither the
    pictures nor the frozen weights require gradients.
    """

    mean: Tensor
    std: Tensor
    pooling: Tensor | None

    def __init__(self, backbone: Backbone, config: EncoderConfig) -> None:
        super().__init__()
        channels, height, width = _try_out(backbone, config)
        rows, columns = (config.grid, config.grid) if config.grid else (height, width)
        self.region_dim = channels
        """E, the dimension of a region."""
        self.grid = (rows, columns)
        """Rows and columns of the regions, in row-major order: N = rows * columns."""

        self.name = config.name
        self.backbone = backbone.module
        self._features = backbone.features
        # Saved in checkpoints, so that an encoder built from one normalises pixels as in training.
        self.register_buffer("mean", 255 * torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(backbone.std).view(3, 1, 1))
        # Adaptive average pooling as a matrix: torch's own has no deterministic gradient on GPUs.
        pixels = torch.eye(height * width).view(-1, 1, height, width)
        pooling = F.adaptive_avg_pool2d(pixels, self.grid).flatten(1).T  # (N, h * w)
        same = self.grid == (height, width)
        self.register_buffer("pooling", None if same else pooling, persistent=False)

        # With channels last, the gradient of such a convolution writes beyond its memory on CPUs
        # (torch 2.14 with oneDNN), and the process dies. FastViT, RepVGG and their like have one.
        self._strides_over_pixels = any(
            isinstance(module, nn.Conv2d)
            and (module.in_channels, module.kernel_size) == (3, (1, 1))
            and module.stride != (1, 1)
            for module in self.backbone.modules()
        )
        self._always_eval = _freeze(self.backbone, config)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Regions (B, N, E) of uint8 images (B, 3, S, S)."""
        pixels = (images - self.mean) / self.std
        if pixels.is_cuda or not self._strides_over_pixels:
            # Convolutions are faster with channels last, and regions come out contiguous.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self._features(self.backbone, pixels)
        features = features.flatten(2).transpose(1, 2)  # (B, h * w, E)
        return features if self.pooling is None else self.pooling.to(features.dtype) @ features

    def checkpoint_gradients(self) -> None:
        """From now on compute activations anew in the backward pass instead of keeping them.

        Raises ValueError for a backbone that has no means to.
        """
        try:
            self.backbone.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"--train.gradient-checkpointing is True: {self.name} cannot do so; give False"
            ) from error

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for module in self._always_eval:
            module.training = False
        return self


def to_tensor(images: NDArray[Any] | Tensor) -> Tensor:
    """Images as an encoder takes them: uint8 (B, S, S, 3) -> (B, 3, S, S), a view as for
    `as_tensor`. In memory the channels stay last, which convolutions compute fastest."""
    return as_tensor(images).permute(0, 3, 1, 2)


def to_inputs(inputs: NDArray[Any] | Tensor) -> Tensor:
    """A captioner's input: pictures as by `to_tensor`; regions (B, N, E) unchanged."""
    return to_tensor(inputs) if inputs.ndim == 4 else as_tensor(inputs)


def as_tensor(array: NDArray[Any] | Tensor) -> Tensor:
    """The array as a tensor: a view, or a copy if it is read-only, as arrays from Ray are."""
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def build_encoder(config: EncoderConfig, weights_path: str | None) -> Encoder:
    """The encoder that `config` asks for, with its weights.

    `weights_path` is the local file to read if `is_weights_uri(config.weights)`. Weights by name
    are downloaded, and cached, by torchvision or the Hub's client.

    Raises ValueError, naming the option, its value and valid ones, for an unknown backbone, name of
    weights or stage, for a file whose weights do not fit the backbone, and for an image size that
    the backbone does not accept; ConnectionError for weights that cannot be downloaded.
    """
    state = None
    if is_weights_uri(config.weights):
        if weights_path is None:
            raise ValueError(f"--model.encoder.weights is {config.weights!r}: give the local file")
        state = weights.read(weights_path, config)
    return Encoder(build_backbone(config, state), config)


def build_backbone(config: EncoderConfig, state: dict[str, Tensor] | None) -> Backbone:
    """The backbone that `config` names, with the weights of a state dict if one is given. Raises as
    `build_encoder` does."""
    if config.name in BACKBONES:
        if state is None:
            check_weights(config)
        return _own_backbone(config, state)
    if timm_backbones.is_name(config.name):
        return timm_backbones.build(config, state)
    return torchvision_backbones.build(config, state, BACKBONES)


def check_weights(config: EncoderConfig) -> None:
    """Raise ValueError, naming the valid ones, for a name of weights that nobody publishes for the
    backbone. Whether a file or URI is there, only reading it tells."""
    if config.weights == "none" or is_weights_uri(config.weights):
        return
    if config.name in BACKBONES:
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: for {config.name} give none or the "
            "path of a state dict"
        )
    if timm_backbones.is_name(config.name):
        timm_backbones.check_weights(config)
    else:
        torchvision_backbones.find_weights(config)


def settled_interpolation(config: EncoderConfig) -> Literal["auto", "bilinear", "bicubic"]:
    """How the encoder's pictures are to be resized: as was asked for, else as for the weights of
    timm's models; `auto`, which is bilinear, for others. Raises ValueError for an unknown model."""
    if config.interpolation == "auto" and timm_backbones.is_name(config.name):
        return timm_backbones.interpolation(config)
    return config.interpolation


# Backbones ------------------------------------------------------------------------------------


def small_backbone() -> nn.Module:
    """A compact CNN of stride 16, to be trained from scratch on drawn scenes.

    At 96 pixels it gives 6 x 6 regions, each about as large as a small figure; stride 8 would make
    the decoder's attention four times as slow. Coordinates are appended last: placed before the
    convolutions, they left a third of the captions with a wrong position or relation. Batch norm
    takes its statistics from each worker's own share of a batch.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(pairwise((3, 32, 64, 128, 128)), start=1):
        stages[f"stage{number}"] = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )
    return nn.Sequential(stages | {"coordinates": _Coordinates()})


BACKBONES: dict[str, Callable[[EncoderConfig], nn.Module]] = {
    "small": lambda config: small_backbone(),
}
"""Backbones of our own, by name. Another one needs its function and a line here: a module that
makes a feature map (B, E, h, w) of normalised pixels (B, 3, S, S)."""


def _own_backbone(config: EncoderConfig, state: dict[str, Tensor] | None) -> Backbone:
    module = BACKBONES[config.name](config)
    if state is not None:
        try:
            module.load_state_dict(weights.own_names(state, module.state_dict()))
        except RuntimeError as error:
            raise wrong_weights(config, "; ".join(str(error).split("\n\t")[:3])) from error
    return Backbone(module)


class _Coordinates(nn.Module):
    """Appends column and row, from -1 to 1, as channels: CoordConv (Liu et al., 1807.03247).

    Convolutions alone cannot tell left from right.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C + 2, h, w)
        batch, _, height, width = x.shape
        columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
        rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, h, w)
        return torch.cat([x, places.expand(batch, -1, -1, -1)], dim=1)


def _try_out(backbone: Backbone, config: EncoderConfig) -> tuple[int, int, int]:
    """Channels, height and width of the feature map of one picture.

    Modules that it does not depend on, such as a classifier's pooling, are dropped; parameters that
    it does not depend on within others are frozen, since DDP would wait for their gradients.
    """
    module = backbone.module.eval()
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    try:
        # the graph is wanted, but not the tensors that a backward pass would need
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda kept: kept):
            features = backbone.features(module, pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise wrong_image_size(config, backbone.native_size, error) from error
    used = _leaves(features.grad_fn)
    _require_weights(backbone, used, config)
    for name, child in list(module.named_children()):
        own = {id(parameter) for parameter in child.parameters()}
        if own and not own & used and not isinstance(child, nn.ModuleList):
            setattr(module, name, nn.Identity())
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in used)
    _, channels, height, width = features.shape
    return channels, height, width


def _require_weights(backbone: Backbone, used: set[int], config: EncoderConfig) -> None:
    """Raise ValueError if the weights lacked something that the feature map depends on: parameters
    with these ids, and the buffers beside them."""
    parameters = dict(backbone.module.named_parameters())
    needed = {name for name, parameter in parameters.items() if id(parameter) in used}
    beside = {name.rpartition(".")[0] for name in needed}
    lacking = sorted(
        name
        for name in backbone.missing
        if name in needed or (name not in parameters and name.rpartition(".")[0] in beside)
    )
    if lacking:
        raise wrong_weights(config, f"they lack {', '.join(lacking[:3])} ({len(lacking)} in all)")


def _leaves(result: Node | None) -> set[int]:
    """The ids of the parameters that a result depends on, by the node of autograd's graph."""
    seen: set[Node] = set()
    found: set[int] = set()
    waiting = [] if result is None else [result]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


# Freezing -------------------------------------------------------------------------------------


def _freeze(backbone: nn.Module, config: EncoderConfig) -> list[nn.Module]:
    """Freeze all before `trainable_from`; returns the modules that stay in evaluation mode."""
    modules = dict(backbone.named_modules())
    stage = config.trainable_from
    if stage == "all":
        frozen = []
    elif stage == "none":
        frozen = list(modules.values())
    elif stage in modules and _can_train(modules[stage]):
        frozen = list(modules.values())[: list(modules).index(stage)]
    else:
        raise ValueError(
            f"--model.encoder.trainable-from is {stage!r}: for {config.name} give none, all or a "
            f"stage: {', '.join(_stages(backbone))}"
        )
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    if config.batch_norm == "frozen":
        frozen += [module for module in modules.values() if isinstance(module, _BatchNorm)]
    return frozen


def _stages(backbone: nn.Module) -> list[str]:
    """Names of the coarsest modules of a backbone, at least four, to choose from."""
    stages = {"": backbone}
    while len(stages) < 4:
        stages = {
            f"{name}.{part}".strip("."): child
            for name, stage in stages.items()
            for part, child in (list(stage.named_children()) or [("", stage)])
            if _can_train(child)
        }
    return list(stages)


def _can_train(module: nn.Module) -> bool:
    """Whether the feature map depends on a parameter of the module."""
    return any(parameter.requires_grad for parameter in module.parameters())
