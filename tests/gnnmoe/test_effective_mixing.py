"""``effective_mixing`` where a token depends on no expert, and where a device has no float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnnmoe.couplers import base
from gnnmoe.couplers.base import effective_mixing
from gnnmoe.couplers.mean import MeanCoupler
from tests.gnnmoe._support import assert_near, make_coupler, normal, small_config


class OfSome(MeanCoupler):
    """The first expert for tokens whose layer input begins with more than 0, and nothing for the others."""

    def forward(self, expert_outputs, layer_input=None):
        assert layer_input is not None
        return self.combiner(expert_outputs[:, :, 0] * (layer_input[..., :1] > 0))


class NoFloat64(TorchDispatchMode):
    """Refuses every result in float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            assert not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float64, func
        return found


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_token_that_depends_on_no_expert_counts_as_zeros(share):
    coupler = OfSome(small_config()).double()
    layer_input = torch.full((2, 4, 6), -1.0, dtype=torch.float64)
    layer_input[:, : int(4 * share)] = 1.0
    mixing = effective_mixing(coupler, normal(2, 4, 3, 6), layer_input)
    assert_near(mixing, [share, 0, 0])


def test_where_there_is_no_float64_it_is_not_used(monkeypatch):
    assert base._accumulation_dtype(torch.device("cpu")) == torch.float64
    assert base._accumulation_dtype(torch.device("mps")) == torch.float32
    coupler = make_coupler(coupler_type="gate").float()
    x, layer_input = normal(2, 3, 4, 6).float(), normal(2, 3, 6, seed=51).float()
    expected = effective_mixing(coupler, x, layer_input)
    monkeypatch.setattr(base, "_accumulation_dtype", lambda device: torch.float32)
    with NoFloat64():
        found = effective_mixing(coupler, x, layer_input)
    assert_near(found, expected, torch.float32)
