"""The dense model without experts: what it is, and that it is as large as the model it stands beside."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe import ExpertBlock, GNNMoEModel, coupler_names
from gnnmoe.cost import model_cost
from gnnmoe.couplers.registry import coupler_identity
from tests.gnnmoe._support import NO_HYPEREDGES, assert_near, make_model, small_config, token_ids

pytestmark = pytest.mark.filterwarnings(NO_HYPEREDGES)


def model(**fields) -> GNNMoEModel:
    return GNNMoEModel(small_config(embed_dim=16, **fields), seed=0)


def dense(experts: int = 4, **options) -> GNNMoEModel:
    return model(coupler_type="dense", num_experts=experts, coupler_options=options)


def test_a_dense_layer_is_one_transformer_block():
    found = make_model(coupler_type="dense", num_layers=2)
    ids = token_ids(2, 8)
    x = found.embed(ids)
    for layer in found.layers:
        assert len(layer.experts) == 1
        assert not list(layer.coupler.parameters())
        x = layer.experts[0](x)
    expected = found.head.logits(found.output_norm(x), found.token_embedding.weight)
    assert_near(found(ids)["logits"], expected)
    assert found.parameter_counts()["coupler"] == 0
    assert_near(found.analyze_expert_communication(ids)["layer_1"]["mixing"], [1.0])


@pytest.mark.parametrize("quantity", ["params", "flops"])
@pytest.mark.parametrize(("experts", "like"), [(1, "mean"), (2, "topk"), (5, "HGNN"), (8, "GNN")])
def test_the_twin_is_as_large_to_half_a_hidden_unit_with_the_runs_own_layers(experts, like, quantity):
    fields = {"gnn_layers": 3, "hgnn_conv_type": "HNHN", "static_hyperedge_strategy": "all_triplets",
              "embed_dim": 16, "num_experts": experts}  # fmt: skip
    target = model_cost(small_config(coupler_type=like, **fields))
    options = {"match": quantity, "like": like}
    found = small_config(coupler_type="dense", coupler_options=options, **fields)
    step = {"params": 2 * (2 * 16 + 1), "flops": 2 * 8 * 4 * 16}[quantity]  # two layers, one hidden unit
    assert abs(getattr(model_cost(found), quantity) - getattr(target, quantity)) <= step / 2


def counted(found: nn.Module, batch: int) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found.eval()(token_ids(batch, 8))
    return counter.get_total_flops()


def test_unmatched_it_is_one_expert_of_the_usual_width():
    found = dense(match="none")
    one = sum(p.numel() for p in ExpertBlock(found.config).parameters())
    assert found.parameter_counts()["expert"] == len(found.layers) * one


@pytest.mark.parametrize("name", coupler_names())
def test_the_flop_formula_of_the_model_is_what_torch_counts(name):
    """The analytic formula per module, checked against torch's counter: experts, couplers and head."""
    for batch, experts, rounds in ((1, 1, 3), (3, 3, 2), (1, 8, 1)):
        found = model(coupler_type=name, num_experts=experts, gnn_layers=rounds, ffn_dim=24)
        assert found.flops(batch, 8) == counted(found, batch), (experts, rounds)


def test_a_coupler_without_a_formula_leaves_the_count_to_torch(monkeypatch):
    found = model(coupler_type="mean")
    monkeypatch.setattr(type(found.layers[0].coupler), "flops", lambda self, tokens: None)
    assert found.flops(1, 8) is None
    with pytest.raises(ValueError, match="does not say its FLOPs; match params"):
        dense(match="flops", experts=7)


def test_the_run_is_the_same_whatever_its_twin_never_reads():
    """Matched to mean, the hypergraph does not matter; matched to HGNN, it does."""

    def identity(**fields):
        return coupler_identity(small_config(coupler_type="dense", **fields))

    triplets = {"static_hyperedge_strategy": "all_triplets"}
    assert identity() == identity(**triplets)
    like = {"coupler_options": {"like": "HGNN"}}
    assert identity(**like) != identity(**like, **triplets)
    assert identity() != identity(num_experts=8)
    assert identity(ffn_dim=24) == identity()  # 4 × embed_dim, said or not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "flop"}, "unknown match of coupler dense .* mean 'flops'"),
        ({"like": "dense"}, "name a coupler that is registered and has experts"),
        ({"like": "mine.py:Mine"}, "name a coupler that is registered"),
        ({"like": "HGN"}, "mean 'HGNN'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dense(**options)


def test_it_draws_nothing_from_the_random_state_of_others():
    """Its twin is built on the meta device: trunk and other layers start as with any coupler."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    dense(like="HGNN")
    assert torch.equal(torch.get_rng_state(), before)
    found, other = dense(like="HGNN"), model(coupler_type="mean")
    assert torch.equal(found.token_embedding.weight, other.token_embedding.weight)


def test_ffn_dim_is_the_width_of_every_expert():
    found: Any = model(coupler_type="mean", ffn_dim=10)
    assert {e.up.out_features for layer in found.layers for e in layer.experts} == {10}
    with pytest.raises(ValueError, match="ffn_dim is 0"):
        small_config(ffn_dim=0)
