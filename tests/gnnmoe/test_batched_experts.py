"""The batched experts are the loop: outputs, gradients, start, names, and their layout in memory."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gnnmoe import GNNMoEModel
from gnnmoe.experts import BatchedExperts, ExpertBlock, ExpertLoop
from tests.gnnmoe._support import assert_near, normal, perturbed, small_config, token_ids

pytestmark = pytest.mark.core("layer")
every_count = pytest.mark.parametrize("E", [1, 5])
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def two_forms(E: int, D: int = 16, **fields) -> tuple[Any, Any]:
    """The same experts in both forms, each parameter of its own."""
    config = small_config(embed_dim=D, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        loop = ExpertLoop(perturbed(ExpertBlock(config, ffn_dim=24)) for _ in range(E))
    return loop, BatchedExperts(list(loop))  # pyright: ignore[reportArgumentType]


def by_expert(batched: BatchedExperts, gradient: bool) -> dict[str, Tensor]:
    """The parameters, or their gradients, of the batched form under the names that the loop has."""
    copied = copy.deepcopy(batched)
    if gradient:
        for own, parameter in zip(copied.parameters(), batched.parameters(), strict=True):
            assert parameter.grad is not None
            own.data = parameter.grad
    return copied.state_dict()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", PRECISIONS)
@every_count
def test_outputs_and_every_gradient_are_those_of_the_loop(E, dtype, device):
    """float64 to 1e-10, float32 to 1e-5, bf16 (under autocast, both against float32) to 3e-2."""
    low = dtype == torch.bfloat16
    own = torch.float32 if low else dtype
    loop, batched = (form.to(device, own) for form in two_forms(E))
    inputs: Any = [normal(3, 8, 16, dtype=own).to(device).requires_grad_(True) for _ in range(2)]
    weights = normal(3, 8, E, 16, seed=5, dtype=own).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=low):
        found = batched(inputs[1])
        if low:
            assert found.dtype == loop(inputs[0]).dtype == torch.bfloat16
    expected = loop(inputs[0])
    for output in (expected, found):
        (output * weights).sum().backward()
    assert_near(found.cpu(), expected.cpu(), dtype)
    assert_near(inputs[1].grad.cpu(), inputs[0].grad.cpu(), dtype, "gradient of the input")
    gradients = by_expert(batched, gradient=True)
    named = dict(loop.named_parameters())
    assert list(gradients) == list(named)
    for name, parameter in named.items():
        assert_near(gradients[name].cpu(), parameter.grad.cpu(), dtype, name)


@every_count
def test_dropout_acts_in_training_only_and_on_each_expert_by_itself(E):
    loop, batched = two_forms(E, dropout_rate=0.5)
    x = normal(2, 8, 16, dtype=torch.float32)
    assert_near(batched.eval()(x), loop.eval()(x), torch.float32)
    same = batched.eval().state_dict()
    for name, value in same.items():  # every expert the same, so that only the masks differ
        same[name] = same["0." + name.split(".", 1)[1]] if E > 1 else value
    batched.load_state_dict(same)
    first, second = batched.train()(x), batched(x)
    assert not torch.equal(first, second)
    assert len({tuple(output.flatten().tolist()) for output in first.unbind(2)}) == E


def drops(form, monkeypatch) -> list[tuple[str, float]]:
    """Where a form drops, in order, and at which rate: by the width of what is dropped, or in attention."""
    found, drop, attention = [], F.dropout, F.scaled_dot_product_attention

    def dropped(x, p=0.5, training=True, inplace=False):
        found.append((f"of width {x.shape[-1]}", p if training else 0.0))
        return drop(x, p, training, inplace)

    def attended(*parts, **named):
        found.append(("attention", named["dropout_p"]))
        return attention(*parts, **named)

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropped)
        patch.setattr(F, "scaled_dot_product_attention", attended)
        form(normal(2, 8, 16, dtype=torch.float32))
    return found


def test_all_that_the_loop_drops_is_dropped_at_the_same_rate(monkeypatch):
    """Of each expert: attention, what it adds (D 16), the hidden layer (F 24), and what that adds."""
    loop, batched = two_forms(1, dropout_rate=0.25)
    expected = drops(loop[0], monkeypatch)
    places = ["attention", "of width 16", "of width 24", "of width 16"]
    assert expected == [(place, 0.25) for place in places]
    assert drops(batched, monkeypatch) == expected
    assert drops(batched.eval(), monkeypatch) == [(place, 0.0) for place in places]


def test_both_forms_hand_over_a_view_of_expert_major_memory():
    for form in two_forms(4):
        output = form(normal(2, 8, 16, dtype=torch.float32))
        assert output.shape == (2, 8, 4, 16)
        assert output.permute(2, 0, 1, 3).is_contiguous()


def test_queries_keys_and_values_are_views_and_attention_is_called_once(monkeypatch):
    """(B, E·H, L, d) by strides alone, with a contiguous last dimension, causal without a mask."""
    _, batched = two_forms(5)
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *args, **named: calls.append((args, named)) or attention(*args, **named),
    )  # fmt: skip
    batched(normal(3, 8, 16, dtype=torch.float32))
    ((parts, named),) = calls
    assert named == {"dropout_p": 0.0, "is_causal": True}
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for part in parts:
        assert part.shape == (3, 10, 8, 8)
        assert part.stride() == (8 * 3 * 5 * 16, 8, 3 * 5 * 16, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 1, "coupler_type": "mean"},
        {"coupler_type": "dense"},
        {"initialization": "original"},
    ],
)
def test_both_forms_start_from_the_same_numbers_under_the_same_names(fields):
    config = small_config(**fields)
    loop, batched = (GNNMoEModel(config, seed=3, experts=experts) for experts in ("loop", "batched"))
    expected, found = loop.state_dict(), batched.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert loop.parameter_counts() == batched.parameter_counts()
    assert loop.flops(2, 8) == batched.flops(2, 8)
    ids = token_ids(2, 8)
    assert_near(batched(ids)["logits"], loop(ids)["logits"], torch.float32)


def test_state_dicts_convert_both_ways_and_are_loaded_strictly():
    loop, batched = (
        perturbed(GNNMoEModel(small_config(), seed=seed, experts=experts))
        for seed, experts in ((1, "loop"), (2, "batched"))
    )
    start, ids = loop.state_dict(), token_ids(2, 8)
    expected = loop(ids)["logits"].detach()
    batched.load_state_dict(start)
    assert_near(batched(ids)["logits"], expected, torch.float32)
    back = GNNMoEModel(small_config(), seed=4)
    back.load_state_dict(copy.deepcopy(batched.state_dict()))
    assert torch.equal(back(ids)["logits"], expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("layers.1.experts.2.qkv.weight"), r"Missing.*layers.1.experts.2.qkv.weight"),
        (lambda state: state.update({"layers.0.experts.9.up.bias": torch.ones(1)}), "Unexpected.*9.up.bias"),
        (lambda state: state.update({f"layers.0.experts.{e}.up.bias": torch.ones(3) for e in range(4)}),
         "size mismatch for layers.0.experts.up_bias"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused(change, said):
    model = GNNMoEModel(small_config(), seed=0, experts="batched")
    state = GNNMoEModel(small_config(), seed=0).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        model.load_state_dict(state)


def test_of_an_incomplete_state_dict_what_is_there_is_loaded_in_both_forms():
    """One weight of one expert is absent: that one stays, the same weight of the others is loaded."""
    given, absent = GNNMoEModel(small_config(), seed=1).state_dict(), "layers.0.experts.2.qkv.weight"
    left = {name: value for name, value in given.items() if name != absent}
    for experts in ("loop", "batched"):
        model = GNNMoEModel(small_config(), seed=2, experts=experts)
        before = copy.deepcopy(model.state_dict())
        found = model.load_state_dict(left, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == ([absent], [])
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name] if name == absent else given[name]), (experts, name)


def test_a_state_dict_of_the_batched_form_is_detached_unless_asked_otherwise():
    _, batched = two_forms(2)
    assert not any(value.requires_grad for value in batched.state_dict().values())
    kept = batched.state_dict(keep_vars=True)
    kept["1.qkv.weight"].sum().backward()
    assert batched.qkv_weight.grad is not None
    assert batched.qkv_weight.grad[:, 1].eq(1).all()
    assert not batched.qkv_weight.grad[:, 0].any()


def test_matrices_are_what_decays_in_both_forms():
    loop, batched = (GNNMoEModel(small_config(), seed=0, experts=name) for name in ("loop", "batched"))
    counts = [sum(matrix.numel() for matrix in model.matrices()) for model in (loop, batched)]
    assert counts[0] == counts[1] == sum(p.numel() for p in loop.parameters() if p.ndim >= 2)
    found = {id(matrix) for matrix in batched.matrices()}
    for name, parameter in batched.named_parameters():
        if ".experts." in name:
            assert (id(parameter) in found) == (name.endswith("_weight") and ".norm" not in name), name


@pytest.mark.parametrize("experts", ["loop", "batched"])
def test_bf16_rounds_the_products_and_nothing_else(experts):
    config = small_config(embed_dim=16)
    models: Any = [
        GNNMoEModel(config, seed=0, experts=experts, precision=precision) for precision in ("fp32", "bf16")
    ]
    exact, low = models
    ids, seen = token_ids(3, 8), []
    for layer in low.layers:
        layer.coupler.register_forward_pre_hook(lambda _, args: seen.append(args))
    output = low(ids, targets=ids)
    assert {(args[0].dtype, args[1].dtype) for args in seen} == {(torch.bfloat16, torch.float32)}
    assert output["loss"].dtype == output["logits"].dtype == torch.float32
    assert low.token_nll(ids, ids).dtype == torch.float32
    output["loss"].backward()
    assert {p.dtype for p in low.parameters()} == {
        p.grad.dtype for p in low.parameters() if p.grad is not None
    }
    expected = exact(ids, targets=ids)
    for name in ("loss", "logits"):
        assert not torch.equal(output[name], expected[name])
        assert_near(output[name], expected[name], torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")


def test_an_autocast_of_the_caller_s_is_left_alone():
    model, ids = GNNMoEModel(small_config(), seed=0), token_ids(2, 8)
    exact = model(ids)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(ids)["logits"], exact)


@pytest.mark.parametrize(("name", "value"), [("experts", "loops"), ("precision", "fp16")])
def test_an_unknown_form_or_precision_is_refused_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"unknown {name} '{value}'; allowed: .*"):
        GNNMoEModel(small_config(), seed=0, **{name: value})
