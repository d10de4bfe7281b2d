"""The exact control of every comparison: what theory says is the same model trains the same way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench.config import TrainingConfig
from bench.training.step import make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel

STEPS = 40
VOCABULARY, BATCH, LENGTH = 40, 4, 8


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def loss_curve(**fields: Any) -> torch.Tensor:
    """Return the nll of each of 40 steps in float64, every step on another batch; all begin alike."""
    shape = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "max_seq_length": LENGTH}
    model = GNNMoEModel(GNNMoEConfig(vocab_size=VOCABULARY, **{**shape, **fields}), seed=0).double()
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        tokens = (starts + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
        batch = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        losses.append(training_step(model, batch, optimizer, max_grad_norm=1.0)[0])
    return torch.stack(losses)


@cache
def curve_of(coupler: str) -> torch.Tensor:
    return loss_curve(coupler_type=coupler)


@pytest.mark.parametrize("strategy", ["all_pairs", pytest.param("all_triplets", marks=pytest.mark.slow)])
def test_the_linear_unweighted_hypergraph_is_mean_linear_step_by_step(strategy):
    """Without activation, residual and weights a complete uniform hypergraph is a mean and linear maps."""
    linear = loss_curve(
        coupler_type="HGNN", static_hyperedge_strategy=strategy, hgnn_learnable_edge_weights=False,
        coupler_options={"activation": "none", "residual": False},
    )  # fmt: skip
    control = curve_of("mean_linear")
    assert float((linear - control).abs().max()) < 1e-9
    assert float(control[:10].mean() - control[-10:].mean()) > 0.01, "it learned something in the meantime"


def test_the_control_can_tell_models_apart():
    control, default = curve_of("mean_linear"), curve_of("HGNN")
    assert float((default - control).abs().max()) > 1e-4
