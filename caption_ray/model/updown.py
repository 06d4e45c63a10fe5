"""The top-down decoder: one LSTM decides where to look, a second one what to say.

Shapes as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from caption_ray.config import DecoderConfig
from caption_ray.model.attention import (
    AdditiveAttention,
    Attended,
    AttendedOnce,
    AttendedOverTime,
    projection,
)
from caption_ray.model.decoder import PAD, DecoderOutput, Memory, State, StepOutput
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

    from_looking: Map
    from_speaking: Map
    from_attention: Map
    from_context: Map
    cell: Callable[..., State]


class TopDownDecoder(RecurrentDecoder):
    """Top-down attention with two LSTMs (Anderson et al., 1707.07998, section 3.2).

    The attention LSTM reads the word, the mean region and what the language LSTM last said; its
    state asks where to look. The language LSTM reads what was found there, and its state gives the
    next word. The state of a sequence is (h1, c1, h2, c2) of the paper.

    All linear maps of one hidden state are one matrix: `from_speaking` holds those of h2 into
    both LSTMs, `from_attention` those of the new h1 into the attention and the language LSTM.
    """

    OUTPUT = ("output.weight", "output.bias")

    def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
        super().__init__()
        hidden, word_dim = config.hidden_dim, config.embedding_dim
        self.hidden_dim, self.attention_dim = hidden, config.attention_dim
        self.project, region_dim = projection(region_dim, config.region_dim)
        self.attention = AdditiveAttention(region_dim, config.attention_dim)
        self.embedding = nn.Embedding(vocab_size, word_dim)
        self.dropout = nn.Dropout(config.dropout)
        # the attention LSTM's input, equation 2, and its recurrent part
        self.from_word = nn.Linear(word_dim, 4 * hidden)
        self.from_mean = nn.Linear(region_dim, 4 * hidden, bias=False)
        self.from_looking = nn.Linear(hidden, 4 * hidden, bias=False)
        self.from_speaking = nn.Linear(hidden, 8 * hidden, bias=False)
        # the attention's query, equation 3, and the language LSTM's input, equation 5
        self.from_attention = nn.Linear(hidden, config.attention_dim + 4 * hidden)
        self.from_context = nn.Linear(region_dim, 4 * hidden, bias=False)
        self.output = nn.Linear(hidden, vocab_size)
        nn.init.normal_(self.embedding.weight, std=word_dim**-0.5)

    def prepare(self, regions: Tensor) -> Memory:
        """The summary is the mean region's part of the attention LSTM's input, (B, 4 H)."""
        regions = self.project(regions)
        summary = self.from_mean(regions.mean(dim=1))
        return Memory(regions, self.attention.project(regions), summary)

    def initial_state(self, memory: Memory, k: int) -> State:
        start = memory.regions.new_zeros(len(memory.regions), k, self.hidden_dim)
        start = start.float()  # under autocast, too: rounding errors add up over a caption
        return start, start, start, start

    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        words = self.dropout(self.embedding(tokens))  # (B, K, D)
        attended = AttendedOnce(memory, self.attention.score.weight)
        maps = _Maps(
            self.from_looking, self.from_speaking, self.from_attention, self.from_context, lstm
        )
        entering = self._entering(self.from_word(words), memory)
        state, attention = self._advance(entering, state, attended, maps)
        return StepOutput(self.logits(state[2]), state, attention)

    def packed(self, regions: Tensor, tokens: Tensor) -> DecoderOutput:
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        packing = Packing(mask)
        memory = self.prepare(regions[packing.images])
        words = self.dropout(self.embedding(packing.rows(tokens)))  # (R, D)
        entering = [self._entering(word, memory) for word in packing.steps(self.from_word(words))]
        state = self.initial_state(memory, tokens.shape[1])
        attended = AttendedOverTime(memory, self.attention.score.weight)
        found = self._unrolled(entering, state, attended, self._over_time(lstm))
        hidden, attention = map(packing.words, found)
        return DecoderOutput(self.logits(hidden), placed(attention, mask), mask)

    def all_steps(self, words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.prepare(regions)
        state = self.initial_state(memory, words.shape[1])
        attended = AttendedFused(memory, self.attention.score.weight)
        entering = [self._entering(word, memory) for word in self.from_word(words).unbind(dim=2)]
        found = self._unrolled(entering, state, attended, self._over_time(fused(lstm)))
        hidden, attention = (torch.stack(steps, dim=2) for steps in found)
        return hidden, attention

    def logits(self, mixed: Tensor) -> Tensor:
        """Logits (..., V) of the language LSTM's hidden states (..., H)."""
        logits: Tensor = self.output(self.dropout(mixed))
        return logits

    def _over_time(self, cell: Callable[..., State]) -> _Maps:
        return _Maps(
            OverTime.of(self.from_looking),
            OverTime.of(self.from_speaking),
            OverTime.of(self.from_attention),
            OverTime.of(self.from_context),
            cell,
        )

    def _entering(self, word: Tensor, memory: Memory) -> Tensor:
        """The word's part of the attention LSTM's input (b, k, 4 H), with the mean region's."""
        assert memory.summary is not None
        return word + memory.summary[: len(word), None]

    def _unrolled(
        self, entering: Sequence[Tensor], state: State, attended: Attended, maps: _Maps
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The language LSTM's hidden states, and the attention weights, at each step."""
        hiddens, attentions = [], []
        for one in entering:
            state = narrowed(state, *one.shape[:2])
            state, attention = self._advance(one, state, attended, maps)
            hiddens.append(state[2])
            attentions.append(attention)
        return hiddens, attentions

    def _advance(
        self, entering: Tensor, state: State, attended: Attended, maps: _Maps
    ) -> tuple[State, Tensor]:
        """A step of both LSTMs: the state, and the attention weights (B, K, N).

        entering (B, K, 4 H): as `_entering` gives it.
        """
        looking, looking_cell, speaking, speaking_cell = state
        said, own = maps.from_speaking(speaking).chunk(2, dim=-1)
        recurrent = maps.from_looking(looking)
        looking, looking_cell = maps.cell(entering, said, recurrent, (looking, looking_cell))
        dims = [self.attention_dim, 4 * self.hidden_dim]
        query, seen = torch.split(maps.from_attention(looking), dims, dim=-1)
        context, attention = self.attention(query, attended)
        found = maps.from_context(context)
        speaking, speaking_cell = maps.cell(found, seen, own, (speaking, speaking_cell))
        return (looking, looking_cell, speaking, speaking_cell), attention
