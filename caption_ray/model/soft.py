"""The soft attention decoder.

Shapes as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caption_ray.config import DecoderConfig
from caption_ray.model.attention import (
    AdditiveAttention,
    Attended,
    AttendedOnce,
    AttendedOverTime,
    projection,
)
from caption_ray.model.decoder import (
    PAD,
    DecoderOutput,
    Memory,
    State,
    StepOutput,
)
from caption_ray.model.fused import AttendedFused, fused
from caption_ray.model.recurrence import (
    OverTime,
    Packing,
    RecurrentDecoder,
    lstm,
    narrowed,
    placed,
)

Map: TypeAlias = Callable[[Tensor], Tensor]


class _Maps(NamedTuple):
    """The functions that a step calls: the plain ones, or their variants for a training pass over
    all steps."""

    from_hidden: Map
    from_context: Map
    gated: Callable[[Tensor, Tensor], Tensor]
    cell: Callable[..., State]


class SoftAttentionDecoder(RecurrentDecoder):
    """Soft attention of Show, Attend and Tell (Xu et al., 1502.03044, sections 3.1.2 and 4.2.1).

    All linear maps of the hidden state are one matrix, `from_hidden`: the attention's query, the
    gate and the recurrent part of the cell.
    """

    OUTPUT = ("output_weight", "output_bias")

    def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        hidden, word_dim = config.hidden_dim, config.embedding_dim
        self.project, region_dim = projection(region_dim, config.region_dim)
        self.attention = AdditiveAttention(region_dim, config.attention_dim)
        self.embedding = nn.Embedding(vocab_size, word_dim)
        self.dropout = nn.Dropout(config.dropout)

        states, gates = (2, 4) if config.cell == "lstm" else (1, 3)
        if config.initial_state == "mean":
            self.from_mean = nn.Linear(region_dim, states * hidden)
        self.states = states
        self.from_hidden_dims = [config.attention_dim, int(config.gate), gates * hidden]
        self.from_hidden = nn.Linear(hidden, sum(self.from_hidden_dims))
        self.from_word = nn.Linear(word_dim, gates * hidden)
        self.from_context = nn.Linear(region_dim, gates * hidden, bias=False)

        deep = config.output == "deep"
        mixed_dim = word_dim if deep else hidden
        self.mix = nn.Linear(hidden + region_dim if deep else hidden, mixed_dim)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self._cell: Callable[..., State] = lstm if config.cell == "lstm" else _gru
        self.output_weight: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.output_weight = nn.Parameter(torch.empty(vocab_size, mixed_dim))
            nn.init.normal_(self.output_weight, std=mixed_dim**-0.5)
        # Vectors of about unit length: as tied output weights, too, they keep first logits small.
        nn.init.normal_(self.embedding.weight, std=word_dim**-0.5)

    def prepare(self, regions: Tensor) -> Memory:
        regions = self.project(regions)
        return Memory(regions, self.attention.project(regions))

    def initial_state(self, memory: Memory, k: int) -> State:
        batch, hidden = len(memory.regions), self.config.hidden_dim
        # In float32 under autocast, too: rounding errors add up over a caption.
        if self.config.initial_state == "mean":
            start = self.from_mean(memory.regions.mean(dim=1)).tanh().float()
        else:
            start = memory.regions.new_zeros(batch, self.states * hidden, dtype=torch.float32)
        start = start.view(batch, 1, self.states, hidden).expand(-1, k, -1, -1)
        return tuple(start.unbind(dim=2))

    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        words = self.dropout(self.embedding(tokens))  # (B, K, D)
        attended = AttendedOnce(memory, self.attention.score.weight)
        maps = _Maps(self.from_hidden, self.from_context, _gated, self._cell)
        state, context, attention = self._advance(self.from_word(words), state, attended, maps)
        logits = self.logits(self._mixed(words, state[0], context))
        return StepOutput(logits, state, attention)

    def packed(self, regions: Tensor, tokens: Tensor) -> DecoderOutput:
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        packing = Packing(mask)
        words = self.dropout(self.embedding(packing.rows(tokens)))  # (R, D)
        memory = self.prepare(regions[packing.images])
        state = self.initial_state(memory, tokens.shape[1])
        attended = AttendedOverTime(memory, self.attention.score.weight)
        maps = _Maps(
            OverTime.of(self.from_hidden), OverTime.of(self.from_context), _gated, self._cell
        )
        found = self._unrolled(packing.steps(self.from_word(words)), state, attended, maps)
        hidden, context, attention = map(packing.words, found)
        logits = self.logits(self._mixed(words[packing.real], hidden, context))  # (M, V)
        return DecoderOutput(logits, placed(attention, mask), mask)

    def all_steps(self, words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.prepare(regions)
        state = self.initial_state(memory, words.shape[1])
        attended = AttendedFused(memory, self.attention.score.weight)
        over_time = OverTime.of(self.from_hidden), OverTime.of(self.from_context)
        maps = _Maps(*over_time, fused(_gated), fused(self._cell))
        found = self._unrolled(self.from_word(words).unbind(dim=2), state, attended, maps)
        hidden, context, attention = (torch.stack(steps, dim=2) for steps in found)
        return self._mixed(words, hidden, context), attention

    def _unrolled(
        self,
        words: Sequence[Tensor],
        state: State,
        attended: Attended,
        maps: _Maps,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Results of `_advance` at each step: hidden states, contexts and attention weights."""
        hiddens, contexts, attentions = [], [], []
        for word in words:
            state = narrowed(state, *word.shape[:2])
            state, context, attention = self._advance(word, state, attended, maps)
            hiddens.append(state[0])
            contexts.append(context)
            attentions.append(attention)
        return hiddens, contexts, attentions

    def _advance(
        self, word: Tensor, state: State, attended: Attended, maps: _Maps
    ) -> tuple[State, Tensor, Tensor]:
        """The recurrent part of a step: state, gated context (B, K, E) and attention (B, K, N).

        word (B, K, gates * H): the words' part of the cell's input.
        """
        from_hidden = maps.from_hidden(state[0])
        query, gate, recurrent = torch.split(from_hidden, self.from_hidden_dims, dim=-1)
        context, attention = self.attention(query, attended)
        if self.config.gate:
            context = maps.gated(context, gate)
        state = maps.cell(word, maps.from_context(context), recurrent, state)
        return state, context, attention

    def _mixed(self, words: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The output layer's input, from the previous words (..., D), hidden states (..., H) and
        contexts (..., E)."""
        if self.config.output == "deep":  # equation 7
            mixed: Tensor = words + self.mix(torch.cat([hidden, context], dim=-1))
        else:
            mixed = self.mix(hidden)
        return mixed

    def logits(self, mixed: Tensor) -> Tensor:
        """Logits (..., V) from the results of `_mixed`."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(self.dropout(mixed), weight, self.output_bias)


def _gated(context: Tensor, gate: Tensor) -> Tensor:
    return gate.sigmoid() * context


def _gru(word: Tensor, context: Tensor, recurrent: Tensor, state: State) -> State:
    """A step of a GRU (Cho et al. 2014, reset after the product); gates: reset, update, new."""
    (hidden,) = state
    entering = word + context
    dims = [2 * hidden.shape[-1]]
    (gates_in, new_in), (gates, new) = (x.tensor_split(dims, dim=-1) for x in (entering, recurrent))
    reset, update = (gates_in + gates).sigmoid().chunk(2, dim=-1)
    new = (new_in + reset * new).tanh()
    return (new + update * (hidden - new),)
