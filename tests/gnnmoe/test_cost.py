"""What a config costs, worked out without building the model, against models that were built."""

import itertools
from dataclasses import replace

import pytest

from gnnmoe import GNNMoEModel, coupler_names
from gnnmoe.cost import Cost, expert_object_bytes, matched_ffn_dim, model_cost
from gnnmoe.layers.base import LAYERS
from tests.gnnmoe._support import NO_HYPEREDGES, small_config

pytestmark = pytest.mark.filterwarnings(NO_HYPEREDGES)
FORMS = [{"coupler_type": name} for name in coupler_names()]
FORMS += [{"hgnn_conv_type": conv, "static_hyperedge_strategy": "all_triplets"} for conv in LAYERS]


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: " ".join(fields.values()))
def test_the_cost_is_that_of_the_model(fields):
    for experts in (1, 2, 5):
        config = small_config(num_experts=experts, ffn_dim=7, num_layers=3, **fields)
        model = GNNMoEModel(config, seed=0)
        assert model_cost(config) == Cost(model.parameter_counts()["total"], model.flops(1, 8)), experts


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: " ".join(fields.values()))
def test_the_matched_width_is_the_nearest(fields):
    quantity = "params" if FORMS.index(fields) % 2 else "flops"
    options = {"coupler_options": {"match": "none"}} if fields.get("coupler_type") == "dense" else {}
    config = small_config(embed_dim=12, **fields, **options)
    target = model_cost(small_config(embed_dim=12, ffn_dim=200))
    width = matched_ffn_dim(config, target, quantity)

    def mismatch(ffn_dim: int) -> int:
        return abs(
            getattr(model_cost(replace(config, ffn_dim=ffn_dim)), quantity) - getattr(target, quantity)
        )

    assert mismatch(width) <= min(mismatch(width + 1), mismatch(max(1, width - 1)))


def test_a_model_matches_itself_exactly():
    for fields, quantity in itertools.product(FORMS[2:4], ("params", "flops")):
        config = small_config(ffn_dim=19, **fields)
        assert matched_ffn_dim(replace(config, ffn_dim=None), model_cost(config), quantity) == 19


def test_what_is_too_large_at_any_width_takes_the_smallest():
    config = small_config(coupler_type="attention")
    assert matched_ffn_dim(config, Cost(params=1, flops=1), "params") == 1


def test_many_small_blocks_take_the_memory_of_their_objects():
    """Two million blocks of width 4 have few parameters, and take 45.8 GiB as objects."""
    config = small_config(coupler_type="mean", num_layers=10_000, num_experts=200, embed_dim=4, num_heads=1)
    assert expert_object_bytes(config) > 45 * 2**30
