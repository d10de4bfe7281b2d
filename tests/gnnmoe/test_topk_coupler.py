"""``topk`` ("The set") by numbers: what it chooses, how it weighs, and the losses that keep it balanced.

Shapes: B batch, L length, E experts, D width.
"""

import math

import pytest
import torch

from tests.gnnmoe._routing import D, E, bare, identity_router, inputs, tokens, topk_core
from tests.gnnmoe._support import (
    assert_near,
    assert_same_function,
    make_coupler,
    normal,
)


@topk_core
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_topk_is_its_reference_for_every_k(k):
    coupler = make_coupler(coupler_type="topk", coupler_options={"k": k})
    assert_same_function(coupler, coupler.reference, inputs(), dict(coupler.named_parameters()))


@topk_core
def test_topk_of_two_is_the_softmax_over_the_two_chosen_logits():
    coupler = identity_router(bare("topk", k=2))
    x = normal(1, 1, E, D)
    layer_input = tokens([9.0, 10 + math.log(2.0), 5.0, 10 + math.log(6.0)])
    assert_near(coupler(x, layer_input), 0.25 * x[:, :, 1] + 0.75 * x[:, :, 3])


@topk_core
def test_topk_of_all_is_the_gate_with_the_same_weights():
    gate, topk = make_coupler(coupler_type="gate"), bare("topk", k=E)
    topk.router, topk.combiner = gate.router, gate.combiner
    assert_near(topk(*inputs()), gate(*inputs()))
    assert_near(topk.communication(*inputs())["gate_weights"], gate.communication(*inputs())["gate_weights"])
    assert (bare("topk", k=2)(*inputs()) - bare("gate")(*inputs())).abs().max() > 1e-2


@topk_core
def test_topk_prefers_the_first_of_equal_logits():
    for k in (1, 2, 3):
        coupler = bare("topk", k=k)
        x, layer_input = normal(1, 5, E, D), torch.zeros(1, 5, D, dtype=torch.float64)
        expected = x[:, :, :k].mean(2) if k > 1 else x[:, :, 0] / E
        assert_near(coupler(x, layer_input), expected)
        assert_near(coupler.reference(x, layer_input), expected)


@topk_core
def test_expert_load_counts_the_assignments():
    coupler = identity_router(bare("topk", k=2))
    layer_input = tokens([3, 2, 0, 0], [3, 0, 2, 0], [0, 3, 2, 0], [3, 2, 0, 0])
    communication = coupler.communication(normal(1, 4, E, D), layer_input)
    # slots: tokens 0, 1, 3 choose 0; 0, 2, 3 choose 1; 1, 2 choose 2; nobody chooses 3
    assert_near(communication["expert_load"], [3 / 8, 3 / 8, 2 / 8, 0])
    high = math.e / (1 + math.e)
    expected = [3 * high / 4, (high + 2 * (1 - high)) / 4, 2 * (1 - high) / 4, 0]
    assert_near(communication["gate_weights"], expected)
    for k in (1, 2, 3, 4):
        assert_near(bare("topk", k=k).communication(*inputs())["expert_load"].sum(), 1.0)


@topk_core
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_balanced_router_has_load_balance_alpha(k):
    coupler = identity_router(bare("topk", k=k, load_balance_alpha=0.07))
    turns = [[float((e - t) % E) for e in range(E)] for t in range(E)]  # each expert in each place once
    losses = coupler.auxiliary_losses(normal(1, E, E, D), tokens(*turns))
    assert_near(losses["load_balance"], 0.07)


@topk_core
@pytest.mark.parametrize("k", [1, 2])
def test_a_collapsed_router_has_more_load_balance(k):
    """All tokens alike: α E Σ_{e in T} p_e / k."""
    coupler = identity_router(bare("topk", k=k, load_balance_alpha=0.07))
    weights = [6.0, 2.0, 1.0, 1.0]
    layer_input = tokens(*[[math.log(w) for w in weights]] * 3)
    losses = coupler.auxiliary_losses(normal(1, 3, E, D), layer_input)
    assert_near(losses["load_balance"], 0.07 * 4 * sum(weights[:k]) / 10 / k)
    assert losses["load_balance"] > 0.07 * 1.5


@topk_core
def test_z_loss_is_the_mean_squared_logsumexp():
    coupler = identity_router(bare("topk", z_loss_weight=0.5))
    layer_input = tokens([0, 0, 0, 0], [math.log(w) for w in (1, 2, 3, 10)])
    losses = coupler.auxiliary_losses(normal(1, 2, E, D), layer_input)
    assert_near(losses["z_loss"], 0.5 * (math.log(4) ** 2 + math.log(16) ** 2) / 2)
    assert set(losses) == {"load_balance", "z_loss"}


@topk_core
def test_default_weights_of_the_losses():
    layer_input = torch.zeros(1, 1, D, dtype=torch.float64)
    losses = bare("topk").auxiliary_losses(normal(1, 1, E, D), layer_input)
    assert_near(losses["load_balance"], 1e-2)
    assert_near(losses["z_loss"], 1e-3 * math.log(4) ** 2)


@topk_core
def test_gradients_of_the_losses_reach_the_router_and_its_input_only():
    coupler = make_coupler(coupler_type="topk", coupler_options={"load_balance_alpha": 2.0})
    x, layer_input = (value.requires_grad_(True) for value in inputs())
    weight = coupler.router.weight
    losses = coupler.auxiliary_losses(x, layer_input)
    logits = layer_input @ weight.T
    load = coupler.communication(x, layer_input)["expert_load"]
    expected = {
        "load_balance": 2.0 * E * (load * logits.softmax(-1).mean((0, 1))).sum(),
        "z_loss": 1e-3 * logits.exp().sum(-1).log().square().mean(),
    }
    for name, loss in losses.items():
        found = torch.autograd.grad(loss, [weight, layer_input], retain_graph=True)
        wanted = torch.autograd.grad(expected[name], [weight, layer_input], retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert one.abs().max() > 1e-6
            assert_near(one, other, what=name)
        others = [x, *coupler.combiner.parameters()]
        assert torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True) == (None,) * 5


@topk_core
def test_the_router_of_a_single_expert_is_not_trained():
    coupler = make_coupler(coupler_type="topk", num_experts=1, coupler_options={"k": 1})
    x, layer_input = inputs(1)
    assert_near(coupler(x, layer_input), coupler.combiner(x[:, :, 0]))
    losses = coupler.auxiliary_losses(x, layer_input)
    assert_near(losses["load_balance"], 1e-2)
    assert losses["z_loss"] == 0
    (sum(losses.values()) + coupler(x, layer_input).sum()).backward()
    assert torch.count_nonzero(coupler.router.weight.grad) == 0
    assert set(coupler.inert_parameters()) == {"router.weight"}


@topk_core
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; it must be a whole number from 1 to "),
        ({"k": E + 1}, f"it must be a whole number from 1 to num_experts {E}"),
        ({"k": str(10**30)}, "it must be a whole number of at most 1,000,000,000"),
        ({"k": "-3"}, "k is -3; it must be"),
        (
            {"load_balance_alpha": -0.1},
            "load_balance_alpha is -0.1; it must be a finite number of at least 0",
        ),
        ({"z_loss_weight": float("nan")}, "z_loss_weight is nan; it must be a finite number"),
        ({"k": "two"}, "option k of coupler topk is 'two'; it must be of type int"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bare("topk", **options)
