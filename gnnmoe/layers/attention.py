"""Hypergraph attention: how much an expert belongs to a hyperedge depends on the token.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph.propagation import safe_reciprocal
from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import HypergraphLayer, naive_mean, register_layer
from gnnmoe.mixing import mix_by_token, rowwise, scores

NEGATIVE_SLOPE = 0.2


@register_layer("HypergraphAttention")
class HypergraphAttention(HypergraphLayer):
    r"""The static convolution with an incidence that depends on the content.

    .. math:: \tilde H_{ie} = \mathrm{softmax}_{e \ni i}\,
              \mathrm{LeakyReLU}(a_1 \cdot \Theta x_i + a_2 \cdot \Theta x_e), \quad
              X' = D^{-1} \tilde H W B^{-1} \tilde H^\top X \Theta + b

    The features of a hyperedge are the mean over its members, as in UniGAT. With all weights 1 the layer
    equals PyG's ``HypergraphConv(use_attention=True, attention_mode="edge")``.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: Bai, Zhang and Torr, "Hypergraph convolution and hypergraph attention", 2019
    (arXiv:1901.08150), equations 6 to 8; Huang and Yang, "UniGNN", 2021 (arXiv:2105.00956).
    """

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim))  # Θ, as nn.Linear stores it
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        self.scores = nn.Parameter(torch.empty(2, embed_dim))  # a_1 above a_2
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.scores)

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D). No features of hyperedges are computed: each token has its own P (E, E)."""
        mapped_NED = rowwise(lambda x: F.linear(x, self.weight), x_NED)
        incidence_NEM = self._incidence(mapped_NED)
        P_NEE = mix_by_token(incidence_NEM * from_weights, incidence_NEM.mT)
        return mix_by_token(P_NEE, mapped_NED) + self.bias

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return D⁻¹ H W B⁻¹ (E, M)."""
        return super().from_weights(weights_M) * safe_reciprocal(self.incidence_EM.sum(0))

    def _incidence(self, mapped_NED: Tensor) -> Tensor:
        """Return H̃ (N, E, M): a softmax over the hyperedges of each expert."""
        scores_NE2 = scores(self.scores, mapped_NED)
        of_hyperedges_NM = self.mean_of_members(scores_NE2[..., 1:])[..., 0]
        scores_NEM = F.leaky_relu(scores_NE2[..., :1] + of_hyperedges_NM[:, None, :], NEGATIVE_SLOPE)
        masked_NEM = scores_NEM.masked_fill(self.incidence_EM == 0, torch.finfo(scores_NEM.dtype).min)
        return masked_NEM.softmax(-1) * self.incidence_EM

    def membership(self, x_NED: Tensor, weights_M: Tensor) -> Tensor:
        """Return H̃ (E, M), averaged over the tokens."""
        return self._incidence(rowwise(lambda x: F.linear(x, self.weight), x_NED)).mean(0)

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Score every pair of an expert and one of its hyperedges, then sum over members and hyperedges."""
        mapped = [F.linear(value, self.weight) for value in x]
        of_edge = [naive_mean([mapped[m] for m in members]) for members in self.members]
        attention: dict[tuple[int, int], Tensor] = {}
        for expert in range(len(x)):
            edges = self.hyperedges_of(expert)
            pairs = [mapped[expert] * self.scores[0] + of_edge[e] * self.scores[1] for e in edges]
            score = [F.leaky_relu(pair.sum(-1), NEGATIVE_SLOPE) for pair in pairs]
            shares = torch.stack(score).softmax(0) if edges else []
            attention |= {(expert, e): share for e, share in zip(edges, shares, strict=True)}
        heard = []
        for expert, own in enumerate(mapped):
            edges = self.hyperedges_of(expert)
            total, degree = torch.zeros_like(own), sum(weights[e] for e in edges)
            for e in edges:
                members = self.members[e]
                inside = [attention[member, e][..., None] * mapped[member] for member in members]
                total = total + attention[expert, e][..., None] * weights[e] * naive_mean(inside) / degree
            heard.append(total + self.bias)
        return heard

    def flops(self, tokens: int) -> int:
        """Count Θ, the scores, their means, P of each token, and its product with the experts."""
        E, M, D = self.num_experts, self.num_hyperedges, self.embed_dim
        return 2 * tokens * (E * D * D + 2 * E * D + E * M + E * M * E + E * E * D)

    def inert_parameters(self) -> dict[str, str]:
        """Declare the scores inert where no expert has two hyperedges."""
        if not self.one_hyperedge_each():
            return {}
        return {"scores": "no expert has two hyperedges to choose from"}
