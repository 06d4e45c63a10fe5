"""Files of weights: state dicts that others have saved, in the forms they come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from caption_ray.config import EncoderConfig

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""Under which of these training scripts keep the weights in a checkpoint; averaged ones first."""

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "visual.", "trunk.")
"""What wrappers put before a backbone's own names: DDP, torch.compile, Lightning and others, and
CLIP's two towers, of which only the visual one is wanted."""


def is_weights_uri(weights: str) -> bool:
    """Whether `--model.encoder.weights` names a file, which `build_encoder` needs locally."""
    return "/" in weights or weights.endswith((".pth", ".pt", ".bin", ".safetensors"))


def read(path: str, config: EncoderConfig) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in one that torch saved; no code in it is run.

    Raises ValueError, naming the option, for a file that holds none.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return dict(load_file(path))
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return unwrapped(saved)
    except Exception as error:  # its type depends on what the file really is
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--model.encoder.weights is {config.weights!r}: no state dict in {path} "
            f"({reason[:300]})"
        ) from error


def unwrapped(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the one that a training script's checkpoint holds.

    Raises ValueError if there is none.
    """
    for wrapper in WRAPPERS:
        inner = saved.get(wrapper)
        if isinstance(inner, Mapping) and inner:
            return unwrapped(inner)
    state = {str(key): tensor.detach() for key, tensor in saved.items() if torch.is_tensor(tensor)}
    if not state:
        raise ValueError(f"it holds {', '.join(map(str, list(saved)[:8])) or 'nothing'}")
    return state


def own_names(state: Mapping[str, Tensor], own: Iterable[str] = ()) -> dict[str, Tensor]:
    """The state dict without prefixes of wrappers, and without what stands beside the backbone.

    own: names of the backbone's parameters, if they are known: what they begin with is no wrapper.
    """
    state, own = dict(state), tuple(own)
    while True:
        for prefix in PREFIXES:
            inner = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
            if inner and not any(name.startswith(prefix) for name in own):
                state = inner
                break
        else:
            return state
