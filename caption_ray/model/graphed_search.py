"""Search as CUDA graphs: a GPU gets several steps at once, and Python looks at the results only
after them. captioning/predictor.py uses it on GPUs.

A step of beam search is some hundred small kernels, which a GPU runs in a tenth of the time that
Python needs to launch them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from caption_ray.config import SearchConfig
from caption_ray.model.backtrack import Hypotheses
from caption_ray.model.captioner import Captioner
from caption_ray.model.ensemble import Ensemble
from caption_ray.model.graphs import capture
from caption_ray.model.search import OnStep, begin

STEPS = 4
"""Steps per graph; with more, a batch whose captions have all ended would run on for longer."""


class GraphedSearch:
    """`search.generate` with one caption per image, for batches of one size and a search without
    temperature."""

    def __init__(
        self,
        captioner: Captioner | Ensemble,
        images: Tensor,
        search: SearchConfig,
        autocast: torch.dtype | None,
        pool: Any,
    ) -> None:
        """images: uint8 (B, 3, S, S), like those of later calls. pool: memory to share with other
        searches, of which only one runs at a time (see torch.cuda.graph_pool_handle).

        Must be called outside of autocast: its cache frees weight casts that graphs still read.
        """
        self._images = images.clone()
        context = torch.autocast("cuda", dtype=autocast, enabled=autocast is not None)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream), context:  # warm-up: loads libraries, chooses kernels
                trial = begin(captioner, self._images, search, 1)
                for _ in range(search.max_length):
                    trial.advance()
                trial.found()
            torch.cuda.current_stream().wait_stream(stream)
            self._stages: list[_Stage] = []
            # one autocast for all graphs, as the later ones read weights that the first one casts
            with context:
                for done in range(0, search.max_length, STEPS):
                    self._stages.append(self._capture(captioner, search, done, pool, stream))
            torch.cuda.current_stream().wait_stream(stream)

    def _capture(
        self,
        captioner: Captioner | Ensemble,
        search: SearchConfig,
        done: int,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> _Stage:
        advance, read, decide = (torch.cuda.CUDAGraph() for _ in range(3))
        with capture(advance, pool, stream):
            if done == 0:
                self._search = begin(captioner, self._images, search, 1)
            for _ in range(min(STEPS, search.max_length - done)):
                self._search.advance()
        with capture(read, pool, stream):
            found = self._search.found()
        with capture(decide, pool, stream):
            decided = self._search.decided()
        return _Stage(advance, self._search.over, read, found, decide, decided)

    @torch.inference_mode()
    def __call__(self, images: Tensor, on_step: OnStep | None = None) -> Hypotheses:
        """As `search.generate`; `on_step` is called once per graph."""
        self._images.copy_(images)
        for stage in self._stages:
            stage.advance.replay()
            if on_step is not None:
                stage.decide.replay()
                on_step(*stage.decided)
            if bool(stage.over.all()):
                break
        stage.read.replay()
        return Hypotheses(*(part.clone() for part in stage.found))


class _Stage(NamedTuple):
    """The graphs of up to STEPS steps of a search, and the tensors with their results."""

    advance: torch.cuda.CUDAGraph
    over: Tensor
    read: torch.cuda.CUDAGraph
    found: Hypotheses
    decide: torch.cuda.CUDAGraph
    decided: tuple[Tensor, Tensor]
