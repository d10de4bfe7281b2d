"""Where a model starts: seeds and named streams, counts, and what it says about its experts."""

import hashlib
from typing import Any

import pytest
import torch

from gnnmoe import GNNMoEModel, coupler_names
from gnnmoe.layer import GNNMoELayer
from gnnmoe.seeds import RandomStreams, stream_seed
from tests.gnnmoe._support import assert_near, make_model, small_config, token_ids

named_couplers = pytest.mark.parametrize("coupler_type", coupler_names())


def shared_state(model: GNNMoEModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".coupler." not in name}


@named_couplers
def test_seeds_at_one_seed_every_coupler_starts_from_the_same_trunk_and_experts(coupler_type):
    reference = shared_state(GNNMoEModel(small_config(coupler_type="mean"), seed=3))
    found = shared_state(GNNMoEModel(small_config(coupler_type=coupler_type, gnn_layers=3), seed=3))
    if coupler_type == "dense":  # its one block is of another width, and shares the trunk only
        trunk = {name for name in reference if ".experts." not in name}
        assert trunk == {name for name in found if ".experts." not in name}
        reference = {name: reference[name] for name in trunk}
        found = {name: found[name] for name in trunk}
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], value) for name, value in reference.items())


@named_couplers
def test_seeds_same_seed_same_model_and_loss(coupler_type):
    config, ids = small_config(coupler_type=coupler_type), token_ids(3, 8)
    one, two, other = (GNNMoEModel(config, seed=seed) for seed in (3, 3, 4))
    state = two.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    losses = [model(ids, labels=ids)["loss"] for model in (one, two, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_seeds_experts_layers_and_seeds_differ():
    def draws(seed):
        model: Any = GNNMoEModel(small_config(), seed=seed)
        parts = [expert.qkv.weight for layer in model.layers for expert in layer.experts]
        parts += [layer.coupler.layers[k].weight for layer in model.layers for k in (0, 1)]
        return [*parts, model.token_embedding.weight, model.position_embedding.weight]

    flat = [tensor.flatten()[:36] for seed in (0, 1) for tensor in draws(seed)]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)


def test_seeds_building_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    GNNMoEModel(small_config(dropout_rate=0.1), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_without_a_seed_follow_the_global_generator():
    def build(seed):
        torch.manual_seed(seed)
        return [GNNMoEModel(small_config()).token_embedding.weight for _ in range(2)]

    with torch.random.fork_rng(devices=[]):
        (a, b), (c, _), (d, _) = build(1), build(1), build(2)
        torch.manual_seed(1)
        layers = [GNNMoELayer(small_config()) for _ in range(2)]
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    assert not torch.equal(a, d)
    first, second = (layer.expert_outputs(torch.eye(6)[None]) for layer in layers)
    assert not torch.equal(first, second)


def test_seeds_streams_have_names_go_on_and_restore():
    digest = hashlib.sha256(b"7:init.trunk").digest()
    assert stream_seed(7, "init.trunk") == int.from_bytes(digest[:8], "little") // 2
    assert stream_seed(0, "init.experts") == 204565597894977552
    streams, other = RandomStreams(7), RandomStreams(7)
    outside = torch.get_rng_state()
    with streams("a"):
        first = torch.rand(4)
    with streams("b"):
        between = torch.rand(4)
    with streams("a"):
        second = torch.rand(4)
    with other("a"):
        both = torch.rand(8)
    assert torch.equal(torch.cat([first, second]), both)
    assert not torch.equal(first, between)
    with pytest.raises(RuntimeError), streams("c"):
        torch.rand(-1)
    assert torch.equal(torch.get_rng_state(), outside)


def test_trunk_and_experts_start_small_with_zero_biases():
    model: Any = GNNMoEModel(small_config(embed_dim=64), seed=0)
    expert = model.layers[0].experts[0]
    for weight in (model.token_embedding.weight, model.position_embedding.weight, expert.up.weight):
        assert 0.017 < weight.std() < 0.023
    for bias in (expert.qkv.bias, expert.proj.bias, expert.up.bias, expert.down.bias, model.head.bias):
        assert torch.count_nonzero(bias) == 0


@named_couplers
def test_parameter_counts_add_up(coupler_type):
    config = small_config(coupler_type=coupler_type)
    model = GNNMoEModel(config, seed=0)
    counts = model.parameter_counts()
    D, E, layers = 6, 4, 2
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert set(counts) == {"total", "expert", "coupler", "other"}
    assert counts["total"] == sum(sizes.values()) == sum(v for k, v in counts.items() if k != "total")
    if coupler_type != "dense":  # tests/gnnmoe/test_dense.py
        assert counts["expert"] == layers * E * (12 * D * D + 13 * D)
    assert counts["coupler"] == sum(size for name, size in sizes.items() if ".coupler." in name)
    assert counts["other"] == 64 * D + 8 * D + 2 * D + 50  # the tied embedding counts once
    combiner, convolution = D * D + 3 * D, D * D + D
    gnn_round = E * E + (2 * D + 1) + D * D + convolution
    attention = 2 * (4 * D * D + 3 * D)
    per_layer = {"mean": 0, "HGNN": 2 * convolution + 6, "GNN": 2 * gnn_round, "attention": attention,
                 "mean_linear": 2 * convolution, "static": E, "gate": E * D, "topk": E * D}  # fmt: skip
    if coupler_type in per_layer:
        assert counts["coupler"] == layers * (combiner + per_layer[coupler_type])


@named_couplers
def test_analyze_expert_communication_with_and_without_input(coupler_type):
    model, ids = make_model(coupler_type=coupler_type), token_ids(3, 8)
    couplers = [layer.coupler for layer in model.layers]
    seen: list[tuple] = []  # what the couplers read in a forward pass of the model
    hooks = [coupler.register_forward_pre_hook(lambda _, args: seen.append(args)) for coupler in couplers]
    model(ids)
    for hook in hooks:
        hook.remove()
    expected = {f"layer_{k}": couplers[k].communication(*seen[k]) for k in range(2)}
    static, found = model.analyze_expert_communication(), model.analyze_expert_communication(ids)
    assert list(static) == list(found) == ["layer_0", "layer_1"]
    for name, parts in found.items():
        assert parts.keys() == expected[name].keys() >= static[name].keys() | {"mixing"}
        for part, value in parts.items():
            assert not value.requires_grad
            assert_near(value, expected[name][part])
        for part, value in static[name].items():
            assert torch.equal(value, parts[part])
    if coupler_type not in ("mean", "mean_linear", "dense"):
        assert (found["layer_0"]["mixing"] - found["layer_1"]["mixing"]).abs().max() > 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
