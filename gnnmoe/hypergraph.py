"""Hypergraphs over the experts: which experts share a hyperedge, and the matrix that follows.

E experts, M hyperedges, H (E, M) the incidence matrix, w (M) the hyperedge weights. Every token
has the same hypergraph, so a static hypergraph convolution is one E × E matrix P.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from gnnmoe.naming import unknown_name

Members = tuple[int, ...]
Strategy = Callable[[int], list[Members]]

STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Return a decorator that makes a function from E to member lists a named strategy."""

    def register(strategy: Strategy) -> Strategy:
        STRATEGIES[name] = strategy
        return strategy

    return register


@register_strategy("all_pairs")
def all_pairs(num_experts: int) -> list[Members]:
    """Every pair of experts: E (E − 1) / 2 hyperedges."""
    return list(combinations(range(num_experts), 2))


@register_strategy("all_triplets")
def all_triplets(num_experts: int) -> list[Members]:
    """Every three experts: E (E − 1) (E − 2) / 6 hyperedges."""
    return list(combinations(range(num_experts), 3))


@register_strategy("all")
def all_experts(num_experts: int) -> list[Members]:
    """One hyperedge of all experts; none where there is only one expert to talk to itself."""
    return [tuple(range(num_experts))] if num_experts > 1 else []


def static_hyperedges(num_experts: int, strategy: str) -> list[Members]:
    """Return the members of each hyperedge; an empty list where E is too small to have any.

    Raises:
        ValueError: there is no such strategy, or E is negative.
    """
    if strategy not in STRATEGIES:
        raise ValueError(unknown_name("static_hyperedge_strategy", strategy, STRATEGIES))
    if num_experts < 0:
        raise ValueError(f"num_experts is {num_experts}; it must not be negative.")
    return STRATEGIES[strategy](num_experts)


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


def propagation_matrix(incidence_EM: Tensor, weights_M: Tensor, formula: str) -> Tensor:
    r"""Return P (E, E), so that a convolution is ``P @ x @ theta``.

    ``HypergraphConv`` is the documented formula, :math:`D^{-1} H W B^{-1} H^\top` with
    :math:`D = \mathrm{diag}(H w)` and :math:`B = \mathrm{diag}(H^\top 1)`: P has rows that sum
    to 1 and does not change when all weights are scaled. ``PyGHypergraphConv`` is what PyG
    computes, :math:`D^{-1} H B^{-1} H^\top`: the weights enter the degree only, so that twice the
    weights give half the output. An expert without hyperedges has a row of zeros in both.

    Source: Bai, Zhang and Torr, "Hypergraph convolution and hypergraph attention", 2019
    (arXiv:1901.08150), equation 5; the difference is issue 6918 of PyG.
    """
    degree_E = incidence_EM @ weights_M
    size_M = incidence_EM.sum(0)
    per_edge_M = safe_reciprocal(size_M)
    if formula == "HypergraphConv":
        per_edge_M = per_edge_M * weights_M
    else:
        assert formula == "PyGHypergraphConv", formula
    return safe_reciprocal(degree_E)[:, None] * ((incidence_EM * per_edge_M) @ incidence_EM.T)
