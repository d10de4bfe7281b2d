"""The hypergraph coupler: facts 3 and 4 of the spec, its names, and what it is without hyperedges."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnnmoe import GNNMoEModel, HGNNExpertCoupler
from gnnmoe.couplers.hgnn import SOFTPLUS_OF_ONE
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.hypergraph.strategies import STRATEGIES
from tests.gnnmoe._support import (
    DEFAULT_STRATEGIES,
    FORMULAS,
    NO_HYPEREDGES,
    assert_near,
    assert_same_function,
    backends,
    dense_oracle,
    every_formula,
    every_symmetric_strategy,
    gradients,
    make_coupler,
    normal,
    small_config,
)

pytestmark = pytest.mark.core("coupler:HGNN")
LINEAR = {"activation": "none", "residual": False}


def mean_plus_linear(coupler):
    """The mean over experts through the coupler's linear maps and its combiner."""

    def call(x):
        y = x.mean(2)
        for layer in coupler.layers:
            y = F.linear(y, layer.weight, layer.bias)
        return coupler.combiner(y)

    return call


@every_symmetric_strategy
@every_formula
def test_fact_3_linear_and_unweighted_is_mean_plus_linear(formula, strategy):
    E = 3 if formula == "HypergraphConv" else 5
    coupler = make_coupler(
        num_experts=E, hgnn_conv_type=formula, static_hyperedge_strategy=strategy, embed_dim=4,
        hgnn_learnable_edge_weights=False, coupler_options=LINEAR,
    )  # fmt: skip
    parameters = dict(coupler.named_parameters())
    assert_same_function(coupler, mean_plus_linear(coupler), [normal(2, 3, E, 4)], parameters)


@pytest.mark.parametrize(
    "fields",
    [
        {"coupler_options": LINEAR},  # the weights of all_pairs differ: a weighted mean
        {"hgnn_learnable_edge_weights": False},  # an activation and a residual
        {"hgnn_learnable_edge_weights": False, "coupler_options": {"activation": "none"}},
    ],
)
def test_fact_3_holds_for_nothing_else(fields):
    coupler = make_coupler(**fields)
    x = normal(2, 3, 4, 6)
    assert (coupler(x) - mean_plus_linear(coupler)(x)).abs().max() > 1e-3


def test_fact_3_any_linear_stack_is_a_static_weighted_mean_and_a_linear_map():
    coupler = make_coupler(coupler_options=LINEAR)
    coupler.combiner = nn.Identity()
    x, zero = normal(2, 3, 4, 6), torch.zeros(1, 1, 4, 6).double()
    theta = coupler.layers[1].weight @ coupler.layers[0].weight
    H, w = coupler.layers[0].incidence_EM, coupler.effective_hyperedge_weights()
    shares = torch.linalg.matrix_power(dense_oracle(H, w, "HypergraphConv"), 2).mean(0)
    assert_near(coupler(x) - coupler(zero), torch.einsum("e,bled,fd->blf", shares, x, theta))
    assert_near(shares.sum(), 1.0)


@pytest.mark.parametrize(
    ("strategy", "formula"), list(zip(DEFAULT_STRATEGIES, itertools.cycle(FORMULAS), strict=False))
)
def test_one_layer_by_dense_matrices_with_activation_and_residual(strategy, formula):
    """X ← X + GELU(P X Θ + b), twice, then the mean and the combiner."""
    coupler = make_coupler(hgnn_conv_type=formula, static_hyperedge_strategy=strategy)
    x = normal(2, 3, 4, 6)
    H, w = coupler.layers[0].incidence_EM, F.softplus(coupler.hyperedge_weights)
    P, y = dense_oracle(H, w, formula), x
    for layer in coupler.layers:
        y = y + F.gelu(torch.einsum("ef,blfd,gd->bleg", P, y, layer.weight) + layer.bias)
    assert_near(coupler(x), coupler.combiner(y.mean(2)))


def test_fact_4_weights_start_at_exactly_one():
    """In float32, the type they start in; PyG's formula then is the documented one."""
    coupler = build_coupler(small_config())
    assert isinstance(coupler, HGNNExpertCoupler)
    assert coupler.effective_hyperedge_weights().tolist() == [1.0] * 6
    assert_near(F.softplus(torch.tensor(SOFTPLUS_OF_ONE, dtype=torch.float64)), 1.0)
    unlearned = build_coupler(small_config(hgnn_learnable_edge_weights=False))
    assert unlearned.communication()["hyperedge_weights"].tolist() == [1.0] * 6


@backends()
@every_formula
def test_fact_4_weights_towards_zero_stay_positive_with_finite_gradients(formula, backend):
    """Raw weights far down: of one hyperedge, of all that expert 0 belongs to, of all."""
    dtype = torch.float32
    x = normal(2, 3, 4, 6, dtype=dtype).requires_grad_(True)
    for raw, pushed in itertools.product((5.0, -5.0, -50.0, -200.0), (1, 3, 6)):
        where = f"raw {raw}, {pushed} of 6 hyperedges"
        coupler = make_coupler(hgnn_conv_type=formula, dtype=dtype, coupler_options={"backend": backend})
        with torch.no_grad():
            coupler.hyperedge_weights[:pushed] = raw
        assert (coupler.effective_hyperedge_weights() > 0).all(), where
        output = coupler(x)
        assert output.isfinite().all(), where
        for gradient in gradients(output, [x, *coupler.parameters()]):
            assert gradient.isfinite().all(), where


@pytest.mark.filterwarnings(NO_HYPEREDGES)
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("E", [1, 4])
def test_names_hyperedge_weights_index_and_count(E, learnable):
    coupler = make_coupler(num_experts=E, hgnn_learnable_edge_weights=learnable)
    index, M = HGNNExpertCoupler.generate_static_hyperedges(E, "all_pairs")
    assert torch.equal(coupler._hyperedge_index, index)
    assert coupler._num_hyperedges == M
    if learnable and M:
        assert isinstance(coupler.hyperedge_weights, nn.Parameter)
        assert coupler.hyperedge_weights.is_leaf
        assert coupler.hyperedge_weights.shape == (M,)
        assert "hyperedge_weights" in coupler.state_dict()
    else:
        assert coupler.hyperedge_weights is None


def test_communication_names_the_hyperedges_and_gives_their_effective_weights():
    coupler = make_coupler(num_experts=3)
    assert_near(coupler.communication()["hyperedge_weights"], F.softplus(coupler.hyperedge_weights))
    assert coupler.member_names() == {"hyperedge_weights": ["{0,1}", "{0,2}", "{1,2}"]}


@pytest.mark.parametrize(("E", "strategy"), [(1, "all_pairs"), (1, "all"), (2, "all_triplets")])
def test_without_hyperedges_it_is_the_mean_readout_and_says_so_once(E, strategy):
    config = small_config(num_experts=E, static_hyperedge_strategy=strategy)
    with pytest.warns(UserWarning, match=f"{strategy} has no hyperedges at num_experts {E}") as caught:
        coupler = build_coupler(config).double()
    assert len(caught) == 1
    mean = make_coupler(coupler_type="mean", num_experts=E)
    mean.load_state_dict(coupler.state_dict(), strict=True)
    x = normal(2, 3, E, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_near(coupler(x), mean(x))
        assert coupler.communication() == {}
        assert_near(coupler.communication(x)["mixing"], torch.full((E,), 1 / E).double())


def test_without_hyperedges_a_model_of_many_layers_says_so_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        GNNMoEModel(small_config(num_experts=1, num_layers=3), seed=0)
    assert len([w for w in caught if "has no hyperedges" in str(w.message)]) == 1


@backends()
@every_formula
def test_isolated_experts_keep_their_own_features(monkeypatch, formula, backend):
    """Parity suite, isolated experts: P's rows are zero, so the update is GELU(b)."""
    monkeypatch.setitem(STRATEGIES.registered, "lonely", lambda E: [(0, 1), (1,), (0, 1)])
    coupler = make_coupler(
        hgnn_conv_type=formula, static_hyperedge_strategy="lonely", coupler_options={"backend": backend}
    )
    x = normal(2, 3, 4, 6)
    assert_same_function(coupler, coupler.reference, [x], dict(coupler.named_parameters()))
    coupler.combiner, first = nn.Identity(), coupler.layers[0]
    del coupler.layers[1:]
    H, w = first.incidence_EM[:2], coupler.effective_hyperedge_weights()
    heard = torch.einsum("ef,blfd,gd->bleg", dense_oracle(H, w, formula), x[:, :, :2], first.weight)
    update = torch.cat([heard, torch.zeros_like(x[:, :, 2:])], dim=2)
    assert_near(coupler(x), (x + F.gelu(update + first.bias)).mean(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hgnn_conv_type": "HypergraphCnv"}, "unknown hgnn_conv_type .* mean 'HypergraphConv'"),
        ({"coupler_options": {"activation": "gelo"}}, "unknown activation 'gelo'.*mean 'gelu'"),
        ({"coupler_options": {"backend": "vectorised"}}, "unknown backend .* mean 'vectorized'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(fields, message):
    with pytest.raises(ValueError, match=message):
        make_coupler(**fields)
