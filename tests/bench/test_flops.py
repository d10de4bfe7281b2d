"""The formulas of the FLOPs against ``torch.utils.flop_counter``: the whole model, with every coupler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.timing import training_flops_per_token
from gnnmoe import GNNMoEModel, coupler_names
from gnnmoe.layers.base import LAYERS
from tests.gnnmoe._support import small_config

DONE_AGAIN = ("AllDeepSets", "AllSetTransformer", "EDHNN")  # chunks of tokens, computed again in the backward
QUICK = ("dense", "topk", "HypergraphConv", "EDHNN")
FORMS = [{"coupler_type": name} for name in coupler_names() if name != "HGNN"]
FORMS += [{"hgnn_conv_type": conv, "static_hyperedge_strategy": "all_triplets"} for conv in LAYERS]


@pytest.mark.parametrize(
    ("fields", "experts"),
    [*((fields, "loop") for fields in FORMS), ({"coupler_type": "mean"}, "batched"),
     ({"coupler_type": "dense"}, "batched")],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else value,
)  # fmt: skip
def test_the_formula_of_a_forward_is_what_the_counter_counts(fields, experts):
    """Equal to the last FLOP, on a batch of three sequences that are shorter than the longest."""
    model = GNNMoEModel(small_config(num_experts=4, num_layers=2, **fields), seed=0, experts=experts).eval()
    ids = torch.zeros(3, 5, dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert model.flops(3, 5) == counter.get_total_flops()


@pytest.mark.parametrize("fields", [
    pytest.param(fields, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
    for fields in FORMS for name in (next(iter(fields.values())),)
])  # fmt: skip
def test_a_forward_and_a_backward_are_three_forwards_to_the_counter(fields):
    """But for what has no gradient to pass on, and but for forwards that a backward does again."""
    config = small_config(num_experts=4, num_layers=2, **fields)
    model = GNNMoEModel(config, seed=0).eval()  # without auxiliary losses
    ids = torch.zeros(1, config.max_seq_length, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(ids)["logits"]
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    share = counter.get_total_flops() / (training_flops_per_token(model) * config.max_seq_length)
    again = fields.get("hgnn_conv_type") in DONE_AGAIN
    assert 1.0 < share < 4 / 3 if again else 0.97 <= share <= 1.0
