"""Couplers under ``torch.compile``: one graph without a break, the same numbers, the same gradients."""

from __future__ import annotations

import pytest
import torch

from tests.gnnmoe._support import assert_near, gradients, make_coupler, normal

FORMS = [
    {"coupler_type": "gate"},
    {"coupler_type": "topk"},
    {"coupler_type": "GNN", "gnn_layers": 1},
    {"coupler_type": "attention", "gnn_layers": 1},
    {"gnn_layers": 2},
    {"coupler_options": {"activation": "none"}},
    {"hgnn_conv_type": "HNHN", "gnn_layers": 1, "num_experts": 5},  # ten pairs: in pieces
    {"hgnn_conv_type": "HypergraphAttention", "gnn_layers": 1},
    {"hgnn_conv_type": "EDHNN", "gnn_layers": 1},
]
QUICK = {"hgnn_conv_type": "HNHN", "gnn_layers": 1, "num_experts": 3}


def of_forms(forms):
    return pytest.mark.parametrize("fields", forms, ids=lambda fields: " ".join(map(str, fields.values())))


@of_forms([QUICK, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS)])
def test_one_graph_gives_the_same_output_and_gradients(fields):
    """Of an expert-major input, as the experts write it."""
    coupler = make_coupler(**fields)
    E = coupler.config.num_experts
    x, layer_input = normal(E, 2, 3, 6).permute(1, 2, 0, 3).requires_grad_(True), normal(2, 3, 6, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(coupler, fullgraph=True, backend="aot_eager")
    leaves = [x, *coupler.parameters()]
    expected, found = coupler(x, layer_input), compiled(x, layer_input)
    assert_near(found, expected)
    for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert_near(one, other)


@pytest.mark.slow
@of_forms([QUICK, *FORMS[2:8:2]])
def test_one_graph_in_bf16(fields):
    coupler = make_coupler(**fields)
    x = normal(coupler.config.num_experts, 2, 3, 6).permute(1, 2, 0, 3)
    low, expected = x.bfloat16().requires_grad_(True), coupler(x)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(coupler.float(), fullgraph=True, backend="aot_eager")(low)
    assert_near(found, expected, torch.bfloat16)
    found.float().square().sum().backward()
    assert low.grad is not None
    assert low.grad.isfinite().all()
