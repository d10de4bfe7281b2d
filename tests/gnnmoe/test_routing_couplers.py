"""The couplers that weigh experts: static, gate and topk ("The set"), each by numbers.

Shapes: B batch, L length, E experts, D width.
"""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe import build_coupler
from gnnmoe.couplers.static import weighted_sum
from tests.gnnmoe._support import (
    assert_near,
    assert_same_function,
    make_coupler,
    make_model,
    normal,
    small_config,
    token_ids,
)

B, L, E, D = 2, 3, 4, 6
static_core = pytest.mark.core("coupler:static")
gate_core = pytest.mark.core("coupler:gate")
topk_core = pytest.mark.core("coupler:topk")
routers = pytest.mark.parametrize(
    "name", [pytest.param("gate", marks=gate_core), pytest.param("topk", marks=topk_core)]
)


def bare(name, num_experts=E, **options):
    """A coupler without its combiner: the output is the mixture itself."""
    coupler = make_coupler(coupler_type=name, num_experts=num_experts, coupler_options=options)
    coupler.combiner = nn.Identity()
    return coupler


def router_of(coupler, *rows):
    """Set the rows of the router, one for each expert, and return the coupler."""
    with torch.no_grad():
        coupler.router.weight.copy_(torch.tensor(rows, dtype=coupler.router.weight.dtype))
    return coupler


def inputs(num_experts=E, dtype=torch.float64):
    return normal(B, L, num_experts, D, dtype=dtype), normal(B, L, D, seed=51, dtype=dtype)


def tokens(*features):
    """One sequence: a row of D numbers for each token, filled up with zeros."""
    return torch.tensor([[[*row, *[0.0] * (D - len(row))] for row in features]], dtype=torch.float64)


def identity_router(coupler, num_experts=E, scale=1.0):
    """Logit e of a token is ``scale`` times its feature e."""
    return router_of(coupler, *(scale * torch.eye(num_experts, D)).tolist())


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
        shares = layer(experts, hypergraph.effective_hyperedge_weights()).mean((1, 2))
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


# topk


@topk_core
def test_topk_of_one_is_the_best_expert_scaled_by_its_probability():
    coupler = bare("topk", k=1)
    x, layer_input = inputs()
    p_BLE = (layer_input @ coupler.router.weight.T).softmax(-1)
    p_BL, best_BL = p_BLE.max(-1)
    assert len(best_BL.unique()) > 1
    chosen = torch.stack([x[b, t, best_BL[b, t]] for b in range(B) for t in range(L)]).view(B, L, D)
    assert_near(coupler(x, layer_input), p_BL[..., None] * chosen)


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
@pytest.mark.parametrize("k", [1, 2, 3, 4])
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
def test_a_step_down_the_load_balance_takes_from_the_overloaded_expert():
    rows = [[0.1 * (e == 0)] * D for e in range(E)]
    coupler = router_of(bare("topk", k=1, load_balance_alpha=1.0), *rows)
    x, layer_input = normal(8, 8, E, D), normal(8, 8, D).abs()
    assert_near(coupler.communication(x, layer_input)["expert_load"], [1, 0, 0, 0])
    before = coupler.auxiliary_losses(x, layer_input)["load_balance"]
    (gradient,) = torch.autograd.grad(before, coupler.router.weight)
    with torch.no_grad():
        coupler.router.weight -= 0.01 * gradient
    step = coupler.router.weight.detach() - torch.tensor(rows)
    assert (step[0] < 0).all()
    assert (step[1:] > 0).all()
    assert coupler.auxiliary_losses(x, layer_input)["load_balance"] < before - 1e-4


@topk_core
def test_the_losses_are_part_of_what_a_model_trains_on():
    model = make_model(coupler_type="topk").train()
    output = model(token_ids(2, 8), labels=token_ids(2, 8))
    assert output["auxiliary_loss"] > 2 * 1e-2 * 0.5
    output["auxiliary_loss"].backward()
    assert all(layer.coupler.router.weight.grad.abs().max() > 0 for layer in model.layers)


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
def test_more_than_all_experts_warns_once_and_takes_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_of_them = bare("topk", k=E)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coupler = bare("topk", k=9)
        assert_near(coupler(*inputs()), all_of_them(*inputs()))
    message = "topk: k is 9, more than num_experts 4; all experts are used."
    assert [str(warning.message) for warning in caught] == [message]


@topk_core
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; it must be a whole number of at least 1"),
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


# all of them


@pytest.mark.parametrize("k", [1, 2, 4])
@topk_core
def test_topk_works_under_vmap_with_its_losses(k):
    coupler = make_coupler(coupler_type="topk", coupler_options={"k": k})
    x, layer_input = normal(5, B, L, E, D), normal(5, B, L, D, seed=51)
    expected = torch.stack([coupler(*pair) for pair in zip(x, layer_input, strict=True)])
    assert_near(torch.func.vmap(coupler)(x, layer_input), expected)
    losses = torch.func.vmap(coupler.auxiliary_losses)(x, layer_input)
    for name in losses:
        one_by_one = [coupler.auxiliary_losses(*pair)[name] for pair in zip(x, layer_input, strict=True)]
        assert_near(losses[name], torch.stack(one_by_one))


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
