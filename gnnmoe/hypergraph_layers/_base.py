"""What every hypergraph layer shares: the incidence, the two means, and what it tells of itself.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph import Members, hyperedge_index, incidence, propagation_matrix, safe_reciprocal
from gnnmoe.mixing import mean_over_experts, mix


class HypergraphLayer(nn.Module, ABC):
    """One round of messages from experts to hyperedges and back: (N, E, D) → (N, E, D).

    The coupler adds the activation and the residual. Every token has the same hypergraph, so no
    index depends on N, and no token can see another. A stack calls ``from_weights`` once for all its
    layers.
    """

    incidence_EM: Tensor

    def __init__(self, members: Sequence[Members], num_experts: int, embed_dim: int) -> None:
        super().__init__()
        self.members = list(members)
        self.num_experts, self.num_hyperedges, self.embed_dim = num_experts, len(self.members), embed_dim
        matrix_EM = incidence(hyperedge_index(self.members), num_experts, self.num_hyperedges)
        self.register_buffer("incidence_EM", matrix_EM.to(torch.get_default_dtype()), persistent=False)

    @abstractmethod
    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return what each expert hears (N, E, D).

        ``from_weights`` is what the method of this name gives, ``start_NED`` the features before the
        first layer.
        """

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return what ``forward`` needs of the hyperedge weights (M), which is the same for every token.

        Here D⁻¹ H W (E, M): the weighted mean over the hyperedges of each expert, 0 for one without.
        """
        per_expert_E = safe_reciprocal(self.incidence_EM @ weights_M)
        return per_expert_E[:, None] * self.incidence_EM * weights_M

    def mean(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return the mean over the experts of ``forward`` (N, D)."""
        return mean_over_experts(self(x_NED, from_weights, start_NED))

    @abstractmethod
    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Compute the same from the formula, hyperedge by hyperedge, on a list of E features (…, D)."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Return the FLOPs of ``forward`` on this many tokens: 2 a multiply-add of a matrix product."""

    def mean_flops(self, tokens: int) -> int:
        """Return the FLOPs of ``mean`` on this many tokens."""
        return self.flops(tokens)

    def from_weights_flops(self) -> int:
        """Return the FLOPs of ``from_weights``."""
        return 0

    def inert_parameters(self) -> dict[str, str]:
        """Return parameters that have no gradient on this hypergraph: name → the reason."""
        return {}

    def adjacency(self, weights_M: Tensor) -> Tensor:
        """Return who hears whom (E, E), by the hypergraph and its weights alone: D⁻¹ H W B⁻¹ Hᵀ."""
        return propagation_matrix(self.incidence_EM, weights_M, "HypergraphConv")

    def membership(self, x_NED: Tensor, weights_M: Tensor) -> Tensor | None:
        """Return how much each hyperedge counts for each expert (E, M), averaged over the tokens.

        None where that does not depend on the content.
        """
        del x_NED, weights_M
        return None

    def weights_cancel(self) -> bool:
        """Return whether no expert has two hyperedges to weigh against each other."""
        return self.one_hyperedge_each()

    def one_hyperedge_each(self) -> bool:
        """Return whether every expert has one hyperedge at most."""
        return bool((self.incidence_EM.sum(1) <= 1).all())

    def mean_of_members(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the members of each hyperedge (N, M, D): B⁻¹ Hᵀ x."""
        per_edge_M = safe_reciprocal(self.incidence_EM.sum(0))
        return mix((self.incidence_EM * per_edge_M).T, x_NED)

    def hyperedges_of(self, expert: int) -> list[int]:
        """Return the numbers of the hyperedges that ``expert`` belongs to."""
        return [number for number, members in enumerate(self.members) if expert in members]


def naive_mean(values: list[Tensor]) -> Tensor:
    """Return the mean of a list of tensors of one shape, which is not empty."""
    return torch.stack(values).mean(0)


def naive_weighted_mean(values: list[Tensor], weights: list[Tensor], otherwise: Tensor) -> Tensor:
    """Return Σ w v / Σ w, or zeros like ``otherwise`` for an empty list."""
    if not values:
        return torch.zeros_like(otherwise)
    total = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(otherwise))
    return total / torch.stack(weights).sum()


class MLP(nn.Module):
    """Linear–GELU–Linear of one width, the hidden layer as wide as the output."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape (…, D)."""
        return self.second(F.gelu(self.first(x)))
