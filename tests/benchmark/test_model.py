"""The step loops that the decoders are compared to compute the same."""

from dataclasses import replace

import pytest
import torch

from caption_ray import config
from caption_ray.benchmark import model
from caption_ray.model.captioner import build_decoder


@pytest.mark.parametrize(
    "settings, baseline",
    [
        (config.seed().model.decoder, model.original_output),
        (config.coco().model.decoder, model.reprojecting_output),
        (config.coco().model.decoder, model.per_caption_output),
        (replace(config.coco().model.decoder, name="adaptive"), model.reprojecting_output),
    ],
    ids=["seed", "soft", "soft-per-caption", "adaptive"],
)
def test_the_step_loop_has_the_decoders_loss_and_gradients(settings, baseline):
    torch.manual_seed(0)
    settings = replace(settings, dropout=0.0, hidden_dim=64, attention_dim=48, embedding_dim=32)
    decoder = build_decoder(settings, 2048, model.VOCABULARY)
    batch = model.Batch.random(9, torch.device("cpu"))
    found = []
    for output in (
        baseline(decoder, batch.regions, batch.tokens),
        decoder(batch.regions, batch.tokens),
    ):
        decoder.zero_grad()
        loss = model.loss(output, batch.tokens)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in decoder.parameters()]))
    (loss, gradients), (own_loss, own_gradients) = found
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=0)
    for own, other in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
