"""The couplers that weigh experts ("The set"), each by numbers: static and gate, and what routers share.

``topk`` has a file of its own. Shapes: B batch, L length, E experts, D width.
"""

import math

import pytest
import torch

from gnnmoe import build_coupler
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
)
from tests.gnnmoe._support import assert_near, make_coupler, normal, small_config

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
