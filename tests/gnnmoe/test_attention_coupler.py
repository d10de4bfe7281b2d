"""Attention over experts and the mean with linear maps ("The set"), each by numbers.

Shapes: B batch, L length, E experts, D width.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe import build_coupler
from gnnmoe.couplers.attention import ExpertAttention
from tests.gnnmoe._support import assert_near, make_coupler, normal, perturbed, small_config

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


@attention_core
def test_attention_by_hand_for_two_experts_of_width_one():
    layer = ExpertAttention(embed_dim=1, num_experts=2, num_heads=1).double()
    values = {"query.weight": [[2.0]], "query.bias": [0.5], "key.weight": [[-1.0]], "value.weight": [[3.0]],
              "value.bias": [0.25], "output.weight": [[0.5]], "output.bias": [-1.0]}  # fmt: skip
    layer.load_state_dict({name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})
    x = torch.tensor([[[1.0], [-0.5]]], dtype=torch.float64)
    updated, attention = layer(x), layer.attention(x)
    # keys −1 and 0.5; queries 2.5 and −0.5; values 3.25 and −1.25
    to_first = [1 / (1 + math.exp(2.5 * 1.5)), 1 / (1 + math.exp(-0.5 * 1.5))]
    assert_near(attention, [[[[a, 1 - a] for a in to_first]]])
    heard = [3.25 * a - 1.25 * (1 - a) for a in to_first]
    assert_near(updated, [[[1.0 + 0.5 * heard[0] - 1.0], [-0.5 + 0.5 * heard[1] - 1.0]]])


@attention_core
def test_attention_rows_listen_and_sum_to_one():
    coupler = make_coupler(coupler_type="attention", gnn_layers=1)
    attention = coupler.communication(normal(B, L, E, D))["adjacency_0"]
    assert_near(attention.sum(1), torch.ones(E))
    assert (attention.sum(0) - 1).abs().max() > 1e-2
    # all listen to expert 2 where its key answers every query
    layer = coupler.layers[0]
    x = torch.zeros(1, 1, E, D, dtype=torch.float64)
    x[:, :, 2] = 1.0
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.fill_(1.0)
        layer.key.weight.fill_(10.0)
    assert_near(coupler.communication(x)["adjacency_0"], torch.eye(E)[2].expand(E, E))


@attention_core
def test_attention_does_not_know_the_order_of_the_experts():
    coupler = make_coupler(coupler_type="attention")
    x, order = normal(B, L, E, D), [2, 0, 3, 1]
    assert_near(coupler(x[:, :, order]), coupler(x))
    before, after = (coupler.communication(v)["adjacency_1"] for v in (x, x[:, :, order]))
    assert (after - before).abs().max() > 1e-3
    assert_near(after, before[order][:, order])


@attention_core
def test_the_mixing_of_attention_depends_on_the_token():
    coupler = make_coupler(coupler_type="attention")
    one, other = (coupler.communication(normal(1, 1, E, D, seed=seed))["mixing"] for seed in (1, 2))
    assert (one - other).abs().max() > 1e-2


@attention_core
def test_attention_has_a_parameter_for_each_map_and_no_key_bias():
    coupler: Any = build_coupler(small_config(coupler_type="attention", gnn_layers=3))
    names = {name for name, _ in coupler.layers[0].named_parameters()}
    weights = {f"{part}.weight" for part in ("query", "key", "value", "output")}
    assert names == weights | {"query.bias", "value.bias", "output.bias"}
    assert sum(p.numel() for p in coupler.layers.parameters()) == 3 * (4 * D * D + 3 * D)


@attention_core
def test_attention_starts_as_torchs_own():
    torch.manual_seed(0)
    layer, theirs = ExpertAttention(256, 2, 4), nn.MultiheadAttention(256, 4)
    ours = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
    for one, other in ((ours, theirs.in_proj_weight), (layer.output.weight, theirs.out_proj.weight)):
        assert one.abs().max().item() == pytest.approx(other.abs().max().item(), rel=1e-3)
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.02)
    for linear in (layer.query, layer.value, layer.output):
        assert torch.count_nonzero(linear.bias) == 0


@attention_core
def test_attention_of_one_expert_is_two_maps_and_a_residual():
    coupler = make_coupler(coupler_type="attention", num_experts=1, gnn_layers=1)
    layer, x = coupler.layers[0], normal(B, L, 1, D)
    one = x[:, :, 0]
    assert_near(coupler(x), coupler.combiner(one + layer.output(layer.value(one))))
    inert = {f"layers.0.{part}" for part in ("query.weight", "query.bias", "key.weight")}
    assert set(coupler.inert_parameters()) == inert


@attention_core
def test_attention_gradcheck():
    coupler = make_coupler(coupler_type="attention", num_experts=3, embed_dim=2, gnn_layers=1)
    names, values = zip(*coupler.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(coupler, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (normal(1, 2, 3, 2).requires_grad_(True), *values))


@linear_core
@pytest.mark.parametrize("gnn_layers", [1, 3])
def test_mean_linear_is_the_mean_and_its_maps_one_after_the_other(gnn_layers):
    coupler = make_coupler(coupler_type="mean_linear", gnn_layers=gnn_layers)
    x = normal(B, L, E, D)
    h = (x[:, :, 0] + x[:, :, 1] + x[:, :, 2] + x[:, :, 3]) / 4
    maps = list(coupler.maps)
    assert len(maps) == gnn_layers
    for layer in maps:
        h = h @ layer.weight.T + layer.bias
    assert_near(coupler(x), coupler.combiner(h))
    assert_near(coupler.communication(x)["mixing"], torch.full((E,), 0.25))


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


@linear_core
def test_mean_linear_starts_as_the_hypergraph_stack_does():
    torch.manual_seed(0)
    coupler: Any = build_coupler(small_config(coupler_type="mean_linear", embed_dim=256))
    for layer in coupler.maps:
        assert torch.count_nonzero(layer.bias) == 0
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=1e-3)


@pytest.mark.parametrize(("num_experts", "gnn_layers"), [(1, 3), (3, 1), (8, 3)])
@pytest.mark.parametrize(
    "name",
    [pytest.param("mean", marks=pytest.mark.core("coupler:mean")),
     pytest.param("mean_linear", marks=linear_core), pytest.param("attention", marks=attention_core)],
)  # fmt: skip
def test_flops_are_what_torch_counts(name, num_experts, gnn_layers):
    coupler = make_coupler(coupler_type=name, num_experts=num_experts, gnn_layers=gnn_layers)
    for batch, length in ((1, 1), (2, 5)):
        with FlopCounterMode(display=False) as counter:
            coupler(normal(batch, length, num_experts, D))
        assert coupler.flops(batch * length) == counter.get_total_flops()


@pytest.mark.parametrize(
    "name",
    [pytest.param("mean_linear", marks=linear_core), pytest.param("attention", marks=attention_core)],
)
def test_finite_under_autocast_and_the_same_under_vmap(name):
    coupler = make_coupler(coupler_type=name)
    x = normal(5, B, L, E, D)
    assert_near(torch.func.vmap(coupler)(x), torch.stack([coupler(one) for one in x]))
    low = perturbed(coupler.float())
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x[0].to(dtype).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            output = low(leaf)
        output.float().square().sum().backward()
        assert output.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
