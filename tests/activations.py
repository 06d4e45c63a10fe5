"""What autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def kept_by(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a forward pass, and how many elements autograd keeps for its backward pass."""
    elements = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal elements
        elements += tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, elements
