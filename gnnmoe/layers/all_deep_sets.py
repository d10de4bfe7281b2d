"""AllDeepSets: a hyperedge is any function of the set of its members, and so is an expert.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from torch import Tensor

from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import (
    MLP,
    HypergraphLayer,
    naive_mean,
    naive_weighted_mean,
    over_token_chunks,
    register_layer,
)
from gnnmoe.mixing import mix

FEATURES = 7
"""Feature vectors of an expert and of a hyperedge in memory at once: inside two MLPs, with gradients."""


@register_layer("AllDeepSets")
class AllDeepSets(HypergraphLayer):
    r"""Two set functions, each an MLP of a mean of MLPs.

    .. math:: z_e = \mathrm{MLP}_2\big(\tfrac{1}{|e|} \sum_{i \in e} \mathrm{MLP}_1(x_i)\big), \quad
              x_i' = \mathrm{MLP}_4\big(\tfrac{1}{d_i} \sum_{e \ni i} w_e\, \mathrm{MLP}_3(z_e)\big)

    with :math:`d_i = \sum_{e \ni i} w_e`. Means replace the paper's sums.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: Chien, Pan, Peng and Milenkovic, "You are AllSet", 2022 (arXiv:2106.13264), equation 6.
    """

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.of_members, self.to_hyperedges = MLP(embed_dim), MLP(embed_dim)
        self.of_hyperedges, self.to_experts = MLP(embed_dim), MLP(embed_dim)

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D)."""

        def piece(x_NED: Tensor) -> Tensor:
            z_NMD = self.to_hyperedges(self.mean_of_members(self.of_members(x_NED)))
            return self.to_experts(mix(from_weights, self.of_hyperedges(z_NMD)))

        features = FEATURES * (self.num_experts + self.num_hyperedges)
        return over_token_chunks(piece, x_NED, features=features)

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Follow the formula set by set."""
        z = []
        for members in self.members:
            z.append(self.to_hyperedges(naive_mean([self.of_members(x[member]) for member in members])))
        heard = []
        for expert, own in enumerate(x):
            edges = self.hyperedges_of(expert)
            values = [self.of_hyperedges(z[edge]) for edge in edges]
            heard.append(self.to_experts(naive_weighted_mean(values, [weights[e] for e in edges], own)))
        return heard

    def flops(self, tokens: int) -> int:
        """Count four linear maps on experts, four on hyperedges, and the two means."""
        E, M, D = self.num_experts, self.num_hyperedges, self.embed_dim
        return 2 * tokens * (4 * (E + M) * D * D + 2 * E * M * D)
