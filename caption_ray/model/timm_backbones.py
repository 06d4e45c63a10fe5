"""timm's models as backbones: `--model.encoder.name timm/NAME[.TAG]`.

A model is asked for its last feature map before pooling and classifier, whatever its layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from caption_ray.config import EncoderConfig
from caption_ray.model.backbone import (
    Backbone,
    cannot_download,
    did_you_mean,
    grid_of,
    wrong_image_size,
    wrong_weights,
)
from caption_ray.model.weights import own_names

# timm itself is imported where it is needed: it takes two seconds

PREFIX = "timm/"


def is_name(name: str) -> bool:
    """Whether `--model.encoder.name` names a model of timm."""
    return name.startswith(PREFIX)


def build(config: EncoderConfig, state: dict[str, Tensor] | None) -> Backbone:
    """The backbone that `config` names, with weights from `state`, or from the Hub by their tag.

    Raises ValueError as `build_encoder` does, and ConnectionError for weights that cannot be
    downloaded.
    """
    name = check_name(config)
    about = _about(name)
    with _missing_keys() as missing:
        if state is not None:
            module = _loaded(name, config, state)
        elif config.weights == "none":
            module = _created(name, config)
        else:
            check_weights(config)
            module = _downloaded(name, config)
    size = about.input_size[-1]
    return Backbone(module, TimmFeatures(), about.mean, about.std, size, frozenset(missing))


def interpolation(config: EncoderConfig) -> Literal["bilinear", "bicubic"]:
    """How pictures were resized when the model's weights were made."""
    return "bilinear" if _about(check_name(config)).interpolation == "bilinear" else "bicubic"


def check_name(config: EncoderConfig) -> str:
    """timm's name for the model, with the tag of its weights if one was given, as part of the name
    or as `weights`. Raises ValueError, with names that are close, for one that timm has not."""
    import timm

    name = config.name.removeprefix(PREFIX)
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        raise ValueError(
            f"--model.encoder.name is {config.name!r}: timm {timm.__version__} has no such model"
            + did_you_mean(config.name, [PREFIX + known for known in timm.list_models()], PREFIX)
        )
    if not tag and config.weights in _tags(model):
        name = f"{model}.{config.weights}"
    if "." in name and name not in timm.list_pretrained(f"{model}.*"):
        raise ValueError(
            f"--model.encoder.name is {config.name!r}: give timm/{model}, or one of its weights: "
            + ", ".join(f"{PREFIX}{model}.{tag}" for tag in _tags(model))
        )
    return name


def check_weights(config: EncoderConfig) -> None:
    """Raise ValueError, naming the valid ones, for weights that timm does not publish."""
    name = check_name(config)
    model, _, tag = name.partition(".")
    tags = _tags(model)
    if config.weights not in ("DEFAULT", tag) or not (tag or tags):
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: for {config.name} give "
            + ", ".join(["none", *(["DEFAULT"] if tags else []), *([] if tag else tags)])
            + " or the path of a state dict"
        )


def layer_decay_groups(
    module: nn.Module, weight_decay: float, decay: float
) -> list[dict[str, Any]]:
    """Parameter groups whose `lr_scale` falls by the factor `decay` from each layer of the backbone
    to the one before, as timm groups its layers; weight decay is on matrices only, and not where
    the model wants none (BEiT: Bao et al., 2106.08254, appendix)."""
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    spared = getattr(module, "no_weight_decay", lambda: ())()
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        module, weight_decay, no_weight_decay_list=spared, layer_decay=decay
    )
    return groups


class TimmFeatures:
    """`Features` of a timm model: (B, E, h, w), from NCHW, NHWC or tokens with a prefix.

    They are what `forward_features` gives, which the classifier would pool. A few models give
    several maps there, or a class token alone; of these it is the last of `forward_intermediates`.
    Which it is shows at the first call, and is kept.
    """

    def __init__(self) -> None:
        self._uses_intermediates: bool | None = None

    def __call__(self, module: nn.Module, pixels: Tensor) -> Tensor:
        if self._uses_intermediates is None:
            try:
                features = _laid_out(module, module.forward_features(pixels))  # type: ignore[operator]
                self._uses_intermediates = False
                return features
            except _NoMap:
                self._uses_intermediates = True
        if self._uses_intermediates:
            last: Tensor = module.forward_intermediates(  # type: ignore[operator]
                pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]
            return last
        return _laid_out(module, module.forward_features(pixels))  # type: ignore[operator]


class _NoMap(Exception):
    """What `forward_features` gives is not one feature map."""


def _laid_out(module: nn.Module, features: Any) -> Tensor:
    """One feature map (B, E, h, w) in any layout, channels second. Raises _NoMap for others."""
    channels = module.num_features
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise _NoMap
    if features.ndim == 4:
        if features.shape[1] == channels:
            return features
        return features.permute(0, 3, 1, 2)
    prefix = getattr(module, "num_prefix_tokens", 0)
    if features.shape[2] != channels or features.shape[1] <= prefix + 1:
        raise _NoMap
    try:
        return grid_of(features, int(prefix))
    except ValueError as error:
        raise _NoMap from error


# Making ---------------------------------------------------------------------------------------


def _about(name: str) -> Any:
    """timm's `PretrainedCfg` of the model's weights: sizes, mean, deviation, interpolation."""
    import timm

    return timm.get_pretrained_cfg(name)


def _tags(model: str) -> list[str]:
    """Tags of the weights that timm publishes for a model."""
    import timm

    names: list[str] = timm.list_pretrained(f"{model}.*")
    return [name.partition(".")[2] for name in names]


def _created(name: str, config: EncoderConfig, **options: Any) -> nn.Module:
    """The model without classifier, for the configured image size.

    Raises ValueError for sizes and options that it does not take.
    """
    import timm

    about = _about(name)
    if about.fixed_input_size:
        options["img_size"] = config.image_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        module: nn.Module = timm.create_model(name, num_classes=0, **options)
        return module
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise ValueError(
                f"--model.encoder.drop-path is {config.drop_path}: {config.name} has no such "
                "paths; give 0"
            ) from error
        raise
    except (AssertionError, ValueError) as error:
        raise wrong_image_size(config, about.input_size[-1], error) from error


def _loaded(name: str, config: EncoderConfig, state: dict[str, Tensor]) -> nn.Module:
    """The model with a state dict, in timm's form or one that timm converts; positions are
    interpolated to the image size."""
    overlay = {"state_dict": own_names(state), "source": None}
    try:
        return _created(name, config, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:  # other shapes or names than the model's
        raise wrong_weights(config, "; ".join(str(error).split("\n\t")[:3])) from error


def _downloaded(name: str, config: EncoderConfig) -> nn.Module:
    """The model with weights that timm publishes, from the Hub's cache or the Hub."""
    about = _about(name)
    where = about.hf_hub_id or about.url
    try:
        if about.hf_hub_id and not about.hf_hub_filename:
            _fetch(about.hf_hub_id)
        return _created(name, config, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # its type depends on the library that downloads
        raise cannot_download(config, f"timm/{name} ({where})", error) from error


def _fetch(repository: str) -> None:
    """Have a repository's weights in the Hub's cache.

    timm would do so itself, but where the Hub cannot be reached it asks for a second file, too, and
    each takes half a minute of the client's retries, of which each is told.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        hf_hub_download(repository, "model.safetensors")
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        pass  # older repositories have another format, which timm knows
    finally:
        logging.set_verbosity(told)


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Names of what `load_state_dict` did not find meanwhile: where timm loads weights without
    their classifier, it tells its log only what else was missing."""
    missing: list[str] = []
    plain = nn.Module.load_state_dict

    def noting(module: nn.Module, *args: Any, **options: Any) -> Any:
        result = plain(module, *args, **options)
        missing.extend(result.missing_keys)
        return result

    setattr(nn.Module, "load_state_dict", noting)  # noqa: B010
    try:
        yield missing
    finally:
        setattr(nn.Module, "load_state_dict", plain)  # noqa: B010
