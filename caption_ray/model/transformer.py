"""The transformer decoder.

Shapes as in decoder.py, and T steps so far, Y layers, D model width (`hidden_dim`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caption_ray.config import DecoderConfig
from caption_ray.model.decoder import PAD, Decoder, DecoderOutput, Memory, State, StepOutput
from caption_ray.model.recurrence import placed

MAX_POSITIONS = 128
"""Longest caption, in tokens: positions are learnt for no more."""


class TransformerDecoder(Decoder):
    """A pre-norm transformer decoder (Vaswani et al., 1706.03762; norms as in 2002.04745).

    The state is each layer's keys and values of the words so far; the regions' are computed once.
    """

    def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
        super().__init__()
        width = config.hidden_dim
        if width % config.num_heads:
            raise ValueError(
                f"--model.decoder.hidden-dim is {width}: give a multiple of "
                f"--model.decoder.num-heads, {config.num_heads}"
            )
        self.width = width
        self.project = nn.Sequential(nn.Linear(region_dim, width), nn.LayerNorm(width))
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(MAX_POSITIONS, width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocab_size)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def prepare(self, regions: Tensor) -> Memory:
        """Keys hold each layer's keys and values of the regions: (B, N, Y * 2 * D)."""
        projected = self.project(regions)
        keys = [layer.regions_to_kv(projected) for layer in self.layers]  # type: ignore[operator]
        return Memory(projected, torch.cat(keys, dim=-1))

    def initial_state(self, memory: Memory, k: int) -> State:
        empty = memory.regions.new_zeros(len(memory.regions), k, 0, self.width)
        return (empty,) * (2 * len(self.layers))

    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        hidden, state, attention = self._run(tokens.unsqueeze(-1), state, memory)
        return StepOutput(self.output(self.norm(hidden.squeeze(2))), state, attention.squeeze(2))

    def forward(
        self, regions: Tensor, tokens: Tensor, num_words: int | None = None
    ) -> DecoderOutput:
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        longest = max(1, int(mask.sum(dim=-1).max()))
        memory = self.prepare(regions)
        state = self.initial_state(memory, tokens.shape[1])
        hidden, _, attention = self._run(tokens[..., :longest], state, memory)
        real = mask[..., :longest]
        logits = self.output(self.norm(hidden[real]))  # (M, V)
        return DecoderOutput(logits, placed(attention[real], mask), mask)

    def _run(self, tokens: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor]:
        """Hidden (B, K, T, D), state and the last layer's attention (B, K, T, N) for new tokens
        (B, K, T), which follow those of the state."""
        past, count = state[0].shape[2], tokens.shape[2]
        if past + count > MAX_POSITIONS:
            raise ValueError(
                f"a caption of {past + count} words: --search.max-length and --data.caption-length "
                f"may be {MAX_POSITIONS} at most with the transformer"
            )
        places = torch.arange(past, past + count, device=tokens.device)
        hidden = self.dropout(self.embedding(tokens) + self.positions(places))
        new_state: list[Tensor] = []
        attention = hidden
        all_keys = memory.keys.chunk(len(self.layers), dim=-1)
        for number, (layer, kv) in enumerate(zip(self.layers, all_keys, strict=True)):
            is_last = number == len(self.layers) - 1
            hidden, keys, values, attention = layer(
                hidden, state[2 * number], state[2 * number + 1], kv, is_last
            )
            new_state += [keys, values]
        return hidden, tuple(new_state), attention


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.heads = config.num_heads
        self.dropout = nn.Dropout(config.dropout)
        self.norm_words, self.norm_regions, self.norm_feedforward = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.words_to_qkv = nn.Linear(width, 3 * width)
        self.from_words = nn.Linear(width, width)
        self.to_query = nn.Linear(width, width)
        self.regions_to_kv = nn.Linear(width, 2 * width)
        self.from_regions = nn.Linear(width, width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.feedforward_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward_dim, width),
        )

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, region_kv: Tensor, with_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden (B, K, T, D), keys and values (B, K, past + T, D), and attention (B, K, T, N) over
        the regions (without `with_weights` a placeholder).

        hidden (B, K, T, D), keys and values of the past (B, K, past, D), region_kv (B, N, 2 D).
        """
        batch, k, count = hidden.shape[:3]
        past = keys.shape[2]
        query, key, value = self.words_to_qkv(self.norm_words(hidden)).chunk(3, dim=-1)
        keys = torch.cat([keys, key.to(keys.dtype)], dim=2)
        values = torch.cat([values, value.to(values.dtype)], dim=2)
        visible = torch.ones(count, past + count, dtype=torch.bool, device=hidden.device)
        found = F.scaled_dot_product_attention(
            self._split(query), self._split(keys).to(query.dtype),
            self._split(values).to(query.dtype), attn_mask=visible.tril(past),
        )  # fmt: skip
        hidden = hidden + self.dropout(self.from_words(self._join(found)))

        # all sequences of an image attend in one call, as they share its regions
        query = self.to_query(self.norm_regions(hidden)).view(batch, 1, k * count, -1)
        key, value = (part.unsqueeze(1) for part in region_kv.chunk(2, dim=-1))  # (B, 1, N, D)
        query, key, value = (self._split(part).squeeze(1) for part in (query, key, value))
        if with_weights:
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
            found = weights @ value  # (B, heads, K T, D / heads)
            attention = weights.mean(dim=1).view(batch, k, count, -1)
        else:
            found = F.scaled_dot_product_attention(query, key, value)
            attention = hidden
        found = found.transpose(1, 2).reshape(batch, k, count, -1)
        hidden = hidden + self.dropout(self.from_regions(found))
        hidden = hidden + self.dropout(self.feedforward(self.norm_feedforward(hidden)))
        return hidden, keys, values, attention

    def _split(self, x: Tensor) -> Tensor:
        """(B, K, T, D) -> (B, K, heads, T, D / heads)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(2, 3)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(3)
