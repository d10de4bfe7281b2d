"""Backends of the static propagation: loop, pyg and vectorized compute one thing (fact 1)."""

import copy
from functools import partial

import pytest
import torch
from torch_geometric.data import Batch, Data

from gnnmoe.hypergraph.strategies import static_hyperedges
from tests.gnnmoe._support import (
    FORMULAS,
    assert_near,
    assert_same_function,
    backends,
    every_formula,
    hear,
    make_coupler,
    make_layer,
    normal,
)

every_backend, other_backends = backends(), backends("pyg", "loop", "scatter", "sparse")
pyg_backends = backends("pyg", "loop")
HYPERGRAPHS = [  # no expert, no hyperedge, M below, at and above E; then graphs with isolated experts
    (0, []),
    (1, []),
    (5, [(0, 1, 2, 3, 4)]),
    (4, static_hyperedges(4, "ring")),
    (5, static_hyperedges(5, "all_pairs")),
    (8, static_hyperedges(8, "all_triplets")),
    (4, [(1, 3)]),
    (3, [(0, 1), (0, 1), (0,)]),
    (3, [(0, 2), (0,), (2,), (0, 2), (0, 2)]),
]


@other_backends
@every_formula
@pytest.mark.parametrize(("E", "members"), HYPERGRAPHS, ids=lambda value: str(value)[:30])
def test_backends_agree_in_output_and_all_gradients(E, members, formula, backend):
    expected = make_layer(members, E, formula)
    layer = make_layer(members, E, formula, backend)
    weights = normal(len(members), seed=3).exp()
    assert_same_function(partial(hear, layer), partial(hear, expected), [normal(3, E, 3), weights])
    if E:
        gradients = []
        for module in (layer, expected):
            loss = (hear(module, normal(3, E, 3), weights) ** 2).sum()
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        for one, other in zip(*gradients, strict=True):
            assert_near(one, other)


@pytest.mark.parametrize(("E", "merges"), [(3, False), (4, True), (5, True)])
@every_formula
def test_fact_1_hyperedge_ids_are_shifted_by_M_and_not_by_E(formula, E, merges):
    """PyG's ``Batch`` of ``Data`` shifts both by E and so merges tokens where M > E."""
    members = static_hyperedges(E, "all_pairs")
    layer = make_layer(members, E, formula, "pyg")
    x, w = normal(2, E, 3), normal(len(members)).exp()
    alone = torch.cat([hear(layer, token[None], w) for token in x])
    assert_near(hear(layer, x, w), alone)
    if formula == "PyGHypergraphConv":  # PyG's own layer on PyG's own batch
        data: list = [Data(x=token, edge_index=layer.index) for token in x]
        batched = Batch.from_data_list(data).edge_index  # pyright: ignore[reportAttributeAccessIssue]
        leaking = layer.pyg_conv[0](x.flatten(0, 1), batched, w.repeat(2), num_edges=2 * len(members))
        assert ((leaking.view_as(x) - alone).abs().max() > 1e-3) == merges


def coupler(backend: str, formula: str = "HypergraphConv", seed: int = 0):
    return make_coupler(seed, hgnn_conv_type=formula, coupler_options={"backend": backend})


@pyg_backends
@every_formula
def test_pyg_reads_the_layers_own_parameters_whatever_happens_to_them(formula, backend):
    """After deepcopy, load_state_dict, a change of type, a training step and a new parameter object."""
    x = normal(2, 3, 4, 6)
    original = coupler(backend, formula)
    before = original(x)

    def vectorized_with_the_state_of(module):
        twin = coupler("vectorized", formula, seed=9)
        twin.load_state_dict(module.state_dict())
        return twin(x)

    copied = copy.deepcopy(original)
    copied.load_state_dict(coupler("vectorized", formula, seed=1).state_dict())
    assert (copied(x) - before).abs().max() > 1e-3
    assert_near(copied(x), vectorized_with_the_state_of(copied))
    assert torch.equal(original(x), before)
    copied.float()(x.float())
    assert_near(copied.double()(x), vectorized_with_the_state_of(copied))
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    (original(x) * x.mean(2)).sum().backward()
    optimizer.step()
    assert (original(x) - before).abs().max() > 1e-3
    assert_near(original(x), vectorized_with_the_state_of(original))
    original.layers[0].weight = torch.nn.Parameter(2 * original.layers[0].weight.detach())
    assert_near(original(x), vectorized_with_the_state_of(original))


@pyg_backends
def test_making_the_pyg_layer_draws_no_random_numbers(backend):
    layers = [make_layer([(0, 1)], 2, formula, backend) for formula in FORMULAS]
    before = torch.get_rng_state()
    for layer in layers:
        hear(layer, normal(1, 2, 3), normal(1).exp())
    assert torch.equal(torch.get_rng_state(), before)
