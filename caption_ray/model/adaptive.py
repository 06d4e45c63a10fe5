"""The adaptive decoder: for each word it weighs the picture against its own memory of the caption.

Shapes as in decoder.py, plus R rows of a packing (see recurrence.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caption_ray.config import DecoderConfig
from caption_ray.model.attention import Attended, AttendedOnce, AttendedOverTime
from caption_ray.model.decoder import (
    PAD,
    DecoderOutput,
    Memory,
    State,
    StepOutput,
)
from caption_ray.model.fused import AttendedFused
from caption_ray.model.recurrence import (
    AttendedByStep,
    OverTime,
    Packing,
    RecurrentDecoder,
    narrowed,
    placed,
)


class AdaptiveAttentionDecoder(RecurrentDecoder):
    """Spatial attention with a visual sentinel (Lu et al., 1612.01887, sections 2.2 and 2.3).

    The LSTM reads words and a summary of the picture, but not the context vector: so in training,
    attention and its linear maps run on all words at once.
    """

    OUTPUT = ("output.weight", "output.bias")

    def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
        super().__init__()
        hidden, word_dim = config.hidden_dim, config.embedding_dim
        self.hidden_dim = hidden
        self.attention_dim = config.attention_dim
        self.project = nn.Sequential(nn.Linear(region_dim, hidden), nn.ReLU())  # v_i
        self.summarize = nn.Sequential(nn.Linear(region_dim, word_dim), nn.ReLU())  # v_g
        self.embedding = nn.Embedding(vocab_size, word_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(2 * word_dim, hidden, batch_first=True)
        self.sentinel_gate = nn.Linear(2 * word_dim + hidden, hidden)
        self.key = nn.Linear(hidden, config.attention_dim, bias=False)  # W_v
        self.query = nn.Linear(hidden, config.attention_dim)  # W_g
        self.sentinel_key = nn.Linear(hidden, config.attention_dim, bias=False)  # W_s
        self.score = nn.Linear(config.attention_dim, 1, bias=False)  # w_h
        self.output = nn.Linear(hidden, vocab_size)
        nn.init.normal_(self.embedding.weight, std=word_dim**-0.5)

    def prepare(self, regions: Tensor) -> Memory:
        """Projected regions (B, N, H), their keys (B, N, A), and the picture's summary (B, D)."""
        projected = self.project(regions)
        return Memory(projected, self.key(projected), self.summarize(regions.mean(dim=1)))

    def initial_state(self, memory: Memory, k: int) -> State:
        start = memory.regions.new_zeros(len(memory.regions), k, self.hidden_dim)
        start = start.float()  # under autocast, too: rounding errors add up over a caption
        return start, start

    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        words = self.dropout(self.embedding(tokens.unsqueeze(-1)))
        entering = self._entering(words, memory).squeeze(2)  # (B, K, 2 D)
        new = self._advanced(entering, state)
        gate = self.sentinel_gate(torch.cat([entering, state[0]], dim=-1)).sigmoid()
        sentinel = gate * new[1].tanh()
        attended = AttendedOnce(memory, self.score.weight)
        mixed, attention = self._attend(new[0], sentinel, attended)
        return StepOutput(self.logits(mixed), new, attention)

    def packed(self, regions: Tensor, tokens: Tensor) -> DecoderOutput:
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        packing = Packing(mask)
        memory = self.prepare(regions[packing.images])
        words = self.dropout(self.embedding(packing.rows(tokens)))  # (R, D)
        hidden, sentinel = self._unrolled(packing, words, memory)  # (R, H)
        attended = AttendedByStep(packing, AttendedOverTime(memory, self.score.weight))
        mixed, attention = self._attend(hidden, sentinel, attended)
        logits = self.logits(mixed[packing.real])
        return DecoderOutput(logits, placed(attention[packing.real], mask), mask)

    def _unrolled(self, packing: Packing, words: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The LSTM's hidden states and the sentinels, (R, H), of words (R, D).

        Unrolled by hand, as torch's LSTM can neither follow the packing nor return its cell states.
        The sentinel's gate is computed together with those of the LSTM.
        """
        by_input, by_hidden, *biases = self.lstm.all_weights[0]
        of_sentinel = self.sentinel_gate.weight.tensor_split([by_input.shape[1]], dim=1)
        from_word, from_picture = torch.cat([by_input, of_sentinel[0]]).chunk(2, dim=1)
        from_hidden = torch.cat([by_hidden, of_sentinel[1]])
        bias = torch.cat([biases[0] + biases[1], self.sentinel_gate.bias])
        assert memory.summary is not None
        picture = F.linear(memory.summary, from_picture, bias).unsqueeze(1)  # (B, 1, 5 H)
        recurrent = OverTime(from_hidden, None)
        batch, k = packing.sizes[0]
        hidden = cell = memory.regions.new_zeros(batch, k, self.hidden_dim, dtype=torch.float32)
        hiddens, sentinels = [], []
        for word in packing.steps(F.linear(words, from_word)):
            b, k = word.shape[:2]
            hidden, cell = narrowed((hidden, cell), b, k)
            gates = (word + picture[:b] + recurrent(hidden)).float()
            admit, keep, new, emit, show = gates.chunk(5, dim=-1)
            cell = keep.sigmoid() * cell + admit.sigmoid() * new.tanh()
            shown = cell.tanh()
            hidden = emit.sigmoid() * shown
            hiddens.append(hidden.flatten(0, 1))
            sentinels.append((show.sigmoid() * shown).flatten(0, 1))
        return torch.cat(hiddens), torch.cat(sentinels)

    def all_steps(self, words: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.prepare(regions)
        hidden, sentinel = self._hidden(words, memory)
        attended = AttendedFused(memory, self.score.weight)
        mixed, attention = self._attend(hidden.flatten(1, 2), sentinel.flatten(1, 2), attended)
        shape = (*words.shape[:3], -1)
        return mixed.view(shape), attention.view(shape)

    def logits(self, mixed: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(mixed))
        return logits

    def _hidden(self, words: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The LSTM's hidden states and the sentinels, (B, K, T, H), of words (B, K, T, D)."""
        rows = self._entering(words, memory).flatten(0, 1)  # (B K, T, 2 D)
        hidden, _ = self.lstm(rows)  # (B K, T, H)
        before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
        gate = self.sentinel_gate(torch.cat([rows, before], dim=-1)).sigmoid()
        sentinel = gate * _cells(*self._kept_and_added(rows, before)).tanh()
        shape = (*words.shape[:3], -1)
        return hidden.view(shape), sentinel.view(shape)

    def _entering(self, words: Tensor, memory: Memory) -> Tensor:
        """The LSTM's input (B, K, T, 2 D): each word (B, K, T, D) with the picture's summary."""
        assert memory.summary is not None
        picture = memory.summary.to(words.dtype)[:, None, None].expand_as(words)
        return torch.cat([words, picture], dim=-1)

    def _advanced(self, entering: Tensor, state: State) -> State:
        """The LSTM's state after one more step, of the one before and its input (B, K, 2 D).

        By hand on CPUs: there torch leaves its LSTM to oneDNN, which arranges the weights anew at
        each call (for a single caption that is nine tenths of the time), and which lacks bfloat16
        where the CPU lacks AVX-512.
        """
        if entering.is_cuda:
            batch, k, _ = entering.shape
            hidden, cell = (part.reshape(1, batch * k, -1) for part in state)
            _, new = self.lstm(entering.flatten(0, 1).unsqueeze(1).float(), (hidden, cell))
            return tuple(part.view(batch, k, -1) for part in new)
        admit, keep, new, emit = self._gates(entering, state[0]).chunk(4, dim=-1)
        cell = keep.sigmoid() * state[1] + admit.sigmoid() * new.tanh()
        return emit.sigmoid() * cell.tanh(), cell

    def _kept_and_added(self, entering: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The forget gates and the gated new values of all steps, both (B K, T, H): from these
        `_cells` recovers the cell states, which torch's kernel does not return.

        One product of the inputs and previous hidden states gives the gates of all steps.
        """
        admit, keep, new, _ = self._gates(entering, before).chunk(4, dim=-1)
        return keep.sigmoid(), admit.sigmoid() * new.tanh()

    def _gates(self, entering: Tensor, before: Tensor) -> Tensor:
        """The LSTM's gates before their functions, float32 (..., 4 H): input, forget, new, output.
        Of its inputs (..., 2 D) and the hidden states before, (..., H)."""
        from_input, from_hidden, *biases = self.lstm.all_weights[0]
        gates = F.linear(entering, from_input, biases[0])
        return (gates + F.linear(before.to(gates.dtype), from_hidden, biases[1])).float()

    def _attend(
        self, hidden: Tensor, sentinel: Tensor, attended: Attended
    ) -> tuple[Tensor, Tensor]:
        """The output layer's input (..., H) and the attention weights over the regions (..., N),
        from hidden states and sentinels (..., H)."""
        query = self.query(hidden)  # (..., A)
        scores = attended.scores(query)  # (..., N)
        rest = self.score((query + self.sentinel_key(sentinel)).tanh())  # (..., 1)
        attention = scores.softmax(dim=-1)
        trust = torch.cat([scores, rest], dim=-1).softmax(dim=-1)[..., -1:]  # beta, (..., 1)
        context = attended.context(attention)
        return trust * sentinel + (1 - trust) * context + hidden, attention


def _cells(keep: Tensor, added: Tensor) -> Tensor:
    """An LSTM's cell state after each step, c = keep * c + added: all (B K, T, H)."""
    cell = torch.zeros_like(added[:, 0])
    cells = []
    for one_keep, one_added in zip(keep.unbind(1), added.unbind(1), strict=True):
        cell = one_keep * cell + one_added
        cells.append(cell)
    return torch.stack(cells, dim=1)
