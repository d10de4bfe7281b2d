"""``--preset original``: the original experiments' hypergraph coupler without its leak, and their start."""

from functools import cache

import pytest
import torch
from torch_geometric.nn import HypergraphConv

from bench.check.subject import Subject
from bench.cli import parse
from bench.config import RunConfig
from gnnmoe.couplers.hgnn import HGNNExpertCoupler
from gnnmoe.couplers.registry import build_coupler
from tests.gnnmoe._support import assert_near, normal


@cache
def config(*flags: str):
    return parse(RunConfig, ["--preset", "original", *flags], presets=True).model.resolved(50)


def coupler(seed: int = 0, *flags: str) -> HGNNExpertCoupler:
    torch.manual_seed(seed)
    built = build_coupler(config("--embed-dim", "6", *flags)).double()
    assert isinstance(built, HGNNExpertCoupler)
    return built


def test_it_is_a_bare_stack_of_pygs_layer_on_each_token():
    """PyG's formula, no activation, no residual, the weights used as they are, token by token."""
    ours = coupler()
    x, weights = normal(2, 3, 4, 6), ours.hyperedge_weights
    stack = []
    for layer in ours.layers:
        conv = HypergraphConv(6, 6).double()
        conv.load_state_dict({"lin.weight": layer.weight, "bias": layer.bias})
        stack.append(conv)
    tokens = []
    for token in x.flatten(0, 1):
        for conv in stack:
            token = conv(token, ours._hyperedge_index, weights, num_edges=6)
        tokens.append(token.mean(0))
    assert_near(ours(x), ours.combiner(torch.stack(tokens).view(2, 3, 6)))


def test_its_weights_are_drawn_from_a_normal_distribution():
    drawn = torch.cat([coupler(seed).effective_hyperedge_weights().detach() for seed in range(300)])
    assert drawn.mean().abs() < 0.1
    assert drawn.std() == pytest.approx(1.0, abs=0.1)
    assert (drawn < 0).double().mean() == pytest.approx(0.5, abs=0.06)


def test_its_weights_start_as_the_originals_did():
    assert config().initialization == "original"
    assert config("--initialization", "project").initialization == "project"
    # As the leak check builds it.
    checked = Subject(config("--embed-dim", "64"), 0, torch.device("cpu")).coupler()
    for built in (coupler(0, "--embed-dim", "64"), checked):
        weight = built.combiner.get_parameter("0.weight").detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)


def test_flags_override_it_and_other_couplers_ignore_its_options():
    assert coupler(0, "--coupler-option", "residual=true").layers.residual
    assert not coupler().layers.residual
    assert build_coupler(config("--coupler", "GNN")).name == "GNN"
