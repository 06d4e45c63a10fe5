"""What holds for every decoder, and what the adaptive one and the transformer add."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caption_ray.config import DecoderConfig
from caption_ray.model.adaptive import AdaptiveAttentionDecoder
from caption_ray.model.captioner import DECODERS, build_decoder
from caption_ray.model.decoder import END, PAD, START, Decoder
from caption_ray.model.loss import token_loss
from caption_ray.model.search import beam_search, greedy
from caption_ray.model.transformer import TransformerDecoder
from caption_ray.model.updown import TopDownDecoder

B, K, N, E, L, D, H, V = 2, 3, 4, 5, 7, 6, 8, 11
CONFIG = DecoderConfig(
    embedding_dim=D, hidden_dim=H, attention_dim=7, num_layers=2, num_heads=2, feedforward_dim=12,
    dropout=0.0,
)  # fmt: skip
NAMES = sorted(DECODERS)


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = copy.copy(CONFIG)
    for option, value in {"name": name, **options}.items():
        object.__setattr__(config, option, value)
    decoder = build_decoder(config, E, V)
    with torch.no_grad():
        for parameter in decoder.parameters():  # so that no bias is zero, and no norm the identity
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return decoder.eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[7, 4, 6], [3, 5, 2]])  # START and END included
    tokens = torch.randint(3, V, (B, K, L), generator=generator)
    place = torch.arange(L)
    tokens[..., 0] = START
    tokens[place == lengths.unsqueeze(-1) - 1] = END
    tokens[place >= lengths.unsqueeze(-1)] = PAD
    return torch.randn(B, N, E, generator=generator), tokens


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_the_loop_over_step(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    output = decoder(regions, tokens)
    memory = decoder.prepare(regions)
    state = decoder.initial_state(memory, K)
    for place, word in enumerate(tokens[..., :-1].unbind(dim=2)):
        step = decoder.step(word, state, memory)
        state = step.state
        counted = output.mask[..., place]
        rows = torch.zeros_like(output.mask)
        rows[..., place] = counted
        torch.testing.assert_close(output.logits[rows[output.mask]], step.logits[counted])
        expected = step.attention * output.mask[..., place, None]
        torch.testing.assert_close(output.attention[..., place, :], expected)


@pytest.mark.parametrize("name", NAMES)
def test_attention_shares_sum_to_one(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    output = decoder(regions, tokens)
    torch.testing.assert_close(output.attention.sum(dim=-1), output.mask.float())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_takes_part(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    output = decoder(regions, tokens)
    token_loss(output.logits, tokens[..., 1:][output.mask])[0].backward()
    idle = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_words_gives_zero_gradients(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    tokens[..., 1:] = PAD
    output = decoder(regions, tokens)
    token_loss(output.logits, tokens[..., 1:][output.mask])[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_word_depends_on_no_later_one_and_on_no_other_caption(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    changed = tokens.clone()
    changed[0, 0, 4] = (changed[0, 0, 4] - 2) % (V - 3) + 3
    mask = tokens[..., 1:] != PAD
    before, after = (decoder(regions, t).logits for t in (tokens, changed))
    differs = torch.zeros_like(mask)
    differs[mask] = (before != after).any(dim=-1)
    expected = torch.zeros_like(mask)
    expected[0, 0, 4:] = True  # the word at index 4 is first an input at step 4
    assert torch.equal(differs, expected & mask)


@pytest.mark.parametrize("name", NAMES)
def test_search_drives_every_decoder_and_scores_as_teacher_forcing_does(name: str) -> None:
    decoder, (regions, _) = build(name), batch()
    memory = decoder.prepare(regions)

    def step(tokens: Tensor, state: Any) -> Any:
        return decoder.step(tokens, state, memory)

    found = beam_search(
        step, decoder.initial_state(memory, 4), max_length=5, length_penalty=0.7, num_return=2
    )
    for image in range(B):
        for rank in range(2):
            words = found.tokens[image, rank][: int(found.lengths[image, rank])]
            tokens = torch.cat([torch.tensor([START]), words]).view(1, 1, -1)
            logits = decoder(regions[image : image + 1], tokens).logits.detach().clone()
            log_probs = logits.log_softmax(-1)
            # the search never generates PAD or START
            log_probs = log_probs.gather(-1, words.unsqueeze(-1))
            torch.testing.assert_close(found.log_probs[image, rank], log_probs.sum())
    one = greedy(step, decoder.initial_state(memory, 1), max_length=5)
    assert one.tokens.shape[:2] == (B, 1)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_steps_and_forward_agree(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = decoder(regions, tokens)
        memory = decoder.prepare(regions)
        state = decoder.initial_state(memory, K)
        step = decoder.step(tokens[..., 0], state, memory)
        step = decoder.step(tokens[..., 1], step.state, memory)
    first = torch.zeros_like(output.mask)
    first[..., 1] = output.mask[..., 1]
    torch.testing.assert_close(
        output.logits[first[output.mask]].float(),
        step.logits[output.mask[..., 1]].float(),
        atol=0.15,
        rtol=0.1,
    )


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_gradients_are_those_of_float32_but_for_rounding(name: str) -> None:
    decoder, (regions, tokens) = build(name), batch()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = decoder(regions, tokens)
        loss = token_loss(output.logits, output.targets(tokens))[0]
        found = torch.autograd.grad(loss, list(decoder.parameters()))
        gradients.append(torch.cat([part.flatten() for part in found]))
    exact, rounded = gradients
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


# Adaptive -------------------------------------------------------------------------------------


def test_adaptive_follows_the_papers_equations() -> None:
    decoder: AdaptiveAttentionDecoder = build("adaptive")
    regions, tokens = batch()
    cell = nn.LSTMCell(2 * D, H)
    lstm = decoder.lstm
    for ours, theirs in zip(cell.parameters(), lstm.parameters(), strict=True):
        ours.data = theirs.data
    image, caption = 1, 1
    v = torch.relu(regions[image] @ decoder.project[0].weight.T + decoder.project[0].bias)
    summary = decoder.summarize[0]
    v_g = torch.relu(regions[image].mean(0) @ summary.weight.T + summary.bias)
    h = m = torch.zeros(1, H)
    rows = []
    for word in tokens[image, caption, :4]:
        x = torch.cat([decoder.embedding.weight[word], v_g]).unsqueeze(0)
        gate = (
            torch.cat([x, h], dim=1) @ decoder.sentinel_gate.weight.T + decoder.sentinel_gate.bias
        )
        h, m = cell(x, (h, m))
        s = gate.sigmoid() * m.tanh()  # equation 10
        w_h = decoder.score.weight[0]
        from_state = h @ decoder.query.weight.T + decoder.query.bias
        z = (v @ decoder.key.weight.T + from_state).tanh() @ w_h  # equation 6
        z_s = (s @ decoder.sentinel_key.weight.T + from_state).tanh() @ w_h  # equation 12
        c = z.softmax(0) @ v
        beta = torch.cat([z, z_s]).softmax(0)[-1]
        mixed = beta * s + (1 - beta) * c + h  # equations 11 and 13
        rows.append(mixed @ decoder.output.weight.T + decoder.output.bias)
    output = decoder(regions, tokens)
    place = torch.zeros_like(output.mask)
    place[image, caption] = output.mask[image, caption]
    torch.testing.assert_close(output.logits[place[output.mask]], torch.cat(rows))


# Top-down -------------------------------------------------------------------------------------


@pytest.mark.parametrize("region_dim", [None, 9])
def test_updown_follows_the_papers_equations(region_dim: int | None) -> None:
    decoder: TopDownDecoder = build("updown", region_dim=region_dim)
    regions, tokens = batch()
    image, caption = 1, 1
    v = regions[image]
    if region_dim:
        project: Any = decoder.project
        v = torch.relu(v @ project[0].weight.T + project[0].bias)
    attend, speak = (nn.LSTMCell(size, H) for size in (H + v.shape[1] + D, v.shape[1] + H))
    from_h2, own_h2 = decoder.from_speaking.weight.chunk(2)
    a = decoder.attention_dim
    for cell, by_input, by_hidden, bias in (
        (
            attend,
            torch.cat([from_h2, decoder.from_mean.weight, decoder.from_word.weight], dim=1),
            decoder.from_looking.weight,
            decoder.from_word.bias,
        ),
        (
            speak,
            torch.cat([decoder.from_context.weight, decoder.from_attention.weight[a:]], dim=1),
            own_h2,
            decoder.from_attention.bias[a:],
        ),
    ):
        order = torch.arange(4 * H).view(4, H)[[0, 1, 3, 2]].flatten()  # torch's has new third
        cell.weight_ih.data, cell.weight_hh.data = by_input[order].data, by_hidden[order].data
        cell.bias_ih.data, cell.bias_hh.data = bias[order].data, torch.zeros(4 * H)
    h1 = c1 = h2 = c2 = torch.zeros(1, H)
    rows = []
    for word in tokens[image, caption, :4]:
        x1 = torch.cat([h2[0], v.mean(0), decoder.embedding.weight[word]])  # equation 2
        h1, c1 = attend(x1.unsqueeze(0), (h1, c1))
        query = h1 @ decoder.from_attention.weight[:a].T + decoder.from_attention.bias[:a]
        keys = v @ decoder.attention.project.weight.T + decoder.attention.project.bias
        scores = (keys + query).tanh() @ decoder.attention.score.weight[0]  # equation 3
        seen = scores.softmax(0) @ v  # equation 4
        h2, c2 = speak(torch.cat([seen, h1[0]]).unsqueeze(0), (h2, c2))  # equation 5
        rows.append(h2 @ decoder.output.weight.T + decoder.output.bias)  # equation 6
    output = decoder(regions, tokens)
    place = torch.zeros_like(output.mask)
    place[image, caption] = output.mask[image, caption]
    torch.testing.assert_close(output.logits[place[output.mask]], torch.cat(rows))


# Transformer ----------------------------------------------------------------------------------


def test_transformer_layers_equal_torchs() -> None:
    decoder: TransformerDecoder = build("transformer")
    regions, tokens = batch()
    memory = decoder.project(regions)
    reference = nn.ModuleList(
        nn.TransformerDecoderLayer(
            H, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(2)
    ).eval()
    with torch.no_grad():
        for ours, theirs in zip(decoder.layers, reference, strict=True):
            layer: Any = ours
            pairs = [
                (theirs.self_attn.in_proj_weight, layer.words_to_qkv.weight),
                (theirs.self_attn.in_proj_bias, layer.words_to_qkv.bias),
                (
                    theirs.multihead_attn.in_proj_weight,
                    torch.cat([layer.to_query.weight, layer.regions_to_kv.weight]),
                ),
                (
                    theirs.multihead_attn.in_proj_bias,
                    torch.cat([layer.to_query.bias, layer.regions_to_kv.bias]),
                ),
            ]
            for module, own in (
                (theirs.self_attn.out_proj, layer.from_words),
                (theirs.multihead_attn.out_proj, layer.from_regions),
                (theirs.linear1, layer.feedforward[0]),
                (theirs.linear2, layer.feedforward[3]),
                (theirs.norm1, layer.norm_words),
                (theirs.norm2, layer.norm_regions),
                (theirs.norm3, layer.norm_feedforward),
            ):
                pairs += [(module.weight, own.weight), (module.bias, own.bias)]
            for target, source in pairs:
                target.copy_(source)
    caption = tokens[:, 0, :6]
    hidden = decoder.embedding(caption) + decoder.positions.weight[:6]
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for layer in reference:
        hidden = layer(hidden, memory, tgt_mask=causal)
    expected = decoder.output(decoder.norm(hidden))
    output = decoder(regions, tokens[:, :1])
    torch.testing.assert_close(output.logits, expected[output.mask[:, 0]])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model.decoder.hidden-dim is 8: .*num-heads, 3"):
        build("transformer", num_heads=3)


def test_captions_longer_than_its_positions_are_refused() -> None:
    decoder: Decoder = build("transformer")
    tokens = torch.full((1, 1, 140), 4)
    with pytest.raises(ValueError, match="--search.max-length and --data.caption-length"):
        decoder(torch.randn(1, N, E), tokens)
