"""Functions whose kernels are launched all at once: CUDA graphs, forward and backward.

A recurrence is hundreds of small kernels, each of which a GPU runs faster than Python launches the
next. The recurrent decoders use this in training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, ...]]

WARM_UPS = 3
"""Warm-up runs before a capture, in which kernels are compiled and libraries set up."""

GRAPHED_STEPS = 4
"""Recurrences are padded to a multiple of this many steps, as each length needs its own graph."""


class Graphed:
    """A function of tensors that is captured once for each set of shapes and dtypes, then replayed.

    For the same shapes it must launch the same kernels, whatever the tensors' values. All captures
    share their memory, so each backward pass must come before the next forward pass; else it raises
    RuntimeError.
    """

    def __init__(self, function: Function, module: nn.Module, without: Collection[str]) -> None:
        """function: maps tensors to a tuple of tensors, with the parameters of `module` except
        those named in `without`. The parameters must keep their place in memory."""
        self._function, self._module = function, module
        self._names = [name for name, _ in module.named_parameters() if name not in without]
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool = _Pool()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs; the next call overwrites them."""
        wants = torch.is_grad_enabled()
        weights = [self._module.get_parameter(name) for name in self._names]
        form = (
            tuple((x.shape, x.dtype, wants and x.requires_grad) for x in inputs),
            tuple(wants and weight.requires_grad for weight in weights),
            torch.is_autocast_enabled("cuda"),
        )
        if form not in self._captured:
            with _aliases(self._module, self._names) as leaves:
                self._captured[form] = _Captured(self._function, inputs, leaves, self._pool)
        outputs: tuple[Tensor, ...] = _Replay.apply(self._captured[form], *inputs, *weights)
        return outputs


@contextmanager
def _aliases(module: nn.Module, names: Sequence[str]) -> Generator[list[nn.Parameter], None, None]:
    """Replaces the module's parameters, for the time being, by others that share their memory.

    Autograd and DDP remember on which stream they last used a parameter, and would make a capture
    wait for that stream, which is not allowed.
    """
    own = {name: module.get_parameter(name) for name in names}
    aliases = {
        name: nn.Parameter(weight.detach(), weight.requires_grad) for name, weight in own.items()
    }

    def place(weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, weight)  # which recurrent modules track

    place(aliases)
    try:
        yield list(aliases.values())
    finally:
        place(own)


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream
) -> Generator[None, None, None]:
    """Capture the kernels launched within, with memory of `pool`; other threads may use the GPU.

    As torch.cuda.graph, without its garbage collection, which takes longer than the capture.
    """
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


class _Pool:
    """The memory that captures share, and how many forward passes have overwritten it."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.turn = 0


class _Captured:
    """A function's graphs for inputs of one form, and the tensors that these read and write."""

    def __init__(
        self, function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor], pool: _Pool
    ) -> None:
        wants = torch.is_grad_enabled()
        self.pool = pool
        self.inputs = [x.detach().clone().requires_grad_(wants and x.requires_grad) for x in inputs]
        leaves = [x for x in (*self.inputs, *weights) if x.requires_grad] if wants else []

        # weight casts in autocast's cache would not follow the weights
        uncached = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )

        def run() -> None:
            with uncached:
                outputs = function(*self.inputs)
            if leaves:
                _gradients(outputs, leaves, [torch.zeros_like(output) for output in outputs])

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capture(self.forward, pool.handle, stream), uncached:
            self.outputs = function(*self.inputs)
        self.arriving = [torch.zeros_like(output) for output in self.outputs] if leaves else []
        leaving: tuple[Tensor | None, ...] = ()
        if leaves:
            with capture(self.backward, pool.handle, stream):
                leaving = _gradients(self.outputs, leaves, self.arriving)
        torch.cuda.current_stream().wait_stream(stream)
        self.outputs = tuple(output.detach() for output in self.outputs)  # frees autograd's graph
        found = iter(leaving)
        self.leaving = [
            next(found) if wants and x.requires_grad else None for x in (*self.inputs, *weights)
        ]


def _gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], arriving: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    pairs = [(o, a) for o, a in zip(outputs, arriving, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], leaves, [a for _, a in pairs], allow_unused=True
    )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *tensors: Tensor) -> tuple[Tensor, ...]:
        for static, given in zip(captured.inputs, tensors, strict=False):
            static.copy_(given)
        captured.forward.replay()
        captured.pool.turn += 1
        ctx.captured, ctx.turn = captured, captured.pool.turn
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in captured.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        captured: _Captured = ctx.captured
        if ctx.turn != captured.pool.turn:
            raise RuntimeError(
                "the backward pass of a graphed function came after its next forward pass, which "
                "has overwritten what it needs: alternate the two"
            )
        for static, given in zip(captured.arriving, gradients, strict=True):
            if given is None:
                static.zero_()
            else:
                static.copy_(given)
        captured.backward.replay()
        # copies, as optimizers and further backward passes keep what they get
        found = [gradient for gradient in captured.leaving if gradient is not None]
        copies = iter(torch._foreach_mul(found, 1.0) if found else ())
        return None, *(None if one is None else next(copies) for one in captured.leaving)
