"""Isolation on the trained weights, at the run's own shape and precision."""

import pytest
import torch
from torch import Tensor

from bench.check.isolation import check_trained_isolation
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.model import GNNMoEModel

BATCH, LENGTH, LAYERS = 3, 24, 2


def model_with(coupler: str) -> GNNMoEModel:
    return GNNMoEModel(
        GNNMoEConfig(
            coupler_type=coupler, embed_dim=16, num_layers=LAYERS, max_seq_length=LENGTH, vocab_size=50
        ),
        seed=1,
    )


def tokens(batch: int = BATCH) -> Tensor:
    return torch.randint(50, (batch, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("coupler", "precision"),
    [("mean", None), ("GNN", torch.bfloat16), ("HGNN", None), ("HGNN", torch.bfloat16),
     ("tests.check.couplers:HiddenLeak", None)],
)  # fmt: skip
def test_honest_weights_pass(coupler, precision):
    check = check_trained_isolation(model_with(coupler), tokens(), autocast_dtype=precision)
    assert check.passed, check.detail
    assert check.name == "trained_isolation"
    assert check.detail.startswith("2 layers")


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_leak_that_training_opened_is_caught_in_its_layer(precision):
    model = model_with("tests.check.couplers:HiddenLeak")
    with torch.no_grad():
        model.layers[1].coupler.scale.fill_(0.5)  # pyright: ignore
    check = check_trained_isolation(model, tokens(), autocast_dtype=precision)
    assert not check.passed
    assert check.detail.startswith("layer 1: token 0 of sequence 0 sees the expert outputs of token 1")


def test_a_model_that_raises_is_a_failed_check():
    check = check_trained_isolation(model_with("tests.check.couplers:Raising"), tokens())
    assert not check.passed
    assert "KeyError" in check.detail


def test_costs_two_forwards_a_bit_and_leaves_everything_as_it_was():
    model = model_with("HGNN")
    model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    handles = [layer.coupler.register_forward_hook(lambda *_: calls.append(1)) for layer in model.layers]  # pyright: ignore
    random_state = torch.get_rng_state()

    assert check_trained_isolation(model, tokens()).passed

    bits = (BATCH * LENGTH - 1).bit_length()
    assert len(calls) == LAYERS * (1 + 2 * bits + 3)
    for handle in handles:
        handle.remove()
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not c._forward_pre_hooks for c in model.modules() if isinstance(c, Coupler))


def test_compiled_model_is_looked_at_through_its_wrapper():
    model = torch.compile(model_with("mean"), backend="eager")
    assert check_trained_isolation(model, tokens()).passed  # pyright: ignore


@pytest.mark.parametrize(
    ("coupler", "text"),
    [
        ("examples.leaking_coupler:LeakingCoupler", "(its future)"),
        ("tests.check.couplers:PastMixing", "causal but not token-isolated"),
        ("tests.check.couplers:AcrossBatch", "(another sequence)"),
        ("tests.check.couplers:InputLeak", "sees the layer input"),
    ],
)
def test_leaks_are_caught_and_named(coupler, text):
    check = check_trained_isolation(model_with(coupler), tokens())
    assert not check.passed
    assert text in check.detail


def test_single_token():
    assert check_trained_isolation(model_with("HGNN"), tokens(1)[:, :1]).passed
