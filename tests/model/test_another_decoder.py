"""A decoder from outside the package works with its class and one line of registration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from caption_ray import config
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import DecoderConfig, ModelConfig, SearchConfig, TrainConfig
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import DECODERS, Captioner, build_captioner
from caption_ray.model.decoder import (
    END,
    PAD,
    START,
    Decoder,
    DecoderOutput,
    Memory,
    State,
    StepOutput,
)
from caption_ray.model.encoder import to_tensor
from caption_ray.model.search import generate
from caption_ray.training import loop

VOCABULARY = Vocabulary("a red circle above blue".split())
SIZE = 32
CPU = torch.device("cpu")


class MeanRegionDecoder(Decoder):
    """A GRU whose initial state is the picture, without attention
    (in the manner of Show and Tell, 1411.4555)."""

    def __init__(self, config: DecoderConfig, region_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.start = nn.Linear(region_dim, config.hidden_dim)
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.gru = nn.GRU(config.embedding_dim, config.hidden_dim, batch_first=True)
        self.output = nn.Linear(config.hidden_dim, vocab_size)

    def prepare(self, regions: Tensor) -> Memory:
        return Memory(regions, keys=regions)

    def initial_state(self, memory: Memory, k: int) -> State:
        hidden = self.start(memory.regions.mean(dim=1)).tanh()
        return (hidden.unsqueeze(1).expand(-1, k, -1),)

    def step(self, tokens: Tensor, state: State, memory: Memory) -> StepOutput:
        (hidden,) = state
        words = self.embedding(tokens).flatten(0, 1).unsqueeze(1)  # (B K, 1, D)
        out, last = self.gru(words, hidden.flatten(0, 1).unsqueeze(0).contiguous())
        attention = memory.regions.new_ones(*tokens.shape, memory.regions.shape[1])
        state = (last.view(hidden.shape),)
        logits = self.output(out).view(*tokens.shape, -1)
        return StepOutput(logits, state, attention / attention.shape[-1])

    def forward(
        self, regions: Tensor, tokens: Tensor, num_words: int | None = None
    ) -> DecoderOutput:
        mask = tokens[..., 1:] != PAD  # (B, K, L - 1)
        (hidden,) = self.initial_state(self.prepare(regions), tokens.shape[1])
        words = self.embedding(tokens[..., :-1]).flatten(0, 1)
        out, _ = self.gru(words, hidden.flatten(0, 1).unsqueeze(0).contiguous())
        attention = regions.new_ones(*mask.shape, regions.shape[1]) / regions.shape[1]
        return DecoderOutput(self.output(out.view(*mask.shape, -1)[mask]), attention, mask)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODERS, "mean", MeanRegionDecoder)  # the one line


@pytest.fixture
def model() -> ModelConfig:
    preset = config.shapes().model
    return ModelConfig(
        dataclasses.replace(preset.encoder, image_size=SIZE),
        DecoderConfig(name="mean", embedding_dim=16, hidden_dim=32),
    )


@pytest.fixture
def captioner(model: ModelConfig) -> Captioner:
    torch.manual_seed(0)
    return build_captioner(model, len(VOCABULARY), None, pretrained=True)


IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
IMAGES[1] //= 4
TOKENS = np.array(
    [[[START, 4, 5, 6, END]], [[START, 4, 8, END, PAD]]], np.int32
)  # "a red circle", "a blue"


def test_its_forward_equals_the_loop_over_its_step(captioner: Captioner) -> None:
    decoder, tokens = captioner.decoder, torch.tensor(TOKENS).long()
    regions = captioner.encoder.eval()(to_tensor(IMAGES))
    output = decoder(regions, tokens)
    memory = decoder.prepare(regions)
    state, steps = decoder.initial_state(memory, 1), []
    for word in tokens[..., :-1].unbind(dim=2):
        step = decoder.step(word, state, memory)
        state = step.state
        steps.append(step.logits)
    torch.testing.assert_close(output.logits, torch.stack(steps, dim=2)[output.mask])


def test_it_is_trained_saved_and_searched_like_the_others(
    captioner: Captioner, model: ModelConfig, tmp_path: Path
) -> None:
    settings = TrainConfig(attention_regularization=1.0)
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=3e-3)
    captioner.train()
    for _ in range(100):
        loop.train_step(captioner, loop.to_device(IMAGES, TOKENS, SIZE, CPU), optimizer, settings)

    state = checkpoint.State(100, 1, 0, {}, None)
    search = SearchConfig(beam_size=3, max_length=6)
    checkpoint.save(
        tmp_path / "local", captioner, VOCABULARY, model, search, state,
        optimizer.state_dict(), Ledger([1]),
    )  # fmt: skip
    run = tmp_path / "run"
    run_folder.commit(tmp_path / "local", str(run), state, keep=1, is_best=True)

    predictor = Predictor.from_uri(str(run), CPU)
    said = [caption.text for (caption,) in predictor.predict(IMAGES)]
    assert said == ["a red circle", "a blue"], "two pictures are learnt by heart"
    together = Predictor.from_uri(f"{run},{run}", CPU)
    assert [caption.text for (caption,) in together.predict(IMAGES)] == said
    found = generate(predictor.captioner, to_tensor(IMAGES), search, num_return=3)
    assert found.log_probs.isfinite().all()
