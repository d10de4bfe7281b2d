"""HNHN: an activation at the hyperedge, without which a hypergraph layer is a static mean.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph import Members
from gnnmoe.hypergraph_layers._base import HypergraphLayer, naive_mean, naive_weighted_mean


class HNHN(HypergraphLayer):
    r"""Hyperedges are neurons: the smallest layer that really depends on the hyperedge order.

    .. math:: Z = \mathrm{GELU}(B^{-1} H^\top X \Theta_E + b_E), \quad X' = D^{-1} H W Z\, \Theta_V + b_V

    Hyperedge weights :math:`W`, learned, stand in the place of the paper's :math:`|e|^\beta`; its
    :math:`\alpha` is 0, and GELU stands for its ReLU.

    Source: Dong, Sawin and Bengio, "HNHN: Hypergraph networks with hyperedge neurons", 2020
    (arXiv:2006.12278).
    """

    def __init__(
        self, members: Sequence[Members], num_experts: int, embed_dim: int, num_heads: int = 1
    ) -> None:
        super().__init__(members, num_experts, embed_dim)
        del num_heads
        self.to_hyperedges = nn.Linear(embed_dim, embed_dim)
        self.to_experts = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_NED: Tensor, weights_M: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D); both maps run on experts, since they commute with the means."""
        del start_NED
        mapped_NED = F.linear(x_NED, self.to_hyperedges.weight)
        z_NMD = F.gelu(self.mean_of_members(mapped_NED) + self.to_hyperedges.bias)
        return self.to_experts(self.mean_of_hyperedges(z_NMD, weights_M))

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Follow the formula: mean, map and activation for each hyperedge, then for each expert."""
        del start
        z = [F.gelu(self.to_hyperedges(naive_mean([x[m] for m in members]))) for members in self.members]
        heard = []
        for expert, own in enumerate(x):
            edges = self.hyperedges_of(expert)
            mean = naive_weighted_mean([z[e] for e in edges], [weights[e] for e in edges], own)
            heard.append(self.to_experts(mean))
        return heard

    def flops(self, tokens: int) -> int:
        """Count two maps on experts and the two means."""
        E, M, D = self.num_experts, self.num_hyperedges, self.embed_dim
        return 2 * tokens * (2 * E * D * D + 2 * E * M * D)
