"""The static convolutions: one E × E matrix for all tokens, in three formulas and five backends.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph.backends import BACKENDS
from gnnmoe.hypergraph.propagation import hyperedge_index, propagation_matrix
from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import HypergraphLayer, register_layer


class StaticConvolution(HypergraphLayer):
    r"""The same weighted mean over experts for every token, then a linear map.

    .. math:: X' = P(w)\, X \Theta + b

    The subclasses differ in :math:`P` (E, E), which their ``formula`` names.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: see ``gnnmoe.hypergraph.propagation.propagation_factors``, which has all three formulas.
    """

    formula: ClassVar[str]
    index: Tensor

    def __init__(
        self,
        members: list[Members],
        num_experts: int,
        embed_dim: int,
        num_heads: int = 1,
        *,
        backend: str = "vectorized",
    ) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim))  # Θ, as nn.Linear stores it
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("index", hyperedge_index(self.members), persistent=False)
        self.pyg_conv: list[nn.Module] = []  # the PyG backends fill it on first use

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor | None = None) -> Tensor:
        """Return (N, E, D)."""
        return BACKENDS[self.backend](self, x_NED, from_weights)

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return P (E, E), or the weights (M) where the backend works without P."""
        return self.adjacency(weights_M) if self.is_matrix else weights_M

    @property
    def is_matrix(self) -> bool:
        """Whether the backend applies P (E, E)."""
        return self.backend == "vectorized"

    def adjacency(self, weights_M: Tensor) -> Tensor:
        """Return P (E, E), which the layer applies: row i has the weights of what expert i receives."""
        return propagation_matrix(self.incidence_EM, weights_M, self.formula)

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Sum over hyperedges and their members one by one, with no matrix and no index."""
        mapped = [F.linear(value, self.weight) for value in x]
        degree = [sum(weights[edge] for edge in self.hyperedges_of(expert)) for expert in range(len(x))]
        heard = []
        for expert in range(len(x)):
            total = torch.zeros_like(mapped[expert])
            for edge in self.hyperedges_of(expert):
                members = self.members[edge]
                for member in members:
                    if self.formula == "HypergraphConv":
                        share = weights[edge] / (degree[expert] * len(members))
                    elif self.formula == "PyGHypergraphConv":
                        share = 1 / (degree[expert] * len(members))
                    else:
                        share = weights[edge] / ((degree[expert] * degree[member]) ** 0.5 * len(members))
                    total = total + share * mapped[member]
            heard.append(total + self.bias)
        return heard

    def flops(self, tokens: int) -> int:
        """Count Θ and P for every token."""
        E, D = self.num_experts, self.embed_dim
        return 2 * tokens * E * D * (D + E)

    def from_weights_flops(self) -> int:
        """Count the product that gives P."""
        return 2 * self.num_experts * self.num_hyperedges * self.num_experts

    def weights_cancel(self) -> bool:
        """Return whether the degree cancels every weight; in PyG's formula it cannot."""
        return self.formula != "PyGHypergraphConv" and self.one_hyperedge_each()


@register_layer("HypergraphConv")
class HypergraphConvolution(StaticConvolution):
    """The documented convolution: its matrix is D⁻¹ H W B⁻¹ Hᵀ, whose rows sum to 1."""

    formula = "HypergraphConv"


@register_layer("PyGHypergraphConv")
class PyGHypergraphConvolution(StaticConvolution):
    """The convolution that PyG computes: its matrix is D⁻¹ H B⁻¹ Hᵀ, so weights enter only the degree."""

    formula = "PyGHypergraphConv"


@register_layer("HGNNConv")
class SymmetricConvolution(StaticConvolution):
    """The symmetric convolution of HGNN: its matrix is D^-½ H W B⁻¹ Hᵀ D^-½."""

    formula = "HGNNConv"
