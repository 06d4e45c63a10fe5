"""Attention of recurrent states over an image's regions.

Shapes: B images, K sequences per image, N regions, E region dim, A attention dim.
"""

from __future__ import annotations

from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """v . tanh(query + W region), softmax over the regions (Bahdanau et al., 1409.0473, A.1.2).

    The K queries of an image share its regions and keys, which are computed once (`project`).
    Queries come projected to A already, as a decoder can do that together with its other
    projections of the same state.
    """

    def __init__(self, region_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(region_dim, attention_dim)
        """Keys (B, N, A) of regions (B, N, E)."""
        self.score = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, K, E) and weights (B, K, N) of query (B, K, A), keys (B, N, A) and regions
        (B, N, E)."""
        match = (query.unsqueeze(2) + keys.unsqueeze(1)).tanh()  # (B, K, N, A)
        weights = self.score(match).squeeze(-1).softmax(dim=-1)  # (B, K, N)
        return weights @ regions, weights
