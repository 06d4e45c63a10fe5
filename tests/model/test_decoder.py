"""The soft decoder, compared to the paper's equations, to torch's cells, and to a loop of steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caption_ray.config import DecoderConfig, seed
from caption_ray.model import captioner as captioner_module
from caption_ray.model import decoder as decoder_module
from caption_ray.model.attention import AttendedOnce
from caption_ray.model.captioner import build_decoder
from caption_ray.model.decoder import (
    END,
    PAD,
    START,
    DecoderOutput,
    Memory,
)
from caption_ray.model.loss import token_loss
from caption_ray.model.soft import SoftAttentionDecoder

B, K, N, E, L, D, H, A, V = 2, 3, 4, 5, 7, 6, 8, 7, 11
CONFIG = DecoderConfig(embedding_dim=D, hidden_dim=H, attention_dim=A, dropout=0.0)
LENGTHS = [[7, 4, 6], [3, 5, 2]]  # START and END included; the last is an empty caption

ALL_OPTIONS = [
    {"cell": cell, "initial_state": initial, "gate": gate, "region_dim": region_dim, **output}
    for cell, initial, gate, region_dim, output in itertools.product(
        ["lstm", "gru"],
        ["mean", "zeros"],
        [True, False],
        [None, 9],
        [
            {"output": "deep"},
            {"output": "deep", "tie_embeddings": True},
            {"output": "mlp"},
        ],
    )
]


def build(vocab_size: int = V, **options: Any) -> SoftAttentionDecoder:
    torch.manual_seed(0)
    decoder = build_decoder(dataclasses.replace(CONFIG, **options), E, vocab_size)
    assert isinstance(decoder, SoftAttentionDecoder)
    return decoder.eval()


def batch(lengths: list[list[int]] = LENGTHS, padded: int = L) -> tuple[Tensor, Tensor]:
    """Regions (B, N, E) and tokens (B, K, L) of captions of these lengths."""
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor(lengths)
    tokens = torch.randint(3, V, (*size.shape, padded), generator=generator)
    place = torch.arange(padded)
    tokens[..., 0] = START
    tokens[place == size.unsqueeze(-1) - 1] = END
    tokens[place >= size.unsqueeze(-1)] = PAD
    return torch.randn(len(lengths), N, E, generator=generator), tokens


def loop_over_steps(decoder: SoftAttentionDecoder, regions: Tensor, tokens: Tensor) -> Any:
    memory = decoder.prepare(regions)
    state = decoder.initial_state(memory, tokens.shape[1])
    logits, attention = [], []
    for word in tokens[..., :-1].unbind(dim=2):
        output = decoder.step(word, state, memory)
        state = output.state
        logits.append(output.logits)
        attention.append(output.attention)
    return torch.stack(logits, dim=2), torch.stack(attention, dim=2)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_forward_equals_the_loop_over_step(options: dict[str, Any]) -> None:
    decoder, (regions, tokens) = build(**options), batch()
    output = decoder(regions, tokens)
    logits, attention = loop_over_steps(decoder, regions, tokens)
    assert torch.equal(output.mask, tokens[..., 1:] != PAD)
    torch.testing.assert_close(output.logits, logits[output.mask])
    torch.testing.assert_close(output.attention, attention * output.mask.unsqueeze(-1))


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_every_parameter_takes_part(options: dict[str, Any]) -> None:
    decoder, (regions, tokens) = build(**options), batch()
    output = decoder(regions, tokens)
    token_loss(output.logits, tokens[..., 1:][output.mask])[0].backward()
    idle = [
        name
        for name, parameter in decoder.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle or idle == ["project.0.bias"]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_captions_of_an_image_do_not_see_each_other(cell: str) -> None:
    decoder, (regions, tokens) = build(cell=cell), batch()
    together = decoder(regions, tokens)
    for k in range(K):
        alone = decoder(regions, tokens[:, k : k + 1])
        rows = torch.zeros_like(together.mask)
        rows[:, k] = together.mask[:, k]
        torch.testing.assert_close(alone.logits, together.logits[rows[together.mask]])


def test_a_word_depends_on_no_later_one() -> None:
    decoder, (regions, tokens) = build(), batch([[7]] * 2)
    changed = tokens.clone()
    changed[..., 4] = (changed[..., 4] - 2) % (V - 3) + 3
    before, after = (decoder(regions, t).logits.view(2, 6, V) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(dim=-1).all()


def test_padding_changes_nothing_and_is_not_attended() -> None:
    decoder, (regions, tokens) = build(), batch()
    longer = torch.cat([tokens, torch.full((B, K, 5), PAD)], dim=-1)
    output, padded = decoder(regions, tokens), decoder(regions, longer)
    torch.testing.assert_close(padded.logits, output.logits)
    assert padded.attention.shape == (B, K, L + 4, N)
    torch.testing.assert_close(padded.attention[:, :, : L - 1], output.attention)
    assert not padded.attention[:, :, L - 1 :].any()


def test_time_loop_stops_at_the_longest_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, (regions, tokens) = build(), batch([[5, 3, 4]], padded=40)
    steps = 0
    advance = decoder._advance

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return advance(*arguments)

    monkeypatch.setattr(decoder, "_advance", counted)
    decoder(regions, tokens)
    assert steps == 4


def test_no_real_words_give_zero_gradients() -> None:
    decoder, (regions, tokens) = build(), batch()
    output = decoder(regions, torch.full_like(tokens, PAD))
    assert output.logits.shape == (0, V)
    token_loss(output.logits, torch.zeros(0, dtype=torch.int64))[0].backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert decoder.from_hidden.weight.grad is not None


# Against independent references ---------------------------------------------------------------


def test_a_step_follows_the_papers_equations() -> None:
    """Show, Attend and Tell, equations 1-7 and section 4.2.1, with a matrix for each map."""
    decoder, (regions, _) = build(), batch()
    a, y = regions[1], 5  # annotation vectors, previous word
    weights = {name: tensor.detach() for name, tensor in decoder.named_parameters()}

    init_c_and_h = weights["from_mean.weight"].chunk(2), weights["from_mean.bias"].chunk(2)
    (f_init_h, f_init_c), (b_init_h, b_init_c) = init_c_and_h
    mean = a.mean(dim=0)
    h, c = torch.tanh(f_init_h @ mean + b_init_h), torch.tanh(f_init_c @ mean + b_init_c)

    names = ["query", "beta", "i", "f", "o", "g"]
    sizes = [A, 1, H, H, H, H]
    from_h = dict(zip(names, weights["from_hidden.weight"].split(sizes), strict=True))
    bias_h = dict(zip(names, weights["from_hidden.bias"].split(sizes), strict=True))
    from_y = dict(zip("ifog", weights["from_word.weight"].chunk(4), strict=True))
    bias_y = dict(zip("ifog", weights["from_word.bias"].chunk(4), strict=True))
    from_z = dict(zip("ifog", weights["from_context.weight"].chunk(4), strict=True))

    keys, key_bias = weights["attention.project.weight"], weights["attention.project.bias"]
    query = from_h["query"] @ h + bias_h["query"]
    e = [weights["attention.score.weight"][0] @ torch.tanh(keys @ r + key_bias + query) for r in a]
    alpha = torch.softmax(torch.stack(e), dim=0)  # eq. 4-6
    beta = torch.sigmoid(from_h["beta"] @ h + bias_h["beta"])
    z = beta * (alpha @ a)  # section 4.2.1

    word = weights["embedding.weight"][y]
    gates = {
        name: from_y[name] @ word
        + bias_y[name]
        + from_h[name] @ h
        + bias_h[name]
        + from_z[name] @ z
        for name in "ifog"
    }
    i, f, o = (torch.sigmoid(gates[name]) for name in "ifo")  # eq. 1
    c = f * c + i * torch.tanh(gates["g"])  # eq. 2
    h = o * torch.tanh(c)  # eq. 3
    l_h, l_z = weights["mix.weight"].split([H, E], dim=1)
    mixed = word + l_h @ h + l_z @ z + weights["mix.bias"]
    logits = weights["output_weight"] @ mixed + weights["output_bias"]  # eq. 7

    memory = decoder.prepare(regions)
    tokens = torch.full((B, K), y)
    output = decoder.step(tokens, decoder.initial_state(memory, K), memory)
    for k in range(K):
        torch.testing.assert_close(output.attention[1, k], alpha)
        torch.testing.assert_close(output.state[0][1, k], h)
        torch.testing.assert_close(output.state[1][1, k], c)
        torch.testing.assert_close(output.logits[1, k], logits)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrence_equals_torchs_cell(cell: str) -> None:
    decoder, (regions, _) = build(cell=cell), batch()
    reference: nn.LSTMCell | nn.GRUCell
    if cell == "lstm":
        reference, order = nn.LSTMCell(D + E, H), [0, 1, 3, 2]  # torch: i f g o; here: i f o g
    else:
        reference, order = nn.GRUCell(D + E, H), [0, 1, 2]

    def in_torchs_order(tensor: Tensor) -> Tensor:
        chunks = tensor.detach().chunk(len(order))
        return torch.cat([chunks[i] for i in order])

    recurrent = slice(A + 1, None)
    entering = torch.cat([decoder.from_word.weight, decoder.from_context.weight], dim=1)
    reference.weight_ih.data = in_torchs_order(entering)
    reference.bias_ih.data = in_torchs_order(decoder.from_word.bias)
    reference.weight_hh.data = in_torchs_order(decoder.from_hidden.weight[recurrent])
    reference.bias_hh.data = in_torchs_order(decoder.from_hidden.bias[recurrent])

    memory = decoder.prepare(regions)
    state = decoder.initial_state(memory, K)
    expected = tuple(tensor.flatten(0, 1) for tensor in state)
    for word in (5, 3, 9):
        tokens = torch.full((B, K), word)
        hidden = state[0]
        state = decoder.step(tokens, state, memory).state
        query, gate, _ = decoder.from_hidden(hidden).split([A, 1, len(order) * H], dim=-1)
        attended = AttendedOnce(memory, decoder.attention.score.weight)
        context, _ = decoder.attention(query, attended)
        inputs = torch.cat([decoder.embedding(tokens), gate.sigmoid() * context], dim=-1)
        hx = expected if cell == "lstm" else expected[0]
        result = reference(inputs.flatten(0, 1), hx)
        expected = result if cell == "lstm" else (result,)
        for ours, theirs in zip(state, expected, strict=True):
            torch.testing.assert_close(ours.flatten(0, 1), theirs)


def test_mlp_output_is_two_linear_layers_of_the_state() -> None:
    decoder, (regions, tokens) = build(output="mlp"), batch()
    memory = decoder.prepare(regions)
    output = decoder.step(tokens[..., 1], decoder.initial_state(memory, K), memory)
    hidden = decoder.mix(output.state[0])
    torch.testing.assert_close(output.logits, hidden @ decoder.output_weight.T)


def test_projected_regions_are_what_is_attended_to() -> None:
    decoder, (regions, _) = build(region_dim=9), batch()
    memory = decoder.prepare(regions)
    assert memory.regions.shape == (B, N, 9)
    weight, bias = decoder.project.parameters()
    torch.testing.assert_close(memory.regions, (regions @ weight.T + bias).relu())


def test_zero_initial_state_is_zero() -> None:
    decoder, (regions, _) = build(initial_state="zeros"), batch()
    hidden, cell = decoder.initial_state(decoder.prepare(regions), K)
    assert hidden.shape == cell.shape == (B, K, H)
    assert not hidden.any() and not cell.any()


def test_tied_embeddings_are_one_matrix() -> None:
    tied, free = build(tie_embeddings=True), build()
    sizes = [sum(p.numel() for p in decoder.parameters()) for decoder in (free, tied)]
    assert sizes[0] - sizes[1] == V * D
    storages = [tensor.data_ptr() for tensor in tied.state_dict().values()]
    assert len(set(storages)) == len(storages)


def test_dropout_acts_in_training_only() -> None:
    decoder, (regions, tokens) = build(dropout=0.5), batch()
    assert torch.equal(decoder(regions, tokens).logits, decoder(regions, tokens).logits)
    decoder.train()
    assert not torch.equal(decoder(regions, tokens).logits, decoder(regions, tokens).logits)


def test_state_stays_float32_under_autocast() -> None:
    for cell in ("lstm", "gru"):
        decoder, (regions, tokens) = build(cell=cell), batch()
        with torch.autocast("cpu", torch.bfloat16):
            memory = decoder.prepare(regions)
            state = decoder.initial_state(memory, K)
            state = decoder.step(tokens[..., 0], state, memory).state
            low = decoder(regions, tokens).logits
        assert {tensor.dtype for tensor in state} == {torch.float32}
        torch.testing.assert_close(low.float(), decoder(regions, tokens).logits, atol=0.1, rtol=0.1)


def test_first_loss_of_the_original_system_is_its_own() -> None:
    """2.0863 = ln 5001 x 12.0 / 49: the loss of uniform guesses, with 12 words per caption on
    average, divided by a padded length of 49."""
    config, vocab_size, captions = seed(), 5001, 16
    torch.manual_seed(0)
    decoder = build_decoder(config.model.decoder, 2048, vocab_size)
    lengths = torch.randint(9, 16, (captions // 2,))
    lengths = torch.cat([lengths, 24 - lengths])
    place = torch.arange(49)
    tokens = torch.randint(4, vocab_size, (captions, 49)).masked_fill(
        place > lengths.unsqueeze(-1), PAD
    )
    tokens[:, 0] = START
    output = decoder(torch.randn(captions, 64, 2048).relu(), tokens.unsqueeze(1))
    total, _ = token_loss(output.logits, tokens.unsqueeze(1)[..., 1:][output.mask])
    assert len(output.logits) == 12 * captions
    assert math.isclose(total.item() / (captions * 49), 2.0863, rel_tol=0.05)


# Names ----------------------------------------------------------------------------------------


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--model.decoder.name is 'sift'.*soft"):
        build(name="sift")


def test_special_words_are_numbered_as_in_the_vocabulary() -> None:
    from caption_ray.data import vocabulary

    assert (PAD, START, END) == (vocabulary.PAD, vocabulary.START, vocabulary.END)


def test_another_decoder_takes_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(decoder_module.Decoder):
        def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(vocab_size))

        def prepare(self, regions: Tensor) -> Memory:
            return Memory(regions, regions)

        def initial_state(self, memory: Memory, k: int) -> decoder_module.State:
            return (torch.zeros(len(memory.regions), k),)

        def step(self, tokens: Tensor, state: Any, memory: Memory) -> decoder_module.StepOutput:
            attention = torch.full((*tokens.shape, N), 1 / N)
            return decoder_module.StepOutput(
                self.logits.expand(*tokens.shape, -1), state, attention
            )

        def forward(
            self, regions: Tensor, tokens: Tensor, num_words: int | None = None
        ) -> DecoderOutput:
            mask = tokens[..., 1:] != decoder_module.PAD
            attention = torch.full((*mask.shape, N), 1 / N)
            return DecoderOutput(self.logits.expand(int(mask.sum()), -1), attention, mask)

    monkeypatch.setitem(captioner_module.DECODERS, "constant", Constant)
    decoder = build_decoder(dataclasses.replace(CONFIG, name="constant"), E, V)
    assert isinstance(decoder, Constant)
