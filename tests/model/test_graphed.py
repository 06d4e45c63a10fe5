"""Training passes as computed on GPUs: the same losses and gradients as step by step."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from caption_ray.config import DecoderConfig
from caption_ray.model.captioner import build_decoder
from caption_ray.model.decoder import END, PAD, START, Decoder, DecoderOutput
from caption_ray.model.graphs import Graphed
from caption_ray.model.loss import doubly_stochastic, token_loss

VOCABULARY, REGIONS, REGION_DIM = 40, 9, 24

SMALL = DecoderConfig(embedding_dim=16, hidden_dim=32, attention_dim=20, dropout=0.0)
KINDS = {
    "lstm": SMALL,
    "gru": replace(
        SMALL, cell="gru", region_dim=28, gate=False, output="mlp", initial_state="zeros"
    ),
    "adaptive": replace(SMALL, name="adaptive"),
    "updown": replace(SMALL, name="updown", region_dim=28),
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_tokens(batch: int, k: int, longest: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + longest)
    tokens = torch.randint(3, VOCABULARY, (batch, k, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (batch, k, 1), generator=generator)
    lengths[0, 0] = longest
    places = torch.arange(longest)
    tokens[places.expand_as(tokens) >= lengths] = PAD
    tokens[places.expand_as(tokens) == lengths - 1] = END
    tokens[..., 0] = START
    if batch > 1:
        tokens[-1, -1, 1:] = PAD  # an empty caption
    return tokens.to(device)


Found = tuple[DecoderOutput, list[Tensor]]


def learnt(
    decoder: nn.Module,
    regions: Tensor,
    tokens: Tensor,
    autocast: bool = False,
    num_words: int | None = None,
) -> Found:
    """The output, and the gradients of the training loss."""
    decoder.zero_grad()
    regions = regions.clone().requires_grad_()
    with torch.autocast(regions.device.type, torch.bfloat16, enabled=autocast):
        output = decoder(regions, tokens, num_words)
    loss, _ = token_loss(output.logits, output.targets(tokens))
    penalty, _ = doubly_stochastic(output.attention, output.mask)
    (loss + penalty).backward()
    weights = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    assert regions.grad is not None
    return output, [*weights, regions.grad]


def same(ours: Found, theirs: Found, tolerance: float) -> None:
    for name in ("logits", "attention", "mask"):
        close(getattr(ours[0], name), getattr(theirs[0], name), tolerance)
    for own, other in zip(ours[1], theirs[1], strict=True):
        close(own, other, tolerance)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    largest = max(float(theirs.abs().max()), 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls the functions that would be captured directly, on any device."""
    monkeypatch.setattr(Graphed, "__call__", lambda self, *inputs: self._function(*inputs))
    yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [4, 7, 9])
def test_all_captions_at_every_step_give_what_packed_ones_give(
    without_graphs: None, kind: str, longest: int
) -> None:
    torch.manual_seed(0)
    decoder = build_decoder(KINDS[kind], REGION_DIM, VOCABULARY)
    regions, tokens = torch.rand(3, REGIONS, REGION_DIM), random_tokens(3, 2, longest, "cpu")
    expected = learnt(decoder, regions, tokens)
    decoder.compile_training()
    decoder.forward = partial(decoder.graphed, decoder._graphed)  # type: ignore
    num_words = int((tokens[..., 1:] != PAD).sum())
    found = learnt(decoder, regions, tokens, num_words=num_words)
    same(found, expected, 1e-4)
    assert torch.equal(found[0].targets(tokens), expected[0].targets(tokens))


def test_a_frozen_encoders_regions_get_no_gradient(without_graphs: None) -> None:
    decoder = build_decoder(SMALL, REGION_DIM, VOCABULARY)
    decoder.compile_training()
    regions = torch.rand(3, REGIONS, REGION_DIM)
    graph = decoder._graphed  # type: ignore
    output = decoder.graphed(graph, regions, random_tokens(3, 2, 6, "cpu"), None)  # type: ignore
    output.logits.sum().backward()
    assert regions.grad is None
    assert all(p.grad is not None for p in decoder.parameters())


def pair(kind: str) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    plain = build_decoder(KINDS[kind], REGION_DIM, VOCABULARY).cuda()
    graphed = copy.deepcopy(plain)
    graphed.compile_training()
    return graphed, plain


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_what_single_kernels_give(kind: str) -> None:
    graphed, plain = pair(kind)
    torch.backends.cuda.matmul.allow_tf32 = False
    for batch, longest in ((4, 9), (4, 12), (3, 5), (4, 9), (4, 8)):
        regions = torch.rand(batch, REGIONS, REGION_DIM, device="cuda")
        tokens = random_tokens(batch, 2, longest, "cuda")
        expected = learnt(plain, regions, tokens)
        same(learnt(graphed, regions, tokens), expected, 1e-3)
        _, rough = learnt(plain, regions, tokens, autocast=True)
        _, own = learnt(graphed, regions, tokens, autocast=True)
        for ours, theirs, exact in zip(own, rough, expected[1], strict=True):
            allowed = 2 * float((theirs - exact).abs().max()) + 0.02 * float(exact.abs().max())
            assert float((ours - exact).abs().max()) <= allowed


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_reads_the_weights_of_now_and_gradients_add_up(kind: str) -> None:
    graphed, plain = pair(kind)
    for decoder in (graphed, plain):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)
        for step in range(4):
            optimizer.zero_grad(set_to_none=True)
            for part in range(2):
                torch.manual_seed(10 * step + part)
                regions = torch.rand(4, REGIONS, REGION_DIM, device="cuda")
                tokens = random_tokens(4, 2, 6 + step, "cuda")
                output = decoder(regions, tokens)
                token_loss(output.logits, output.targets(tokens))[0].backward()
            optimizer.step()
    for own, other in zip(graphed.parameters(), plain.parameters(), strict=True):
        close(own, other, 3e-2)  # Adam amplifies rounding errors of small gradients


@pytest.mark.gpu
@needs_gpu
def test_a_pass_without_gradients_gives_the_same_logits() -> None:
    graphed, plain = pair("lstm")
    regions = torch.rand(4, REGIONS, REGION_DIM, device="cuda")
    tokens = random_tokens(4, 2, 9, "cuda")
    with torch.no_grad():
        close(graphed(regions, tokens).logits, plain(regions, tokens).logits, 1e-3)


@pytest.mark.gpu
@needs_gpu
def test_a_backward_pass_after_another_forward_pass_is_an_error() -> None:
    graphed, _ = pair("lstm")
    regions = torch.rand(4, REGIONS, REGION_DIM, device="cuda")
    output = graphed(regions, random_tokens(4, 2, 9, "cuda"))
    graphed(regions, random_tokens(4, 2, 5, "cuda"))
    with pytest.raises(RuntimeError, match="alternate the two"):
        output.logits.sum().backward()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_gathers_the_gradients_of_graphs(kind: str, tmp_path: Path) -> None:
    graphed, plain = pair(kind)
    dist.init_process_group("nccl", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(graphed, device_ids=[0])
        for step in range(3):  # DDP rearranges its buckets after the first step
            regions = torch.rand(4, REGIONS, REGION_DIM, device="cuda")
            tokens = random_tokens(4, 2, 9 - step, "cuda")
            same(learnt(wrapped, regions, tokens), learnt(plain, regions, tokens), 1e-3)
    finally:
        dist.destroy_process_group()
