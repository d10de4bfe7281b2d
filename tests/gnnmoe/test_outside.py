"""Hypergraph layers and hyperedge strategies from outside: loaded like couplers, identified, refused."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from bench.training.environment import coupler_sha256
from gnnmoe import GNNMoEConfig, GNNMoEModel, HGNNExpertCoupler, discovery
from gnnmoe.couplers.registry import build_coupler, coupler_identity
from gnnmoe.hypergraph.strategies import STRATEGIES, static_hyperedges, strategy_identity
from gnnmoe.layers.base import LAYERS
from gnnmoe.layers.hnhn import HNHN
from tests.gnnmoe._support import assert_near, normal, small_config

MINE = '''
from gnnmoe import HypergraphLayer
from gnnmoe.layers.hnhn import HNHN


class Largest(HypergraphLayer):
    """The largest of the means of an expert's hyperedges."""

    def forward(self, x_NED, from_weights, start_NED):
        z_NMD = self.mean_of_members(x_NED) * from_weights.sum()
        return z_NMD.amax(1, keepdim=True).expand_as(x_NED)


class Twice(HNHN):
    """HNHN, twice."""

    def forward(self, x_NED, from_weights, start_NED):
        return 2 * super().forward(x_NED, from_weights, start_NED)


def star(num_experts, *, hub=0):
    """A hub and its spokes."""
    return [(hub, expert) for expert in range(num_experts) if expert != hub]


def picked(num_experts, *, k: int = 0):
    return [[[0, 1]], [[0, 0]], [[]], [3]][k]


number = 3
'''


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def of(layer: str = "HypergraphConv", strategy: str = "all_pairs") -> GNNMoEConfig:
    return small_config(hgnn_conv_type=layer, static_hyperedge_strategy=strategy, num_layers=1)


def test_a_layer_and_a_strategy_from_a_file_train_in_a_model(mine):
    model = GNNMoEModel(of(f"{mine}:Largest", f"{mine}:star:hub=1"), seed=0)
    coupler = model.layers[0].coupler
    assert isinstance(coupler, HGNNExpertCoupler)
    assert [type(layer).__name__ for layer in coupler.layers] == ["Largest", "Largest"]
    assert coupler._members == [(0, 1), (1, 2), (1, 3)]
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids, labels=ids)["loss"].backward()
    assert coupler.hyperedge_weights is not None
    assert coupler.hyperedge_weights.grad is not None
    x = normal(1, 2, 4, 6).float()
    assert coupler.reference(x) is None
    assert coupler.flops(3) is None


def test_a_layer_with_a_forward_of_its_own_does_not_inherit_what_describes_another(mine):
    """Not even ``mean``, by which the coupler reads the last layer."""
    torch.manual_seed(0)
    twice = LAYERS.find(f"{mine}:Twice")([(0, 1), (1, 2)], 3, 6)
    x, weights = normal(2, 3, 6).float(), twice.from_weights(torch.ones(2))
    assert_near(twice.mean(x, weights, x), twice(x, weights, x).mean(1), torch.float32)
    assert (twice.flops(1), twice.naive(list(x.unbind(1)), list(torch.ones(2)), [])) == (None, None)  # pyright: ignore
    assert HNHN([(0, 1)], 2, 6).flops(1) is not None


def test_the_same_three_ways_as_for_couplers(mine, monkeypatch):
    monkeypatch.syspath_prepend(mine.parent)
    for registry in (LAYERS, STRATEGIES):
        monkeypatch.setattr(registry, "registered", dict(registry))
    points = {
        "gnnmoe.layers": [EntryPoint("largest", "mine:Largest", "gnnmoe.layers")],
        "gnnmoe.strategies": [EntryPoint("spokes", "mine:star", "gnnmoe.strategies")],
    }
    monkeypatch.setattr(discovery, "entry_points", lambda group: points.get(group, []))
    for registry in (LAYERS, STRATEGIES):
        registry.forget_discovery()
    try:
        assert {"largest", "HNHN"} <= set(LAYERS)
        stars = [
            static_hyperedges(4, text)
            for text in ("spokes:hub=2", "spokes:2", "mine:star:hub=2", f"{mine}:star:2")
        ]
        assert stars == [[(0, 2), (1, 2), (2, 3)]] * 4
        names = {LAYERS.find(text).__name__ for text in ("largest", "mine:Largest", f"{mine}:Largest")}
        assert names == {"Largest"}
    finally:
        sys.modules.pop("mine")
        for registry in (LAYERS, STRATEGIES):
            registry.forget_discovery()


def test_a_layer_counts_by_its_name_and_hyperedges_by_content(mine, tmp_path):
    found = coupler_identity(of(f"{mine}:Largest", f"{mine}:star"))
    assert found["hgnn_conv_type"] == "file:Largest"
    (tmp_path / "edges.json").write_text("[[0, 1], [0, 2], [0, 3]]")
    assert found["static_hyperedge_strategy"] == strategy_identity(f"file:{tmp_path / 'edges.json'}")
    assert coupler_identity(of(f"{mine}:Largest", f"{mine}:star:hub=1")) != found
    moved = mine.rename(tmp_path / "renamed.py")
    assert coupler_identity(of(f"{moved}:Largest", f"{moved}:star:hub=0")) == found
    assert coupler_identity(of("HNHN", "ring"))["hgnn_conv_type"] == "HNHN"


def test_an_edited_layer_or_strategy_makes_a_run_stale(mine, tmp_path):
    layer, strategy = of(f"{mine}:Largest"), of(strategy=f"{mine}:star")
    before = [coupler_sha256(config) for config in (layer, strategy, of())]
    mine.write_text(MINE.replace("amax", "amin").replace("hub=0", "hub=1"))
    after = [coupler_sha256(config) for config in (layer, strategy, of())]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]
    mine.write_text(MINE + "# a comment\n")
    moved = mine.rename(tmp_path / "renamed.py")
    assert coupler_sha256(of(f"{moved}:Largest")) == before[0]


@pytest.mark.parametrize(
    ("layer", "strategy", "message"),
    [  # what is wrong with a layer or a strategy
        ("{}:Largst", "all", r"in mine\.py 'Largst'; allowed: .*Largest, Twice\. Did you mean 'Largest'"),
        ("{}:star", "all", r"star' breaks the contract: it is not a subclass of gnnmoe\.Hyper"),
        ("no.py:Largest", "all", r"hgnn_conv_type 'no\.py:Largest': there is no file"),
        ("HNHN", "{}:stra", r"in mine\.py 'stra'; allowed: picked, star\. Did you mean 'star'"),
        ("HNHN", "{}:Largest", r"mine\.py:Largest' is no function; a strategy is a function such as star\("),
        ("HNHN", "{}:star:hub=9", r"gives the hyperedge \[0, 9\]: member 9 is out of range for 4 experts"),
        ("HNHN", "{}:star:hub=x", r"hub is 'x'; it must be a whole number\. .*star takes hub \(default 0\)"),
        ("HNHN", "{}:picked:1", r"gives the hyperedge \[0, 0\]: member 0 is there more than once"),
        ("HNHN", "{}:picked:2", r"gives the hyperedge \[\]: the hyperedge is empty"),
        ("HNHN", "{}:picked:3", r"fails with 4 experts \(TypeError: .*or mend the function"),
        ("HNHN", "{}:picked:7", r"4 experts \(IndexError: list index out of range\); give it other"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(mine, layer, strategy, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_coupler(of(layer.format(mine), strategy.format(mine)))
    assert "\n" not in str(caught.value)
