"""The refiner: regions learn where they are, and what the other regions show.

Shapes: B images, N regions of a grid, E the encoder's region dim, D refined region dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from caption_ray.config import DecoderConfig

FREQUENCIES = 16
"""Of the sinusoids that describe a place: each of sine and cosine, along rows and columns."""


class Refiner(nn.Module):
    """Places, and self-attention among the regions of a picture, before any decoder.

    Without layers, each region gets its place added (E stays as it is); a captioner that starts
    from one trained without places begins as that one, for the places' map starts from zero. With
    layers, regions are projected to the decoder's `hidden_dim` and pass through a pre-norm
    transformer encoder (Vaswani et al., 1706.03762; norms as in 2002.04745), as the captioners of
    1912.08226 (section 3.1, without memory slots) have it.

    Places are sinusoids of a region's row and column as shares of the grid (1706.03762, section
    3.5, in two dimensions), so that a captioner can go on with another image size.
    """

    places: Tensor

    def __init__(self, config: DecoderConfig, region_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width, depth = config.hidden_dim, config.num_encoder_layers
        if depth and width % config.num_heads:
            raise ValueError(
                f"--model.decoder.hidden-dim is {width}: with --model.decoder.num-encoder-layers "
                f"give a multiple of --model.decoder.num-heads, {config.num_heads}"
            )
        self.region_dim = width if depth else region_dim
        """D."""
        self.project: nn.Module = nn.Identity()
        if depth:
            self.project = nn.Sequential(nn.Linear(region_dim, width), nn.LayerNorm(width))
        self.register_buffer("places", sinusoids(grid), persistent=False)  # (N, P)
        self.from_place = nn.Linear(self.places.shape[1], self.region_dim, bias=False)
        nn.init.zeros_(self.from_place.weight)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_heads,
                config.feedforward_dim,
                config.encoder_dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm: nn.Module = nn.LayerNorm(width) if depth else nn.Identity()

    def forward(self, regions: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, D)."""
        regions = self.project(regions) + self.from_place(self.places)
        for layer in self.layers:
            regions = layer(regions)
        refined: Tensor = self.norm(regions)
        return refined


def build_refiner(config: DecoderConfig, region_dim: int, grid: tuple[int, int]) -> Refiner | None:
    """The refiner that `config` asks for, if any. Raises ValueError for sizes that do not fit."""
    if config.num_encoder_layers or config.region_positions:
        return Refiner(config, region_dim, grid)
    return None


def sinusoids(grid: tuple[int, int]) -> Tensor:
    """Sines and cosines of each region's row and column, float32 (N, 4 * FREQUENCIES): the slowest
    takes half a turn over the picture, the fastest 32 turns."""
    rows, columns = (torch.arange(count).add(0.5).div(count) for count in grid)
    frequencies = math.pi * torch.logspace(0, 6, FREQUENCIES, base=2)
    along = [
        torch.cat([(axis[:, None] * frequencies).sin(), (axis[:, None] * frequencies).cos()], dim=1)
        for axis in (rows, columns)
    ]  # (rows, 2 F), (columns, 2 F)
    down = along[0][:, None].expand(-1, len(columns), -1)
    across = along[1][None].expand(len(rows), -1, -1)
    return torch.cat([down, across], dim=-1).flatten(0, 1)
