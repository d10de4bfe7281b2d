"""Facts 2 and 3 of the spec: what the two formulas compute, against PyG and dense matrices."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.nn import HypergraphConv

from gnnmoe import PyGHypergraphConvWrapper
from gnnmoe.hypergraph.propagation import hyperedge_index, incidence, propagation_matrix
from gnnmoe.hypergraph.strategies import static_hyperedges
from tests.gnnmoe._support import (
    FORMULAS,
    assert_near,
    assert_same_function,
    dense_oracle,
    every_formula,
    normal,
)

PARITY_SUITE = [  # PyG's own test cases, as "Parity suite" of the spec names them
    ([[0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, 1]], [1, 0.5]),
    ([[0, 0, 1, 1, 2, 3, 3, 3, 2, 1, 2], [0, 1, 2, 1, 2, 1, 0, 3, 3, 4, 4]], [1, 0.5, 0.8, 0.2, 0.7]),
]
PUBLISHED = ("HypergraphConv", "PyGHypergraphConv")
parity_suite = pytest.mark.parametrize(("index", "weights"), PARITY_SUITE, ids=["M=2", "M=5"])


def hypergraph(index, weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, weights = torch.tensor(index), torch.tensor(weights, dtype=torch.float64)
    return index, incidence(index, 4, len(weights)), weights


def test_fact_2_hand_computed_rows():
    """One number of each formula by hand: expert 0 of the first hypergraph of the parity suite."""
    _, H, w = hypergraph(*PARITY_SUITE[0])
    # expert 0: hyperedge 0 = {0,1,2} with weight 1, hyperedge 1 = {0,1,3} with weight 1/2; degree 3/2
    assert_near(propagation_matrix(H, w, "HypergraphConv")[0], [1 / 3, 1 / 3, 2 / 9, 1 / 9])
    assert_near(propagation_matrix(H, w, "PyGHypergraphConv")[0], [4 / 9, 4 / 9, 2 / 9, 2 / 9])


def pyg_and_wrapper() -> tuple[Any, Any]:
    conv: Any = HypergraphConv(3, 2).double()
    wrapper = PyGHypergraphConvWrapper(in_channels=3, out_channels=2).double()
    with torch.no_grad():
        conv.bias.copy_(normal(2, seed=8))
    wrapper.load_state_dict({f"conv.{name}": value for name, value in conv.state_dict().items()})
    return conv, wrapper


@parity_suite
def test_parity_suite_wrapper_is_pygs_layer_value_for_value(index, weights):
    index, _, w = hypergraph(index, weights)
    conv, wrapper = pyg_and_wrapper()
    assert_same_function(lambda x, w: wrapper(x, index, w), lambda x, w: conv(x, index, w), [normal(4, 3), w])
    assert_near(wrapper(normal(4, 3), index), conv(normal(4, 3), index, torch.ones_like(w)))
    ours, theirs = ((layer(normal(4, 3), index, w) ** 2).sum() for layer in (wrapper, conv))
    pairs = zip(
        torch.autograd.grad(ours, list(wrapper.parameters())),
        torch.autograd.grad(theirs, list(conv.parameters())),
        strict=True,
    )
    for one, other in pairs:
        assert_near(one, other)


@parity_suite
def test_parity_suite_propagation_matrix_is_pygs_layer_value_for_value(index, weights):
    index, H, w = hypergraph(index, weights)
    conv, _ = pyg_and_wrapper()

    def ours(x, w, theta, bias):
        return propagation_matrix(H, w, "PyGHypergraphConv") @ x @ theta.T + bias

    def theirs(x, w, theta, bias):
        parameters = {"lin.weight": theta, "bias": bias}
        return torch.func.functional_call(conv, parameters, (x, index, w))

    assert_same_function(ours, theirs, [normal(4, 3), w, normal(2, 3), normal(2)])


def test_wrapper_refuses_what_the_index_cannot_name():
    """Names: PyGHypergraphConvWrapper(in, out)(x, hyperedge_index, hyperedge_weight)."""
    _, wrapper = pyg_and_wrapper()
    index = torch.tensor([[0, 4], [0, 0]])
    with pytest.raises(ValueError, match="names node 4; x has 4 nodes"):
        wrapper(normal(4, 3), index)
    index = torch.tensor([[0, 3], [0, 2]])
    with pytest.raises(ValueError, match="names hyperedge 2; there are 2 hyperedge weights"):
        wrapper(normal(4, 3), index, torch.ones(2).double())
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert_near(wrapper(normal(4, 3), empty), wrapper.conv.bias.expand(4, 2))


@every_formula
def test_isolated_experts_have_a_row_of_zeros_and_finite_gradients(formula):
    """Parity suite, isolated experts: 2 has no hyperedge; hyperedge 1 has no expert."""
    H = incidence(torch.tensor([[0, 1, 1, 3], [0, 0, 2, 2]]), 4, 3)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    P = propagation_matrix(H, w, formula)
    assert torch.count_nonzero(P[2]) == torch.count_nonzero(P[:, 2]) == 0
    connected = torch.tensor([0, 1, 3])
    assert_near(
        P[connected][:, connected], dense_oracle(H[connected][:, [0, 2]], w.detach()[[0, 2]], formula)
    )
    (gradient,) = torch.autograd.grad((P * normal(4, 4)).sum(), w)
    assert gradient.isfinite().all()
    assert gradient[1] == 0


@every_formula
@pytest.mark.parametrize(("E", "k"), [(2, 2), (4, 2), (3, 3), (6, 3)])
def test_fact_3_complete_k_uniform_propagation(E, k, formula):
    """P = λ I + (1 − λ) 1 1ᵀ / E with λ = (E − k) / (k (E − 1))."""
    members = static_hyperedges(E, {2: "all_pairs", 3: "all_triplets"}[k])
    H = incidence(hyperedge_index(members), E, len(members))
    P = propagation_matrix(H, torch.ones(len(members), dtype=torch.float64), formula)
    rate = (E - k) / (k * (E - 1))
    assert_near(P, rate * torch.eye(E).double() + (1 - rate) * torch.ones(E, E).double() / E)


@st.composite
def weighted_hypergraphs(draw):
    """Any hypergraph in which every expert appears, with any positive weights."""
    E = draw(st.integers(1, 6))
    edges = draw(st.lists(st.sets(st.integers(0, E - 1), min_size=1), max_size=6))
    missing = set(range(E)) - set().union(*edges)
    edges += [{expert} for expert in missing]
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=len(edges), max_size=len(edges)))
    H = incidence(hyperedge_index([tuple(sorted(edge)) for edge in edges]), E, len(edges))
    return H, torch.tensor(weights, dtype=torch.float64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(weighted_hypergraphs(), st.floats(1e-3, 1e3))
def test_fact_2_properties_of_both_formulas(graph, factor):
    """Documented: rows sum to 1, no scale. PyG's: inverse in the scale. Both: the dense oracle."""
    H, w = graph
    documented, pyg = (propagation_matrix(H, w, formula) for formula in PUBLISHED)
    assert_near(documented.sum(1), torch.ones(len(H)))
    assert (documented >= 0).all()
    assert_near(propagation_matrix(H, factor * w, "HypergraphConv"), documented)
    assert_near(propagation_matrix(H, factor * w, "PyGHypergraphConv"), pyg / factor)
    for formula in FORMULAS:
        assert_near(propagation_matrix(H, w, formula), dense_oracle(H, w, formula))
