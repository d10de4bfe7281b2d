"""The strategies of the spec: which experts share a hyperedge, as numbers."""

import math

import pytest
import torch

from gnnmoe import HGNNExpertCoupler
from gnnmoe.hypergraph import (
    STRATEGIES,
    hyperedge_index,
    incidence,
    register_strategy,
    safe_reciprocal,
    static_hyperedges,
)
from tests.gnnmoe._support import every_strategy, make_coupler

generate = HGNNExpertCoupler.generate_static_hyperedges


@pytest.mark.core("strategy:all_pairs")
@pytest.mark.parametrize(("E", "M", "nnz"), [(0, 0, 0), (1, 0, 0), (2, 1, 2), (3, 3, 6), (4, 6, 12)])
def test_strategies_all_pairs_counts(E, M, nnz):
    index, count = generate(E, "all_pairs")
    assert (count, index.shape, index.dtype) == (M, (2, nnz), torch.int64)


@pytest.mark.core("strategy:all_triplets")
@pytest.mark.parametrize("E", range(7))
def test_strategies_all_triplets_counts(E):
    index, count = generate(E, "all_triplets")
    assert count == [0, 0, 0, 1, 4, 10, 20][E] == math.comb(E, 3)
    assert (index.shape, index.dtype) == ((2, 3 * count), torch.int64)


@pytest.mark.core("strategy:all")
@pytest.mark.parametrize(("E", "M"), [(0, 0), (1, 0), (2, 1), (5, 1)])
def test_strategies_all_is_one_hyperedge_of_all_experts(E, M):
    index, count = generate(E, "all")
    assert count == M
    assert index.tolist() == ([list(range(E)), [0] * E] if M else [[], []])
    assert (index.shape, index.dtype) == ((2, E * M), torch.int64)


def test_strategies_put_the_node_row_above_the_hyperedge_row():
    index, _ = generate(3, "all_pairs")
    assert index.tolist() == [[0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 2, 2]]
    index, _ = generate(4, "all_triplets")
    assert index.tolist() == [[0, 1, 2, 0, 1, 3, 0, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]


@every_strategy
@pytest.mark.parametrize("E", range(9))
def test_strategies_give_distinct_hyperedges_of_distinct_experts(strategy, E):
    members = static_hyperedges(E, strategy)
    assert len({frozenset(edge) for edge in members}) == len(members)
    for edge in members:
        assert len(set(edge)) == len(edge) >= 2
        assert set(edge) <= set(range(E))
    index = hyperedge_index(members)
    assert index.shape == (2, sum(map(len, members)))
    rebuilt: list[list[int]] = [[] for _ in members]
    for expert, edge in index.T.tolist():
        rebuilt[edge].append(expert)
    assert [tuple(edge) for edge in rebuilt] == members


@every_strategy
def test_strategies_are_symmetric_over_the_experts(strategy):
    H = incidence(hyperedge_index(static_hyperedges(5, strategy)), 5, len(static_hyperedges(5, strategy)))
    assert len(set(H.sum(1).tolist())) == 1  # every expert in as many hyperedges


def test_strategies_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(ValueError, match=r"unknown static_hyperedge_strategy 'all_pair'") as caught:
        generate(4, "all_pair")
    assert "Did you mean 'all_pairs'?" in str(caught.value)
    for name in STRATEGIES:
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="allowed: all, all_pairs, all_triplets") as caught:
        make_coupler(static_hyperedge_strategy="zzz")
    assert "Did you mean" not in str(caught.value)


def test_strategies_negative_number_of_experts_is_refused():
    with pytest.raises(ValueError, match="num_experts is -1; it must not be negative"):
        static_hyperedges(-1, "all_pairs")


def test_strategies_are_a_registry(monkeypatch):
    monkeypatch.setattr("gnnmoe.hypergraph.STRATEGIES", dict(STRATEGIES))

    @register_strategy("ends")
    def ends(num_experts):
        return [(0, num_experts - 1)]

    assert generate(4, "ends")[0].tolist() == [[0, 3], [0, 0]]
    assert make_coupler(static_hyperedge_strategy="ends")._num_hyperedges == 1


def test_incidence_marks_members_and_nothing_else():
    H = incidence(torch.tensor([[0, 2, 2], [0, 0, 1]]), 4, 3)
    assert H.dtype == torch.float64
    assert H.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert incidence(torch.empty(2, 0, dtype=torch.int64), 0, 0).shape == (0, 0)


def test_safe_reciprocal_of_zero_is_zero_with_gradient_zero():
    values = torch.tensor([2.0, 0.0, -4.0], requires_grad=True)
    result = safe_reciprocal(values)
    result.sum().backward()
    assert result.tolist() == [0.5, 0.0, -0.25]
    assert values.grad is not None
    assert values.grad.tolist() == [-0.25, 0.0, -0.0625]
