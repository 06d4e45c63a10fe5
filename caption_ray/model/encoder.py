"""The encoder: from pixels to a grid of regions.

Shapes: B images, S their height and width in pixels, (h, w) the backbone's feature map,
N regions, E region dim.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from caption_ray.config import EncoderConfig

if TYPE_CHECKING:
    # else imported where needed: it takes 1.5 s, which would be most of a small process's start-up
    from torchvision import models

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A backbone without its classifier, its feature map pooled to a grid of regions.

    Everything before the stage `trainable_from` is frozen: its weights get no gradients, it stays
    in evaluation mode under `train()`, and autograd saves none of its activations, as neither the
    pictures nor the frozen weights require gradients.
    """

    mean: Tensor
    std: Tensor
    pooling: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        config: EncoderConfig,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        channels, height, width = _feature_map(backbone, config)
        rows, columns = (config.grid, config.grid) if config.grid else (height, width)
        self.region_dim = channels
        """E, the dimension of a region."""
        self.grid = (rows, columns)
        """Rows and columns of the regions, in row-major order: N = rows * columns."""

        self.backbone = backbone
        # Saved in checkpoints, so that an encoder built from one normalises pixels as in training.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        # Adaptive average pooling as a matrix: torch's own has no deterministic gradient on GPUs.
        pixels = torch.eye(height * width).view(-1, 1, height, width)
        pooling = F.adaptive_avg_pool2d(pixels, self.grid).flatten(1).T  # (N, h * w)
        same = self.grid == (height, width)
        self.register_buffer("pooling", None if same else pooling, persistent=False)

        self._always_eval = _freeze(backbone, config)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Regions (B, N, E) of uint8 images (B, 3, S, S)."""
        pixels = (images - self.mean) / self.std
        # Convolutions are faster with channels last, and regions come out contiguous.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone(pixels)
        if features.ndim == 3:  # a vision transformer's class token and patches
            features = features[:, 1:]  # (B, h * w, E)
        else:
            features = features.flatten(2).transpose(1, 2)  # (B, h * w, E)
        return features if self.pooling is None else self.pooling.to(features.dtype) @ features

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

    `weights_path` is the local file to read if `is_weights_uri(config.weights)`. Weights that
    torchvision knows by name are downloaded, and cached, by torchvision.

    Raises ValueError, naming the option, its value and valid ones, for an unknown backbone, name of
    weights or stage, for a file whose weights do not fit the backbone, and for an image size that
    the backbone does not accept.
    """
    own = BACKBONES.get(config.name)
    backbone, dropped = (own(config), set()) if own else _torchvision_backbone(config)
    if is_weights_uri(config.weights):
        if weights_path is None:
            raise ValueError(f"--model.encoder.weights is {config.weights!r}: give the local file")
        _load(backbone, _read(weights_path, config), dropped, config)
        return Encoder(backbone, config)
    if config.weights == "none":
        return Encoder(backbone, config)
    weights = _torchvision_weights(config)
    _load(backbone, _downloaded(weights, config), dropped, config)
    preset = weights.transforms()
    return Encoder(backbone, config, preset.mean, preset.std)


def is_weights_uri(weights: str) -> bool:
    """Whether `--model.encoder.weights` names a file, which `build_encoder` needs locally."""
    return "/" in weights or weights.endswith((".pth", ".pt", ".safetensors"))


def check_weights(config: EncoderConfig) -> None:
    """Raise ValueError, naming the valid ones, for a name of weights that torchvision has not for
    the backbone. Whether a file or URI is there, only reading it tells."""
    if config.weights != "none" and not is_weights_uri(config.weights):
        _torchvision_weights(config)


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
"""Backbones that are not torchvision's, by name. Another one needs its function and a line here: a
module that makes a feature map (B, E, h, w) of normalised pixels (B, 3, S, S)."""


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


def _torchvision_backbone(config: EncoderConfig) -> tuple[nn.Module, set[str]]:
    """A torchvision classifier up to its last feature map, and the names of the modules left out.

    The classifier is traced, so that any forward will do; modules keep their names.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if config.name not in names:
        raise ValueError(
            f"--model.encoder.name is {config.name!r}: give {', '.join(map(repr, BACKBONES))} or "
            f"one of torchvision's classification backbones{_did_you_mean(config.name, names)}"
        )
    options: dict[str, Any] = {}
    if config.name.startswith("vit"):
        options = {"image_size": config.image_size}
    elif config.name.startswith("maxvit"):
        options = {"input_size": (config.image_size, config.image_size)}
    elif config.name in ("inception_v3", "googlenet"):
        # Their weights expect pixels from -1 to 1; transform_input converts normalised ones.
        options = {"transform_input": True, "init_weights": True}
    try:
        # In evaluation mode the trace has no auxiliary classifiers.
        classifier = models.get_model(config.name, weights=None, **options).eval()
    except (ValueError, AssertionError) as error:
        raise _wrong_image_size(config, error) from error

    head = [name for name, child in classifier.named_children() if _has_parameters(child)][-1]
    graph = _Tracer(head).trace(classifier)
    features = next(node for node in graph.nodes if node.target == head).args[0]
    while _pools(features, classifier):
        features = features.args[0]
    next(node for node in graph.nodes if node.op == "output").args = (features,)
    backbone = fx.GraphModule(classifier, graph)
    backbone.graph.eliminate_dead_code()
    backbone = fx.GraphModule(backbone, backbone.graph)  # drops modules that the graph lacks
    return backbone, set(dict(classifier.named_children())) - set(dict(backbone.named_children()))


class _Tracer(fx.Tracer):
    """Does not trace into torch's own modules, torchvision's operators or the head."""

    proxy_buffer_attributes = True  # so that buffers keep their names, too

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        operator = module.__module__.startswith("torchvision.ops")
        if name == self.head or (operator and not isinstance(module, nn.Sequential)):
            return True
        return super().is_leaf_module(module, name)


def _pools(node: fx.Node, classifier: nn.Module) -> bool:
    """Whether a node stands between the last feature map and the head."""
    if node.op == "call_module":
        module = classifier.get_submodule(str(node.target))
        return isinstance(module, nn.AdaptiveAvgPool2d | nn.Flatten | nn.Dropout)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    # A vision transformer's class token is taken by getitem.
    return name in ("adaptive_avg_pool2d", "mean", "flatten", "dropout", "getitem")


def _feature_map(backbone: nn.Module, config: EncoderConfig) -> tuple[int, int, int]:
    """Channels, height and width of the backbone's feature map."""
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, config.image_size, config.image_size)
            features = backbone.eval()(image)
    except (RuntimeError, AssertionError) as error:
        raise _wrong_image_size(config, error) from error
    if features.ndim == 3:
        side = math.isqrt(features.shape[1] - 1)
        return features.shape[2], side, side
    _, channels, height, width = features.shape
    return channels, height, width


def _wrong_image_size(config: EncoderConfig, error: Exception) -> ValueError:
    return ValueError(
        f"--model.encoder.image-size is {config.image_size}: {config.name} takes other sizes, "
        f"such as 224 ({error})"
    )


# Freezing -------------------------------------------------------------------------------------


def _freeze(backbone: nn.Module, config: EncoderConfig) -> list[nn.Module]:
    """Freeze all before `trainable_from`; returns the modules that stay in evaluation mode."""
    modules = dict(backbone.named_modules())
    stage = config.trainable_from
    if stage == "all":
        frozen = []
    elif stage == "none":
        frozen = list(modules.values())
    elif stage in modules and _has_parameters(modules[stage]):
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
            if _has_parameters(child)
        }
    return list(stages)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


# Weights --------------------------------------------------------------------------------------


def _torchvision_weights(config: EncoderConfig) -> models.WeightsEnum:
    from torchvision import models

    valid = {} if config.name in BACKBONES else models.get_model_weights(config.name).__members__
    if config.weights not in valid:
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: for {config.name} give "
            f"{', '.join(['none', *valid])} or the path of a state dict"
        )
    return valid[config.weights]


def _downloaded(weights: models.WeightsEnum, config: EncoderConfig) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True)
        return state
    except (OSError, RuntimeError) as error:  # no network, or other bytes than were asked for
        host = urlsplit(weights.url).hostname
        raise ConnectionError(
            f"--model.encoder.weights is {config.weights!r}: cannot download {weights} from {host} "
            f"({error}); give the path or URI of a state dict, or none"
        ) from error


def _read(path: str, config: EncoderConfig) -> dict[str, Tensor]:
    """A state dict from a .safetensors file or one that torch saved; no code in it is run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): tensor.detach() for key, tensor in state.items()}
    except Exception as error:  # its type depends on what the file really is
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: no state dict in {path} ({error})"
        ) from error


DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def _load(
    backbone: nn.Module, state: dict[str, Tensor], dropped: Collection[str], config: EncoderConfig
) -> None:
    """Load a classifier's weights, without those of the modules that were left out."""
    state = {
        DENSENET_KEY.sub(r"\1\2", key): tensor  # norm.1 is norm1 in today's DenseNets
        for key, tensor in state.items()
        if key.partition(".")[0] not in dropped
    }
    try:
        if "encoder.pos_embedding" in state:
            from torchvision.models.vision_transformer import interpolate_embeddings

            patch = state["conv_proj.weight"].shape[-1]
            state = interpolate_embeddings(config.image_size, patch, OrderedDict(state))
        backbone.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = "; ".join(str(error).split("\n\t")[:3])
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: these are not the weights of "
            f"{config.name}: {reason[:300]}"
        ) from error


def _did_you_mean(name: str, valid: Collection[str]) -> str:
    close = difflib.get_close_matches(name, [*BACKBONES, *valid], n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ", such as resnet50"
