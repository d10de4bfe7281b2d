"""Sums over experts, in both orders of memory, as a matrix product and written out for a compiler.

Shapes: N tokens, E experts, M mixtures, D width, K scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from gnnmoe.mixing import FEW, mean_over_experts, mix, mix_by_token, rowwise, scores
from tests.gnnmoe._memory import Allocations
from tests.gnnmoe._support import assert_near, assert_same_function, gradients, normal

N, D = 5, 6
in_both_orders = pytest.mark.parametrize("expert_major", [True, False], ids=["expert-major", "token-major"])


def features(E: int, expert_major: bool) -> Tensor:
    x = normal(E, N, D) if expert_major else normal(N, E, D)
    return x.transpose(0, 1) if expert_major else x


@in_both_orders
@pytest.mark.parametrize(("M", "E"), [(1, 4), (3, 2), (4, 4), (9, 3), (2, 9), (0, 3)])
def test_mixtures_are_einsums_with_all_gradients(M, E, expert_major):
    x = features(E, expert_major)
    shared, own = normal(M, E, seed=2), normal(N, M, E, seed=3)
    by_einsum = [
        lambda w, x: torch.einsum("me,ned->nmd", w, x),
        lambda w, x: torch.einsum("nme,ned->nmd", w, x),
    ]
    for call, expected, weights in zip((mix, mix_by_token), by_einsum, (shared, own), strict=True):
        assert_same_function(call, expected, [weights, x])
        assert_near(call(weights, x), expected(weights, x))  # assert_same_function clones its inputs
    assert_same_function(scores, lambda w, x: torch.einsum("kd,ned->nek", w, x), [normal(2, D), x])
    assert_near(mean_over_experts(x), x.mean(1))


@in_both_orders
def test_rows_are_mapped_where_they_are(expert_major):
    """A linear map of a strided view would copy it first."""
    x, linear = features(4, expert_major), torch.nn.Linear(D, 2).double()
    with torch.no_grad(), Allocations([x, *linear.parameters()]) as watch:
        mapped = rowwise(linear, x)
    assert watch.peak == N * 4 * 2
    assert mapped.is_contiguous() != expert_major
    assert_near(mapped, linear(x))


def operators(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[set[str], list[Tensor]]:
    """The operators that a compiler is given of a function, forward and backward; output and gradients."""
    found: set[str] = set()

    def note(graph: torch.fx.GraphModule, example: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    output = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=note))(*inputs)
    return found, [output, *gradients(output, inputs)]


@in_both_orders
@pytest.mark.parametrize(("E", "written_out"), [(FEW, True), (FEW + 1, False)])
def test_a_compiler_gets_few_experts_written_out(E, written_out, expert_major):
    """A matrix product of few columns is a kernel of its own; a sum is fused with what is around it."""

    def mixed(own: Tensor, shared: Tensor, x: Tensor) -> Tensor:
        return mix(shared, mix_by_token(own, x))

    values = normal(N, E, E), normal(E, E, seed=4), features(E, expert_major)
    inputs = [value.requires_grad_(True) for value in values]
    found, compiled = operators(mixed, *inputs)
    products = {name for name in found if name.startswith(("aten.mm", "aten.bmm", "aten.baddbmm"))}
    assert bool(products) != written_out
    output = mixed(*inputs)
    for one, other in zip(compiled, [output, *gradients(output, inputs)], strict=True):
        assert_near(one, other)


def test_weights_of_higher_precision_are_rounded_to_the_features_type():
    x = normal(N, 3, D).bfloat16()
    assert mix_by_token(normal(N, 2, 3).float(), x).dtype == torch.bfloat16
