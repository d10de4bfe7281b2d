"""The mean over the experts of a linear stack, folded into a few rows, against the stack itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe.hypergraph.propagation import FORMULAS, linear_readout, linear_readout_flops
from tests.gnnmoe._support import assert_near, assert_same_function, make_coupler, normal

pytestmark = pytest.mark.core("coupler:HGNN")
every_residual = pytest.mark.parametrize("residual", [True, False])


@every_residual
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_matrix_and_any_maps(layers, residual):
    """P need not keep the sum of a row, as PyG's formula and isolated experts do not."""
    x, P = normal(3, 4, 5), normal(4, 4, seed=2)
    maps = [(normal(5, 5, seed=k), normal(5, seed=k + 10)) for k in range(layers)]

    def stack(x, P, *flat):
        for weight, bias in zip(flat[::2], flat[1::2], strict=True):
            x = (x if residual else 0) + P @ x @ weight.T + bias
        return x.mean(1)

    def folded(x, P, *flat):
        return linear_readout(x, P, list(zip(flat[::2], flat[1::2], strict=True)), residual=residual)

    assert_same_function(folded, stack, [x, P, *(part for pair in maps for part in pair)])
    with FlopCounterMode(display=False) as counter:
        linear_readout(x, P, maps, residual=residual)
    assert linear_readout_flops(3, 4, 5, layers, residual=residual) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("E", "gnn_layers", "residual", "rows"),
    [
        (4, 2, False, 1 + 1 + 1),  # one row through each map; the last is the combiner
        (4, 2, True, 2 + 1 + 1),  # a row fewer after each layer
        (2, 4, True, 2 + 2 + 2 + 1 + 1),  # no more rows than there are experts
        (2, 4, False, 4 + 1),
    ],
)
def test_as_few_rows_as_can_be_are_mapped(E, gnn_layers, residual, rows):
    """Fast form 2, by torch's counter; beside a map of this width, products with P cost nothing."""
    options, width = {"activation": "none", "residual": residual}, 256
    coupler = make_coupler(num_experts=E, gnn_layers=gnn_layers, embed_dim=width, coupler_options=options)
    with FlopCounterMode(display=False) as counter:
        coupler(normal(1, 1, E, width))
    assert counter.get_total_flops() // (2 * width**2) == rows


@pytest.mark.parametrize(
    ("E", "gnn_layers", "formula", "residual"),
    [(E, layers, formula, (k + i) % 2 == 0)
     for k, (E, layers) in enumerate([(4, 2), (2, 5), (3, 3)]) for i, formula in enumerate(FORMULAS)],
)  # fmt: skip
def test_the_coupler_folds_what_it_can_and_is_its_reference(E, gnn_layers, formula, residual):
    coupler = make_coupler(
        num_experts=E, gnn_layers=gnn_layers, hgnn_conv_type=formula,
        coupler_options={"activation": "none", "residual": residual},
    )  # fmt: skip
    x = normal(2, 3, E, 6)
    assert_same_function(coupler, coupler.reference, [x], dict(coupler.named_parameters()))


@pytest.mark.parametrize(
    ("activation", "conv_type"), [("gelu", "HypergraphConv"), ("none", "HNHN"), ("gelu", "HNHN"),
                                  *(("none", formula) for formula in FORMULAS)],
)  # fmt: skip
def test_bf16_leaves_what_is_no_larger_than_e_by_m_in_float32(activation, conv_type):
    """P, degrees and rows of weights cost nothing beside the tokens, and every token has their error."""
    coupler = make_coupler(
        dtype=torch.float32, hgnn_conv_type=conv_type, coupler_options={"activation": activation}
    )
    found = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mv.default) and result.numel() <= 4 * 6:
                found.append((tuple(result.shape), result.dtype))
            return result

    with Note(), torch.autocast("cpu", torch.bfloat16):
        coupler(normal(2, 7, 4, 6).bfloat16())
    assert found
    assert {dtype for _, dtype in found} == {torch.float32}, found


LINEAR = [{"activation": "none", "residual": residual} for residual in (True, False)]


@pytest.mark.parametrize("options", [{}, *LINEAR], ids=str)
@pytest.mark.parametrize("conv_type", ["HypergraphConv", "HNHN", "HypergraphAttention", "EDHNN"])
def test_flops_are_what_torch_counts_folded_or_not(conv_type, options):
    E = 4 if options.get("residual") else 2
    coupler = make_coupler(num_experts=E, hgnn_conv_type=conv_type, gnn_layers=3, coupler_options=options)
    with FlopCounterMode(display=False) as counter:
        coupler(normal(2, 5, E, 6))
    assert coupler.flops(10) == counter.get_total_flops()


def test_other_backends_stay_what_they_are_compared_as():
    """Only the matrix is folded: the others compute each layer for each expert."""
    options = {"activation": "none", "residual": False}
    folded, whole = (
        make_coupler(coupler_options={**options, "backend": backend}) for backend in ("vectorized", "pyg")
    )
    x = normal(2, 3, 4, 6)
    assert_near(folded(x), whole(x))
    assert whole.flops(10) > 3 * folded.flops(10)
