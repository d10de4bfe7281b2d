"""The contract (DESIGN, "Coupler"), over every coupler that discovery finds.

A new coupler file is tested here by being there. That no token reaches another, that a coupler keeps no
state, and that a batch is its sequences are the leak check's: tests/check/test_leak_check.py runs it.
"""

import copy

import pytest
import torch
from torch import Tensor

from gnnmoe.couplers.base import Coupler, check_contract
from gnnmoe.couplers.registry import (
    coupler_class,
    coupler_names,
    coupler_option_defaults,
    fields_read_by,
)
from gnnmoe.layers.base import LAYERS, HypergraphLayer
from tests.gnnmoe._support import (
    NO_HYPEREDGES,
    assert_near,
    assert_same_function,
    every_conv_type,
    every_coupler,
    gradients,
    make_coupler,
    make_layer,
    normal,
    perturbed,
)

pytestmark = pytest.mark.filterwarnings(NO_HYPEREDGES)
B, L, D = 2, 3, 6


def inputs(E: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(B, L, E, D, seed=seed, dtype=dtype), normal(B, L, D, seed=seed + 50, dtype=dtype)


def has_none(coupler: Coupler) -> bool:
    """Whether it is the dense model's, which alone has no parameters to draw, keep or move."""
    none = not list(coupler.parameters())
    assert none == (coupler.name == "dense")
    return none


@every_coupler
def test_forward_is_the_reference_with_all_gradients(fields):
    for E in (1, 2, 3, 5, 8):
        coupler = make_coupler(num_experts=E, **fields)
        parameters = dict(coupler.named_parameters())
        assert_same_function(coupler, coupler.reference, inputs(E), parameters)


@every_coupler
def test_output_has_one_feature_vector_per_token_and_depends_on_every_expert(fields):
    """Every token depends on some expert, and every expert matters to some token (a router is sparse)."""
    coupler = make_coupler(**fields)
    x, layer_input = normal(4, 6, 4, D), normal(4, 6, D, seed=51)
    x.requires_grad_(True)
    output = coupler(x, layer_input)
    assert output.shape == (4, 6, D)
    (gradient,) = gradients(output, [x])
    depends = gradient.abs().amax(-1) > 1e-8
    assert depends.any(2).all()
    assert depends.flatten(0, 1).any(0).all()


@every_coupler
def test_any_stride_gives_the_same(fields):
    """The batched experts write expert-major; the coupler sees a view (B, L, E, D) of that."""
    coupler = make_coupler(**fields)
    x, layer_input = inputs()
    expert_major = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert not expert_major.is_contiguous()
    assert_same_function(
        lambda x, y: coupler(x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), y),
        coupler, (x, layer_input), dict(coupler.named_parameters()),
    )  # fmt: skip
    assert_near(coupler(expert_major, layer_input), coupler(x, layer_input))


@every_coupler
def test_the_same_seed_builds_the_same_coupler_and_a_state_dict_holds_all_that_matters(fields):
    one, two, other = (make_coupler(seed=seed, **fields) for seed in (3, 3, 4))
    assert torch.equal(one(*inputs()), two(*inputs()))
    assert torch.equal(one(*inputs()), other(*inputs())) == has_none(one)
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(*inputs()), other(*inputs()))


@every_coupler
def test_a_deepcopy_is_equal_and_independent(fields):
    coupler = make_coupler(**fields)
    before = coupler(*inputs())
    copied = copy.deepcopy(coupler)
    assert torch.equal(copied(*inputs()), before)
    perturbed(copied)
    assert torch.equal(copied(*inputs()), before) == has_none(coupler)
    assert torch.equal(coupler(*inputs()), before)


@every_coupler
def test_several_inputs_and_several_seeds_go_as_one_batch(fields):
    """Under ``torch.func.vmap``: stacked inputs and parameters give the output and gradients of each seed."""
    couplers = [make_coupler(seed, **fields) for seed in (0, 1)]
    calls = [inputs(seed=seed) for seed in (1, 2)]
    stacked, _ = torch.func.stack_module_state(couplers)
    values = [torch.stack(values) for values in zip(*calls, strict=True)]

    def call(parameters, *values):
        output = torch.func.functional_call(couplers[0], parameters, values)
        return output.square().sum(), output

    together, found = torch.func.vmap(torch.func.grad(call, has_aux=True))(stacked, *values)
    for seed, (coupler, own) in enumerate(zip(couplers, calls, strict=True)):
        alone, output = torch.func.grad(call, has_aux=True)(dict(coupler.named_parameters()), *own)
        assert_near(found[seed], output)
        for name, gradient in alone.items():
            assert_near(together[name][seed], gradient, what=name)
    losses = torch.func.vmap(couplers[0].auxiliary_losses)(*values)
    for seed, own in enumerate(calls):
        for name, loss in couplers[0].auxiliary_losses(*own).items():
            assert_near(losses[name][seed], loss, what=name)


@every_coupler
def test_float32_and_bf16_follow_float64_with_finite_gradients(fields):
    expected = make_coupler(**fields)(*inputs())
    coupler = make_coupler(**fields).float()
    assert_near(coupler(*inputs(dtype=torch.float32)), expected, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # what the experts give, without and with autocast
        x, layer_input = inputs(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            low = coupler(x.requires_grad_(True), layer_input)
        assert_near(low, expected, torch.bfloat16)
        assert all(g.isfinite().all() for g in gradients(low.float(), [x, *coupler.parameters()]))


@every_coupler
def test_auxiliary_losses_are_scalars_and_pure(fields):
    coupler = make_coupler(**fields)
    losses = coupler.auxiliary_losses(*inputs())
    again = coupler.auxiliary_losses(*inputs())
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    assert losses.keys() == again.keys()
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    if coupler.name in ("mean", "dense", "GNN", "HGNN", "mean_linear", "static", "gate", "attention"):
        assert losses == {}


@every_coupler
def test_communication_is_small_detached_and_static_where_it_says_so(fields):
    coupler = make_coupler(num_experts=5, **fields)
    static = coupler.communication()
    full = coupler.communication(*inputs(5))
    longer = coupler.communication(normal(1, 4, 5, D), normal(1, 4, D))
    assert "mixing" not in static
    assert "mixing" in full
    for name, value in static.items():
        assert torch.equal(value, full[name])
    for name, value in full.items():
        assert not value.requires_grad
        assert value.numel() <= 5 * 20  # experts × hyperedges
        assert value.shape == longer[name].shape
    assert all(parameter.grad is None for parameter in coupler.parameters())
    matrices = coupler.get_expert_communication_matrices()
    assert isinstance(matrices, list)
    assert [m.tolist() for m in matrices] == [value.tolist() for value in static.values()]
    for name, members in coupler.member_names().items():
        assert name not in full or len(members) == full[name].shape[0]


@every_coupler
def test_mixing_is_the_share_of_each_expert_in_the_output(fields):
    """Mean over tokens of ‖∂y/∂x_e‖, normalised for each token: recomputed from one Jacobian per token."""
    coupler = make_coupler(**fields)
    x, layer_input = inputs()
    mixing = coupler.communication(x, layer_input)["mixing"]
    assert_near(mixing.sum(), 1.0)
    norms = []
    for x_ED, input_D in zip(x.flatten(0, 1), layer_input.flatten(0, 1), strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, y=input_D: coupler(x[None, None], y[None, None])[0, 0], x_ED
        )
        assert isinstance(jacobian, Tensor)
        norms.append(jacobian.square().sum((0, 2)).sqrt())  # (D, E, D) → (E)
    assert_near(mixing, torch.stack([norm / norm.sum() for norm in norms]).mean(0))


@every_coupler
def test_inert_parameters_are_named_and_have_no_gradient(fields):
    for E in (1, 2, 3, 4):
        coupler = make_coupler(num_experts=E, **fields)
        parameters = dict(coupler.named_parameters())
        inert = coupler.inert_parameters()
        assert inert.keys() <= parameters.keys()
        if not parameters:
            continue
        found = dict(zip(parameters, gradients(coupler(*inputs(E)), parameters.values()), strict=True))
        for name, gradient in found.items():
            assert (gradient.abs().max() > 1e-9) == (name not in inert), (E, name)


@pytest.mark.parametrize("name", coupler_names())
def test_a_coupler_of_the_package_says_what_it_is(name):
    """Asked of couplers in ``gnnmoe/couplers/`` only; a class from outside needs ``forward`` alone."""
    cls = coupler_class(name)
    check_contract(cls)
    missing = [
        part for part in (".. math::", "Shapes:", "(B, L, E, D)", "Source:") if part not in str(cls.__doc__)
    ]
    assert not missing, f"the docstring of {cls.__name__} lacks {missing}; see gnnmoe/couplers/mean.py"
    coupler = make_coupler(coupler_type=name)
    assert coupler.reference(*inputs()) is not None, f"{cls.__name__} has no reference()"
    assert coupler.flops(1) is not None, f"{cls.__name__} has no flops()"
    reads = fields_read_by(cls, coupler_option_defaults(cls))
    assert reads is not None, f"{cls.__name__} has no config_fields"


@every_conv_type
def test_a_layer_of_the_package_says_what_it_is(conv_type):
    cls = LAYERS[conv_type]
    doc = "".join(str(base.__doc__) for base in cls.__mro__ if issubclass(base, HypergraphLayer))
    missing = [part for part in (".. math::", "Shapes:", "Source:") if part not in doc]
    assert not missing, f"the docstring of {cls.__name__} lacks {missing}; see gnnmoe/layers/mean.py"
    layer = make_layer([(0, 1), (1, 2)], 3, conv_type)
    x = list(normal(1, 3, 3).unbind(1))
    assert layer.naive(x, normal(2).exp(), x) is not None, f"{cls.__name__} has no naive()"
    assert layer.flops(1) is not None, f"{cls.__name__} has no flops()"


def test_mean_is_the_mean():
    coupler = make_coupler(coupler_type="mean")
    x, _ = inputs()
    total = (x[:, :, 0] + x[:, :, 1] + x[:, :, 2] + x[:, :, 3]) / 4
    linear, _, norm = coupler.combiner
    hidden = total @ linear.weight.T + linear.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    centred = hidden - hidden.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_near(coupler(x), scaled * norm.weight + norm.bias)
    assert_near(coupler.communication(x)["mixing"], torch.full((4,), 0.25))
