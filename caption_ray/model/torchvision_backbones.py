"""torchvision's classifiers as backbones, by torchvision's names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from torch import Tensor, fx, nn

from caption_ray.config import EncoderConfig
from caption_ray.model.backbone import (
    Backbone,
    cannot_download,
    did_you_mean,
    wrong_image_size,
    wrong_weights,
)
from caption_ray.model.weights import own_names

if TYPE_CHECKING:
    # else imported where needed: it takes 1.5 s, which would be most of a small process's start-up
    from torchvision import models


def build(
    config: EncoderConfig, state: dict[str, Tensor] | None, others: Collection[str]
) -> Backbone:
    """The backbone that `config` names, with weights from `state`, or from torchvision by name.

    others: valid names that are not torchvision's, for the error. Raises ValueError as
    `build_encoder` does, and ConnectionError for weights that cannot be downloaded.
    """
    module, dropped = _cut(config, others)
    if state is not None:
        load(module, state, dropped, config)
    elif config.weights != "none":
        weights = find_weights(config)
        load(module, _downloaded(weights, config), dropped, config)
        preset = weights.transforms()
        return Backbone(module, mean=tuple(preset.mean), std=tuple(preset.std))
    return Backbone(module)


def find_weights(config: EncoderConfig) -> models.WeightsEnum:
    """torchvision's entry for the weights that `config` names; ValueError, with the valid names, if
    there is none."""
    from torchvision import models

    valid = models.get_model_weights(config.name).__members__
    if config.weights not in valid:
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: for {config.name} give "
            f"{', '.join(['none', *valid])} or the path of a state dict"
        )
    return valid[config.weights]


# Cutting --------------------------------------------------------------------------------------


def _cut(config: EncoderConfig, others: Collection[str]) -> tuple[nn.Module, set[str]]:
    """A classifier up to its last feature map, and the names of the modules left out.

    The classifier is traced, so that any forward will do; modules keep their names.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if config.name not in names:
        raise ValueError(
            f"--model.encoder.name is {config.name!r}: give {', '.join(map(repr, others))}, one of "
            "torchvision's classification backbones, or timm/ and the name of a model of timm"
            f"{did_you_mean(config.name, [*others, *names])}"
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
        raise wrong_image_size(config, 224, error) from error

    head = [
        name for name, child in classifier.named_children() if any(True for _ in child.parameters())
    ][-1]
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


# Weights --------------------------------------------------------------------------------------


def _downloaded(weights: models.WeightsEnum, config: EncoderConfig) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True)
        return state
    except (OSError, RuntimeError) as error:  # no network, or other bytes than were asked for
        what = f"{weights} from {urlsplit(weights.url).hostname}"
        raise cannot_download(config, what, error) from error


DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load(
    module: nn.Module, state: dict[str, Tensor], dropped: Collection[str], config: EncoderConfig
) -> None:
    """Load a state dict, without what belongs to modules that were left out.

    Positions of vision transformers are interpolated to the image size. Raises ValueError for the
    weights of another model.
    """
    state = {
        DENSENET_KEY.sub(r"\1\2", key): tensor  # norm.1 is norm1 in today's DenseNets
        for key, tensor in own_names(state, module.state_dict()).items()
        if key.partition(".")[0] not in dropped
    }
    try:
        if "encoder.pos_embedding" in state:
            from torchvision.models.vision_transformer import interpolate_embeddings

            patch = state["conv_proj.weight"].shape[-1]
            state = interpolate_embeddings(config.image_size, patch, OrderedDict(state))
        module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise wrong_weights(config, "; ".join(str(error).split("\n\t")[:3])) from error
