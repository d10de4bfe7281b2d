"""The couplers that weigh experts ("The set"), each by numbers: static and gate, and what routers share.

``topk`` has a file of its own. Shapes: B batch, L length, E experts, D width.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe import build_coupler
from gnnmoe.couplers.static import weighted_sum
from tests.gnnmoe._routing import (
    B,
    D,
    E,
    L,
    bare,
    gate_core,
    inputs,
    router_of,
    routers,
    static_core,
    tokens,
    topk_core,
)
from tests.gnnmoe._support import assert_near, hear, make_coupler, normal, small_config

# static


@static_core
def test_static_is_a_hand_weighted_mean_and_starts_as_the_mean():
    coupler = bare("static", num_experts=3)
    x, _ = inputs(3)
    with torch.no_grad():
        coupler.expert_logits.copy_(torch.tensor([1.0, 3.0, 4.0], dtype=x.dtype).log())
    assert_near(coupler(x), (x[:, :, 0] + 3 * x[:, :, 1] + 4 * x[:, :, 2]) / 8)
    communication = coupler.communication(x)
    assert_near(communication["expert_weights"], [1 / 8, 3 / 8, 4 / 8])
    assert_near(communication["mixing"], [1 / 8, 3 / 8, 4 / 8])
    start = build_coupler(small_config(coupler_type="static"))
    assert start.communication()["expert_weights"].tolist() == [0.25] * 4


@static_core
def test_static_is_a_weighted_linear_hypergraph_layer():
    """Fact 3: one set of weights for all tokens, whatever the hyperedges weigh."""
    hypergraph = make_coupler(
        coupler_type="HGNN", gnn_layers=1, coupler_options={"activation": "none", "residual": False}
    )
    layer, (x, _) = hypergraph.layers[0], inputs()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(D))
        layer.bias.zero_()
        experts = torch.eye(E, dtype=x.dtype)[:, :, None].expand(E, E, D)  # "token" e: expert e says 1
        shares = hear(layer, experts, hypergraph.effective_hyperedge_weights()).mean((1, 2))
    assert shares.max() - shares.min() > 1e-2  # not the plain mean
    static = make_coupler(coupler_type="static")
    with torch.no_grad():
        static.expert_logits.copy_(shares.log())
    static.combiner = hypergraph.combiner
    assert_near(static(x), hypergraph(x))
    assert_near(hypergraph.communication(x)["mixing"], shares)


def test_weighted_sum_takes_shared_weights_and_any_stride():
    x = normal(E, B, L, D).permute(1, 2, 0, 3)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    expected = 0.5 * x[:, :, 0] - x[:, :, 1] + 2 * x[:, :, 2]
    assert_near(weighted_sum(weights.expand(B, L, E), x), expected)


# gate


@gate_core
def test_gate_weighs_by_the_softmax_of_its_logits():
    coupler = router_of(bare("gate", 2), [1.0, 0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0])
    x = normal(1, 2, 2, D)
    layer_input = tokens([0.0, math.log(3.0)], [math.log(4.0), 0.0])
    expected = torch.stack([0.25 * x[0, 0, 0] + 0.75 * x[0, 0, 1], 0.8 * x[0, 1, 0] + 0.2 * x[0, 1, 1]])
    assert_near(coupler(x, layer_input), expected[None])
    communication = coupler.communication(x, layer_input)
    assert_near(communication["gate_weights"], [(0.25 + 0.8) / 2, (0.75 + 0.2) / 2])
    assert_near(communication["mixing"], communication["gate_weights"])


@pytest.mark.parametrize(
    ("name", "weights"),
    [pytest.param("static", "expert_weights", marks=static_core),
     pytest.param("gate", "gate_weights", marks=gate_core)],
)  # fmt: skip
def test_mixing_is_the_mean_of_the_weights_though_the_combiner_is_not_linear(name, weights):
    """However steep the combiner is at a token: each counts as much as any other."""
    coupler = make_coupler(coupler_type=name)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]
    x, layer_input = normal(B, 3, E, D) * scales[..., None], 3 * normal(B, 3, D, seed=51)
    communication = coupler.communication(x, layer_input)
    assert communication[weights].max() - communication[weights].min() > 0.03
    assert_near(communication["mixing"], communication[weights])


@routers
def test_router_starts_small_and_without_bias(name):
    torch.manual_seed(0)
    config = small_config(coupler_type=name, embed_dim=512, num_experts=16)
    router = build_coupler(config).router
    assert isinstance(router, nn.Linear)
    assert router.bias is None
    assert router.weight.shape == (16, 512)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


@routers
def test_without_layer_input_a_router_says_what_it_needs(name):
    coupler = make_coupler(coupler_type=name)
    x, _ = inputs()
    for call in (coupler, coupler.reference, coupler.communication):
        with pytest.raises(ValueError, match=f"'{name}' routes by layer_input, which is None"):
            call(x)
    assert coupler.communication() == {}


# all of them


@routers
@pytest.mark.parametrize("expert_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_router_stays_in_float32(name, expert_dtype):
    """The experts write bf16, the residual stream is float32."""
    coupler = make_coupler(coupler_type=name).float()
    mean = make_coupler(coupler_type="mean").float()
    x = normal(B, L, E, D, dtype=expert_dtype).requires_grad_(True)
    layer_input = inputs(dtype=torch.float32)[1].requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        output = coupler(x, layer_input)
        losses = coupler.auxiliary_losses(x, layer_input)
        weights = coupler.communication(x, layer_input)["gate_weights"]
        assert output.dtype == mean(x).dtype
    assert output.isfinite().all()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert torch.equal(weights, coupler.communication(x.float(), layer_input)["gate_weights"])
    (output.float().square().sum() + sum(losses.values())).backward()
    for leaf in (x, layer_input, *coupler.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad.dtype == expert_dtype


@pytest.mark.parametrize("num_experts", [1, 3, 8])
@pytest.mark.parametrize(
    "name",
    [pytest.param("static", marks=static_core), pytest.param("gate", marks=gate_core),
     pytest.param("topk", marks=topk_core)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:topk. k is 2")
def test_flops_are_what_torch_counts(name, num_experts):
    coupler = make_coupler(coupler_type=name, num_experts=num_experts)
    for batch, length in ((1, 1), (2, 5)):
        call = normal(batch, length, num_experts, D), normal(batch, length, D)
        with FlopCounterMode(display=False) as counter:
            coupler(*call)
        assert coupler.flops(batch * length) == counter.get_total_flops()
