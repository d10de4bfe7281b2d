"""Going over the tokens in pieces: the same function, computed again in the backward."""

from __future__ import annotations

import pytest
import torch

from gnnmoe.layers.base import over_token_chunks
from tests.gnnmoe._memory import saved_elements
from tests.gnnmoe._support import assert_near, assert_same_function, normal

N, E, D = 7, 2, 3


def mixed(x, y):
    """Something that keeps tokens apart."""
    return (x.tanh() * y.sum(1, keepdim=True)).exp()


@pytest.mark.parametrize("features", [0, 1, 2, 5, 14, 100])
def test_the_same_with_all_gradients_in_any_number_of_pieces(features):
    calls = []

    def noted(x, y):
        calls.append(len(x))
        return mixed(x, y)

    def in_pieces(x, y):
        return over_token_chunks(noted, x, y, features=features)

    inputs = [normal(N, E, D), normal(E, N, D, seed=2).transpose(0, 1)]
    with torch.no_grad():
        assert_near(in_pieces(*inputs), mixed(*inputs))
    assert calls == {0: [7], 1: [7], 2: [7], 5: [3, 3, 1], 14: [1] * 7, 100: [1] * 7}[features]
    calls.clear()
    assert_same_function(in_pieces, mixed, inputs)
    assert len(calls) == 2 * {0: 1, 1: 1, 2: 1, 5: 3, 14: 7, 100: 7}[features]


def test_gradients_reach_what_the_function_holds():
    weight = normal(D, D).requires_grad_(True)
    x = normal(N, E, D)
    assert_same_function(
        lambda x: over_token_chunks(lambda x: (x @ weight).tanh(), x, features=6),
        lambda x: (x @ weight).tanh(), [x], {"weight": weight},
    )  # fmt: skip


def test_nothing_inside_is_kept_but_where_a_transform_cannot_do_without():
    x, y = normal(N, E, D).requires_grad_(True), normal(N, E, D)
    assert saved_elements(lambda: mixed(x, y), [x, y]) > 0
    assert saved_elements(lambda: over_token_chunks(mixed, x, y, features=8), [x, y]) == 0

    def total(x, y):
        return over_token_chunks(mixed, x, y, features=8).sum()

    stacked = normal(4, N, E, D)
    found = torch.func.vmap(torch.func.grad(total))(stacked, stacked)
    expected = torch.func.vmap(torch.func.grad(lambda x, y: mixed(x, y).sum()))(stacked, stacked)
    assert_near(found, expected)


def test_a_compiler_writes_out_four_pieces_at_most():
    torch._dynamo.reset()
    x, y = normal(N, E, D).requires_grad_(True), normal(N, E, D)
    graphs = []

    def note(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, y: over_token_chunks(mixed, x, y, features=100), fullgraph=True, backend=note
    )
    assert_near(compiled(x, y), mixed(x, y))
    pieces = [node for node in graphs[0].graph.nodes if "checkpoint" in str(node.target)]
    assert len(pieces) == 4
