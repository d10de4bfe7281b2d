"""HNHN: an activation at the hyperedge, without which a hypergraph layer is a static mean.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import (
    HypergraphLayer,
    naive_mean,
    naive_weighted_mean,
    over_token_chunks,
    register_layer,
)
from gnnmoe.mixing import fuses, mean_over_experts, mix, rowwise

FEATURES = 3
"""Feature vectors of a hyperedge in memory at once: before and after GELU, and the gradients of both."""


@register_layer("HNHN")
class HNHN(HypergraphLayer):
    r"""Hyperedges are neurons: the smallest layer whose function depends on the hyperedge order.

    .. math:: Z = \mathrm{GELU}(B^{-1} H^\top X \Theta_E + b_E), \quad X' = D^{-1} H W Z\, \Theta_V + b_V

    Learned hyperedge weights :math:`W` replace the paper's :math:`|e|^\beta`. The paper's :math:`\alpha` is 0
    here, and GELU replaces its ReLU.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: Dong, Sawin and Bengio, "HNHN: Hypergraph networks with hyperedge neurons", 2020
    (arXiv:2006.12278).
    """

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.to_hyperedges = nn.Linear(embed_dim, embed_dim)
        self.to_experts = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D). Both maps are applied to experts, since they commute with the means."""
        return rowwise(self.to_experts, self._heard(x_NED, from_weights))

    def mean(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return the mean over the experts of ``forward`` (N, D): the last map commutes with it."""
        return self.to_experts(mean_over_experts(self._heard(x_NED, from_weights)))

    def _heard(self, x_NED: Tensor, shares_EM: Tensor) -> Tensor:
        """Return D⁻¹ H W Z (N, E, D). Z (N, M, D) is never in memory as a whole, nor saved."""

        def through_hyperedges(mapped_NED: Tensor) -> Tensor:
            return mix(shares_EM, F.gelu(self.mean_of_members(mapped_NED)))

        mapped_NED = rowwise(self.to_hyperedges, x_NED)  # with the bias: its mean over members is itself
        if fuses(*shares_EM.shape):
            return over_token_chunks(partial(self._term_by_term, shares_EM), mapped_NED, features=0)
        return over_token_chunks(through_hyperedges, mapped_NED, features=FEATURES * self.num_hyperedges)

    def _term_by_term(self, shares_EM: Tensor, mapped_NED: Tensor) -> Tensor:
        """Return the same sums from terms (N, D), which a compiler keeps in registers.

        A compiler would write (N, M, D) to memory, since each of the E sums reads it. The weights are
        expanded to all tokens. The backward then sums their gradients over D in the kernel of the terms, and
        over N after it.
        """
        x = mapped_NED.transpose(0, 1).unbind(0)  # experts first: the gradients are stacked in this order
        nothing_ND = torch.zeros_like(x[0])
        z = [F.gelu(sum((x[e] for e in edge), nothing_ND) / len(edge)) for edge in self.members]
        own = [self.hyperedges_of(expert) for expert in range(self.num_experts)]
        pairs = torch.stack([shares_EM[expert, m] for expert, edges in enumerate(own) for m in edges])
        shares = iter(pairs.expand(len(mapped_NED), -1).unbind(1))
        heard = []
        for edges in own:
            terms = [next(shares)[:, None] * z[m] for m in edges]
            heard.append(sum(terms, nothing_ND).to(mapped_NED.dtype))
        return torch.stack(heard).transpose(0, 1)

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Follow the formula: mean, map and activation for each hyperedge, then for each expert."""
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

    def mean_flops(self, tokens: int) -> int:
        """Count the last map once for all experts."""
        E, D = self.num_experts, self.embed_dim
        return self.flops(tokens) - 2 * tokens * (E - 1) * D * D
