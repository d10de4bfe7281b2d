"""The matrix that a static hypergraph convolution applies to the experts, and the mean after a stack of them.

E experts, M hyperedges, H (E, M) the incidence matrix, w (M) the hyperedge weights, N tokens, D width. Every
token has the same hypergraph, so a static hypergraph convolution is one E × E matrix P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gnnmoe.hypergraph.strategies import Members
from gnnmoe.mixing import mix

FORMULAS = ("HypergraphConv", "PyGHypergraphConv", "HGNNConv")


def hyperedge_index(members: list[Members]) -> Tensor:
    """Return the int64 index (2, nnz) of PyG: a row of experts above a row of hyperedge ids."""
    experts = [expert for edge in members for expert in edge]
    edges = [number for number, edge in enumerate(members) for _ in edge]
    return torch.tensor([experts, edges], dtype=torch.int64).reshape(2, -1)


def incidence(index: Tensor, num_experts: int, num_hyperedges: int) -> Tensor:
    """Return H (E, M) in float64: 1 where the expert belongs to the hyperedge, else 0."""
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


def propagation_factors(incidence_EM: Tensor, weights_M: Tensor, formula: str) -> tuple[Tensor, ...]:
    r"""Return ``before`` (E), ``per_edge`` (M) and ``after`` (E), the factors of P.

    :math:`P = \mathrm{diag}(\mathrm{after})\, H\, \mathrm{diag}(\mathrm{per\_edge})\, H^\top
    \mathrm{diag}(\mathrm{before})`.

    With :math:`D = \mathrm{diag}(H w)` and :math:`B = \mathrm{diag}(H^\top 1)`:

    - ``HypergraphConv``, the documented formula :math:`D^{-1} H W B^{-1} H^\top`: the rows of P sum to 1, and
      a common factor of all weights changes nothing.
    - ``PyGHypergraphConv``, which PyG computes, :math:`D^{-1} H B^{-1} H^\top`: the weights enter only the
      degree, so twice the weights give half the output.
    - ``HGNNConv``, :math:`D^{-1/2} H W B^{-1} H^\top D^{-1/2}`: P is symmetric, and a common factor of all
      weights changes nothing.

    The factor of an isolated expert or an empty hyperedge is 0.

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


def linear_readout(
    x_NED: Tensor, P_EE: Tensor, maps: Sequence[tuple[Tensor, Tensor]], *, residual: bool
) -> Tensor:
    r"""Return the mean over the experts (N, D) of :math:`X_K`, from :math:`X_0` = ``x``, for K ``maps``.

    .. math:: X_{k+1} = [X_k +]\; P X_k \Theta_k + 1 b_k^\top

    ``maps`` holds :math:`\Theta_k` as ``nn.Linear`` stores it, and :math:`b_k`. No :math:`X_k` is computed.
    For a row r of weights over the experts,
    :math:`r X_{k+1} = [r X_k +]\; (r P) X_k \Theta_k + (r \cdot 1)\, b_k`, which needs only the products of
    the rows :math:`r` and :math:`r P` with :math:`X_k`. The mean therefore needs only the rows
    :math:`1^\top P^j / E` of the input: the last row, or with ``residual`` all K + 1 rows, of which each
    layer uses up one.
    """
    rows = [P_EE.new_full((1, len(P_EE)), 1 / len(P_EE))]
    with torch.autocast(x_NED.device.type, enabled=False):  # few numbers, in every token's sum
        for _ in maps:
            rows.append(rows[-1] @ P_EE)
    totals = [row.sum() for row in rows]
    if not residual:
        mixed = mix(rows[-1], x_NED)[:, 0]
        for (weight, bias), total in zip(maps, reversed(totals[:-1]), strict=True):
            mixed = F.linear(mixed, weight, total * bias)
        return mixed
    heard = list(mix(torch.cat(rows), x_NED).unbind(1))
    for weight, bias in maps:
        heard = [
            own + F.linear(other, weight, total * bias)
            for own, other, total in zip(heard[:-1], heard[1:], totals, strict=False)
        ]
    return heard[0]


def linear_readout_flops(
    tokens: int, num_experts: int, embed_dim: int, layers: int, *, residual: bool
) -> int:
    """Return the FLOPs of ``linear_readout``: the rows, their mixtures of experts, and the maps of these."""
    E, D, K = num_experts, embed_dim, layers
    mixtures, maps = (K + 1, K * (K + 1) // 2) if residual else (1, K)
    return 2 * (K * E * E + mixtures * tokens * E * D + maps * tokens * D * D)
