"""Hypergraphs over the experts: which experts share a hyperedge, and the matrix that follows.

E experts, M hyperedges, H (E, M) the incidence matrix, w (M) the hyperedge weights. Every token
has the same hypergraph, so a static hypergraph convolution is one E × E matrix P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnnmoe.strategies import STRATEGIES as STRATEGIES
from gnnmoe.strategies import Members as Members
from gnnmoe.strategies import static_hyperedges as static_hyperedges


def hyperedge_index(members: list[Members]) -> Tensor:
    """Return the int64 index (2, nnz) of PyG: a row of experts above a row of hyperedge ids."""
    experts = [expert for edge in members for expert in edge]
    edges = [number for number, edge in enumerate(members) for _ in edge]
    return torch.tensor([experts, edges], dtype=torch.int64).reshape(2, -1)


def incidence(index: Tensor, num_experts: int, num_hyperedges: int) -> Tensor:
    """Return H (E, M) with 1 where the expert belongs to the hyperedge, in float64."""
    matrix = torch.zeros(num_experts, num_hyperedges, dtype=torch.float64)
    matrix[index[0], index[1]] = 1.0
    return matrix


def safe_reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 (with gradient 0) where a value is 0."""
    nonzero = values != 0
    return torch.where(nonzero, 1.0 / torch.where(nonzero, values, torch.ones_like(values)), 0.0)


def safe_reciprocal_root(values: Tensor) -> Tensor:
    """Return 1 / √values, and 0 (with gradient 0) where a value is 0."""
    nonzero = values != 0
    return torch.where(nonzero, torch.where(nonzero, values, torch.ones_like(values)).rsqrt(), 0.0)


FORMULAS = ("HypergraphConv", "PyGHypergraphConv", "HGNNConv")


def propagation_factors(incidence_EM: Tensor, weights_M: Tensor, formula: str) -> tuple[Tensor, ...]:
    r"""Return ``before`` (E), ``per_edge`` (M) and ``after`` (E).

    :math:`P = \mathrm{diag}(\mathrm{after})\, H\, \mathrm{diag}(\mathrm{per\_edge})\, H^\top
    \mathrm{diag}(\mathrm{before})`.

    With :math:`D = \mathrm{diag}(H w)` and :math:`B = \mathrm{diag}(H^\top 1)`:

    - ``HypergraphConv``, the documented formula :math:`D^{-1} H W B^{-1} H^\top`: P has rows that sum
      to 1 and does not change when all weights are scaled.
    - ``PyGHypergraphConv``, what PyG computes, :math:`D^{-1} H B^{-1} H^\top`: the weights enter the
      degree only, so that twice the weights give half the output.
    - ``HGNNConv``, :math:`D^{-1/2} H W B^{-1} H^\top D^{-1/2}`: symmetric, unchanged by scaling too.

    Factors of an expert or a hyperedge that touches nothing are 0.

    Source: Bai, Zhang and Torr, "Hypergraph convolution and hypergraph attention", 2019
    (arXiv:1901.08150), equation 5; issue 6918 of PyG; Feng et al., "Hypergraph neural networks", 2019
    (arXiv:1809.09401), equation 11.
    """
    assert formula in FORMULAS, formula
    degree_E = incidence_EM @ weights_M
    per_edge_M = safe_reciprocal(incidence_EM.sum(0))
    if formula != "PyGHypergraphConv":
        per_edge_M = per_edge_M * weights_M
    if formula == "HGNNConv":
        root_E = safe_reciprocal_root(degree_E)
        return root_E, per_edge_M, root_E
    return torch.ones_like(degree_E), per_edge_M, safe_reciprocal(degree_E)


def propagation_matrix(incidence_EM: Tensor, weights_M: Tensor, formula: str) -> Tensor:
    """Return P (E, E), so that a static convolution is ``P @ x @ theta``; see ``propagation_factors``.

    An expert without hyperedges has a row of zeros.
    """
    before_E, per_edge_M, after_E = propagation_factors(incidence_EM, weights_M, formula)
    P_EE = after_E[:, None] * ((incidence_EM * per_edge_M) @ incidence_EM.T)
    return P_EE * before_E if formula == "HGNNConv" else P_EE
