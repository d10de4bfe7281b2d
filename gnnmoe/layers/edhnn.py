"""ED-HNN: the message of a hyperedge to a member depends on the member too.

Shapes: N tokens, E experts, M hyperedges, G the largest degree of an expert, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph.propagation import safe_reciprocal
from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import (
    MLP,
    HypergraphLayer,
    naive_mean,
    naive_weighted_mean,
    over_token_chunks,
    register_layer,
)

RESTART = 0.5  # share of the first features in every layer, as in the authors' code by default
FEATURES = 5
"""Feature vectors of an expert, a hyperedge and a pair of both in memory at once, with gradients."""


@register_layer("EDHNN")
class EDHNN(HypergraphLayer):
    r"""Equivariant hypergraph diffusion: a message for each pair of an expert and its hyperedge.

    .. math:: m_e = \tfrac{1}{|e|} \sum_{j \in e} \mathrm{MLP}(x_j), \quad
              h_{ie} = \mathrm{GELU}(U x_i + V m_e + c)

    .. math:: x_i' = W \Big( \tfrac12 \big(R\, \tfrac{1}{d_i} \sum_{e \ni i} w_e h_{ie} + r\big)
              + \tfrac12 x_i^{(0)} \Big) + b

    with :math:`d_i = \sum_{e \ni i} w_e` and :math:`x^{(0)}` the features before the first layer. Means
    replace sums, as in the authors' code by default.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: Wang, Yang, Liu, Wang and Li, "Equivariant hypergraph diffusion neural operators", 2023
    (arXiv:2207.06680), algorithm 1.
    """

    hyperedges_EG: Tensor
    belongs_EG: Tensor

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.of_members = MLP(embed_dim)
        self.from_expert = nn.Linear(embed_dim, embed_dim)  # U and c
        self.from_hyperedge = nn.Linear(embed_dim, embed_dim, bias=False)  # V
        self.message = nn.Linear(embed_dim, embed_dim)  # R and r
        self.update = nn.Linear(embed_dim, embed_dim)  # W and b
        lists = [self.hyperedges_of(expert) for expert in range(num_experts)]
        width = max(map(len, lists), default=0)
        padded = [edges + [0] * (width - len(edges)) for edges in lists]
        kept = [[1.0] * len(edges) + [0.0] * (width - len(edges)) for edges in lists]
        shape = (num_experts, width)
        self.register_buffer(
            "hyperedges_EG", torch.tensor(padded, dtype=torch.int64).view(shape), persistent=False
        )
        self.register_buffer("belongs_EG", torch.tensor(kept).view(shape), persistent=False)

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D)."""
        E, G = self.hyperedges_EG.shape

        def piece(x_NED: Tensor, start_NED: Tensor) -> Tensor:
            m_NMD = self.mean_of_members(self.from_hyperedge(self.of_members(x_NED)))  # V commutes with it
            of_edges_NEGD = m_NMD.index_select(1, self.hyperedges_EG.flatten()).unflatten(1, (E, G))
            h_NEGD = F.gelu(self.from_expert(x_NED)[:, :, None] + of_edges_NEGD)
            heard_NED = (from_weights[:, :, None] * h_NEGD).sum(2).to(x_NED.dtype)
            return self.update((1 - RESTART) * self.message(heard_NED) + RESTART * start_NED)

        features = FEATURES * (E + self.num_hyperedges + E * G)
        return over_token_chunks(piece, x_NED, start_NED, features=features)

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return the weight of each hyperedge over the total weight of its expert's hyperedges (E, G)."""
        weights_EG = weights_M.index_select(0, self.hyperedges_EG.flatten()).view_as(self.belongs_EG)
        weights_EG = weights_EG * self.belongs_EG
        return weights_EG * safe_reciprocal(weights_EG.sum(1, keepdim=True))

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Follow the formula, one pair of an expert and a hyperedge after the other."""
        means = [naive_mean([self.of_members(x[member]) for member in members]) for members in self.members]
        found = []
        for expert, own in enumerate(x):
            edges = self.hyperedges_of(expert)
            told = [F.gelu(self.from_expert(own) + self.from_hyperedge(means[edge])) for edge in edges]
            heard = naive_weighted_mean(told, [weights[edge] for edge in edges], own)
            found.append(self.update((1 - RESTART) * self.message(heard) + RESTART * start[expert]))
        return found

    def flops(self, tokens: int) -> int:
        """Count six maps on experts and the mean over members."""
        E, M, D = self.num_experts, self.num_hyperedges, self.embed_dim
        return 2 * tokens * (6 * E * D * D + E * M * D)
