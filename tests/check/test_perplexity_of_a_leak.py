"""The example of the leak: it batches as PyG does, and what it shows comes from the leak alone."""

from __future__ import annotations

import re

import pytest
import torch

from examples import perplexity_of_a_leak as example
from examples.leaking_coupler import LeakingCoupler
from gnnmoe import GNNMoEConfig


def test_its_shift_by_e_is_pygs_batch_and_by_m_is_each_token_alone():
    config = GNNMoEConfig(embed_dim=8, num_experts=4, max_seq_length=8)
    theirs, ours = LeakingCoupler(config).double(), example.BatchedCoupler(config).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    ours.leaks = False
    assert torch.allclose(ours(x), theirs.reference(x), rtol=0, atol=1e-12)
    assert not torch.allclose(theirs(x), theirs.reference(x), atol=1e-3)


@pytest.mark.slow
def test_the_leak_lowers_the_perplexity_and_nothing_else_does(capsys):
    assert example.main(steps=60) == 0
    leaking, without, honest = map(float, re.findall(r"perplexity +([\d.]+) ", capsys.readouterr().out))
    assert leaking < 0.75 * honest
    assert honest < without
