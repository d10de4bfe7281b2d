"""The graph coupler: its formula by hand, its adjacency, its symmetry ("The set", row GNN)."""

import math

import pytest
import torch

from gnnmoe.couplers.gnn import ExpertGraphConv
from tests.gnnmoe._support import assert_near, make_coupler, normal

pytestmark = pytest.mark.core("coupler:GNN")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def hand_made_layer() -> ExpertGraphConv:
    layer = ExpertGraphConv(embed_dim=2, num_experts=2).double()
    values = {
        "adjacency_logits": [[9.0, 0.4], [-0.7, 9.0]],  # the diagonal must not matter
        "edge_score.weight": [[0.5, -1.0, 0.25, 2.0]],  # w_a, then w_b
        "edge_score.bias": [0.1],
        "neighbor_map.weight": [[1.0, 2.0], [-1.0, 0.5]],
        "self_map.weight": [[0.3, 0.0], [0.2, -0.4]],
        "self_map.bias": [0.05, -0.15],
    }
    layer.load_state_dict({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})
    return layer


def test_gnn_formula_by_hand_for_two_experts_of_width_two():
    x_0, x_1 = (1.0, -2.0), (0.5, 3.0)
    # M_01 = σ(A_01) σ(w_a·x_0 + w_b·x_1 + b): expert 0 receives, expert 1 sends
    m_01 = sigmoid(0.4) * sigmoid((0.5 * 1.0 + 2.0) + (0.25 * 0.5 + 2.0 * 3.0) + 0.1)
    m_10 = sigmoid(-0.7) * sigmoid((0.5 * 0.5 - 3.0) + (0.25 * 1.0 - 2.0 * 2.0) + 0.1)

    def updated(x, neighbour, m):
        heard = (m * neighbour[0], m * neighbour[1])
        first = heard[0] + 2 * heard[1] + 0.3 * x[0] + 0.05
        second = -heard[0] + 0.5 * heard[1] + 0.2 * x[0] - 0.4 * x[1] - 0.15
        return [gelu(first) + x[0], gelu(second) + x[1]]

    expected = torch.tensor([[updated(x_0, x_1, m_01), updated(x_1, x_0, m_10)]], dtype=torch.float64)
    x = torch.tensor([[x_0, x_1]], dtype=torch.float64)
    assert_near(hand_made_layer()(x), expected)


def test_gnn_adjacency_in_communication_has_receivers_as_rows_and_no_diagonal():
    coupler = make_coupler(coupler_type="GNN")
    communication = coupler.communication()
    assert set(communication) == {"adjacency_0", "adjacency_1"}
    for k, layer in enumerate(coupler.layers):
        expected = torch.sigmoid(layer.adjacency_logits).detach().clone()
        expected.fill_diagonal_(0)
        assert_near(communication[f"adjacency_{k}"], expected)
    # who hears whom: with only the edge 2 ← 0 open, expert 2 alone depends on expert 0
    layer = coupler.layers[0]
    with torch.no_grad():
        layer.adjacency_logits.fill_(-1e9)
        layer.adjacency_logits[2, 0] = 0.0
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], normal(4, 6))
    assert isinstance(jacobian, torch.Tensor)
    hears = jacobian.abs().amax((1, 3)) > 0
    assert hears.tolist() == [[i == j or (i, j) == (2, 0) for j in range(4)] for i in range(4)]
    adjacency = coupler.communication()["adjacency_0"]
    assert (adjacency > 0).nonzero().tolist() == [[2, 0]]
