"""Attention over experts and the mean with linear maps ("The set"), each by numbers.

Shapes: B batch, L length, E experts, D width.
"""

import pytest
import torch
from torch import nn

from gnnmoe.couplers.attention import ExpertAttention
from tests.gnnmoe._support import assert_near, make_coupler, normal

B, L, E, D = 2, 3, 4, 6
attention_core = pytest.mark.core("coupler:attention")
linear_core = pytest.mark.core("coupler:mean_linear")


def torch_attention(layer: ExpertAttention) -> nn.MultiheadAttention:
    """torch's own attention with the layer's weights, and keys without bias."""
    q, k, v = layer.query, layer.key, layer.value
    theirs = nn.MultiheadAttention(D, layer.num_heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([q.bias, torch.zeros_like(q.bias), v.bias]))
        theirs.out_proj.weight.copy_(layer.output.weight)
        theirs.out_proj.bias.copy_(layer.output.bias)
    return theirs


@attention_core
@pytest.mark.parametrize("num_heads", [1, 2, 3, 6])
def test_attention_is_torchs_own_with_a_residual(num_heads):
    coupler = make_coupler(coupler_type="attention", num_heads=num_heads, gnn_layers=2)
    x = normal(B, L, E, D)
    y = x.flatten(0, 1)
    maps = []
    for layer in coupler.layers:
        heard, weights = torch_attention(layer)(y, y, y)  # weights: the mean over heads
        y = y + heard
        maps.append(weights.mean(0))
    assert len(coupler.layers) == 2
    assert_near(coupler(x), coupler.combiner(y.mean(1)).view(B, L, D))
    communication = coupler.communication(x)
    assert set(communication) == {"adjacency_0", "adjacency_1", "mixing"}
    for k, expected in enumerate(maps):
        assert_near(communication[f"adjacency_{k}"], expected)


@linear_core
@pytest.mark.parametrize("strategy", ["all_pairs", "all_triplets", "all"])
def test_mean_linear_is_the_linear_hypergraph_stack(strategy):
    """Fact 3: without activation, residual and weights, a complete hypergraph is a plain mean."""
    hypergraph = make_coupler(
        coupler_type="HGNN", static_hyperedge_strategy=strategy, hgnn_learnable_edge_weights=False,
        coupler_options={"activation": "none", "residual": False},
    )  # fmt: skip
    control = make_coupler(coupler_type="mean_linear", seed=1)
    for ours, theirs in zip(control.maps, hypergraph.layers, strict=True):
        with torch.no_grad():
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    control.combiner = hypergraph.combiner
    x = normal(B, L, E, D)
    assert_near(control(x), hypergraph(x))
    counts = [sum(p.numel() for p in coupler.parameters()) for coupler in (control, hypergraph)]
    assert counts[0] == counts[1]
