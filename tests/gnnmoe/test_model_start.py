"""Where a model starts: seeds and named streams, counts, and what it says about its experts."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import HypergraphConv

from gnnmoe import GNNMoEConfig, GNNMoEModel, coupler_names
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.model import GNNMoELayer
from gnnmoe.seeds import RandomStreams, stream_seed
from tests.gnnmoe._support import assert_near, make_model, small_config, token_ids

INITIALIZATIONS = ("project", "original")
named_couplers = pytest.mark.parametrize("coupler_type", coupler_names())


def shared_state(model: GNNMoEModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".coupler." not in name}


@named_couplers
def test_seeds_at_one_seed_every_coupler_starts_from_the_same_trunk_and_experts(coupler_type):
    initialization = INITIALIZATIONS[coupler_names().index(coupler_type) % 2]

    def start(**fields):
        return shared_state(GNNMoEModel(small_config(initialization=initialization, **fields), seed=3))

    reference, found = start(coupler_type="mean"), start(coupler_type=coupler_type, gnn_layers=3)
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


# --- initialization: of this project, or of the original experiments -----------------------------------

DOCS = Path(__file__).parents[2] / "docs/couplers.md"
OTHER_LAYERS = ("HNHN", "AllDeepSets", "AllSetTransformer", "EDHNN")
THETA = ("HypergraphConv", "PyGHypergraphConv", "HGNNConv", "HypergraphAttention")
IN_EVERY_MODEL = {  # part → its parameters' names in the state dict
    "embeddings of tokens and positions": r"(token|position)_embedding\.weight",
    "experts: queries, keys and values": r".*\.experts\.\d\.qkv\.weight",
    "experts: output projection and feed-forward maps": r".*\.experts\.\d\.(proj|up|down)\.weight",
}
IN_A_COUPLER = {  # part → the couplers that have it, and its parameters' names in them
    "combiner": (("mean", "GNN", "HNHN"), r"combiner\.0\.weight"),
    "`GNN`: maps W_n and W_s": (("GNN",), r".*(neighbor|self)_map\.weight"),
    "`GNN`: weights w_a and w_b of the score": (("GNN",), r".*edge_score\.weight"),
    "`GNN`: adjacency logits A": (("GNN",), r".*adjacency_logits"),
    f"{', '.join(f'`{name}`' for name in THETA)}: map Θ": (THETA, r"layers\.\d\.weight"),
    f"{', '.join(f'`{name}`' for name in OTHER_LAYERS)}: maps":
        (OTHER_LAYERS, r"layers\.(?!.*(norm|query)).*weight"),
    "`mean_linear`: maps": (("mean_linear",), r"maps.*weight"),
    "`attention`: queries, keys and values": (("attention",), r".*(query|key|value)\.weight"),
    "`attention`: output map": (("attention",), r".*output\.weight"),
    "`gate`, `topk`: router": (("gate", "topk"), r"router\.weight"),
    "`static`: logits a": (("static",), "expert_logits"),
}  # fmt: skip


def documented_starts() -> dict[str, dict[str, float]]:
    """The table "How weights start" of the docs: part → initialization → standard deviation at D = 64."""
    section = DOCS.read_text().partition("\n## How weights start\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()
            if line.startswith("| ")]  # fmt: skip
    assert rows[0] == ["part", "`project`", "`original`"]
    return {part: dict(zip(INITIALIZATIONS, map(float, numbers), strict=True)) for part, *numbers in rows[1:]}


def fields_of(coupler: str) -> dict[str, str]:
    layer = {"coupler_type": "HGNN", "hgnn_conv_type": coupler}
    return {"coupler_type": coupler} if coupler in coupler_names() else layer


def matching(module: nn.Module, pattern: str) -> list[Tensor]:
    return [p.detach().flatten() for name, p in module.named_parameters() if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_every_part_starts_with_the_standard_deviation_that_the_docs_list(initialization):
    config = small_config(embed_dim=64, initialization=initialization, coupler_type="mean", vocab_size=500)
    couplers = dict.fromkeys(name for names, _ in IN_A_COUPLER.values() for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GNNMoEModel(config)
        wide = replace(config, num_experts=16, gnn_layers=4)  # many numbers in the small parts too
        built = {name: build_coupler(replace(wide, **fields_of(name))) for name in couplers}
    found = {part: matching(model, pattern) for part, pattern in IN_EVERY_MODEL.items()}
    for part, (names, pattern) in IN_A_COUPLER.items():
        every = [matching(built[name], pattern) for name in names]
        assert all(every), f"one of {names} lacks {part}"
        found[part] = [values for some in every for values in some]
    documented = documented_starts()
    assert documented.keys() == found.keys()
    for part, values in found.items():
        one = torch.cat(values)
        tolerance = 4 / (2 * len(one)) ** 0.5  # four standard errors of a standard deviation
        expected = documented[part][initialization]
        assert float(one.std()) == pytest.approx(expected, rel=tolerance, abs=5e-4 if expected else 0), part
    if initialization == "original":
        assert not any(bias.any() for module in built.values() for bias in matching(module, ".*bias"))


class OriginalLayer(nn.Module):
    """The modules of one layer of the original experiments, started by their initializer."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)
        self.feed_forward = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.hypergraph = nn.ModuleList(HypergraphConv(D, D) for _ in range(2))
        self.graph = nn.ModuleList([nn.Linear(2 * D, 1), nn.Linear(D, D, bias=False), nn.Linear(D, D)])
        self.combiner = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


THEIRS = {  # the original's parameters → coupler here, parameters here
    r"attention\.in_proj_weight": ("PyGHypergraphConv", r"experts\.0\.qkv\.weight"),
    r"attention\.in_proj_bias": ("PyGHypergraphConv", r"experts\.0\.qkv\.bias"),
    r"attention\.out_proj\.weight": ("PyGHypergraphConv", r"experts\.0\.proj\.weight"),
    r"feed_forward\..*\.weight": ("PyGHypergraphConv", r"experts\.0\.(up|down)\.weight"),
    r"hypergraph\.\d\.lin\.weight": ("PyGHypergraphConv", r"coupler\.layers\.\d\.weight"),
    r"hypergraph\.\d\.bias": ("PyGHypergraphConv", r"coupler\.layers\.\d\.bias"),
    r"combiner\.0\.weight": ("PyGHypergraphConv", r"coupler\.combiner\.0\.weight"),
    r"graph\.[12]\.weight": ("GNN", r"coupler\.layers\.0\.(neighbor|self)_map\.weight"),
    r".*\.bias": ("GNN", r".*\.bias"),
}


def test_original_starts_as_the_modules_of_the_original_do():
    """Not the same numbers: the same standard deviation, and the same shape of the distribution."""
    D = 128
    config = small_config(embed_dim=D, initialization="original", num_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = OriginalLayer(D)
        ours = {
            name: GNNMoELayer(replace(config, **fields_of(name))) for name in ("PyGHypergraphConv", "GNN")
        }
    for there, (coupler, here) in THEIRS.items():
        one, other = torch.cat(matching(theirs, there)), torch.cat(matching(ours[coupler], here))
        assert float(other.std()) == pytest.approx(float(one.std()), rel=0.03, abs=1e-8), there
        if one.any():  # E x⁴ / (E x²)²: 3 of a normal distribution, 1.8 of a uniform one
            shapes = [float((x**4).mean() / (x**2).mean() ** 2) for x in (one, other)]
            assert shapes[1] == pytest.approx(shapes[0], rel=0.1), there


def test_an_unknown_initialization_is_refused_with_the_allowed_names():
    said = r"unknown initialization 'orginal'; allowed: original, project\. Did you mean 'original'\?"
    with pytest.raises(ValueError, match=said):
        GNNMoEConfig(initialization="orginal")  # pyright: ignore[reportArgumentType]


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
    if coupler_type in ("attention", "gate", "GNN", "HGNN", "static", "topk"):
        assert (found["layer_0"]["mixing"] - found["layer_1"]["mixing"]).abs().max() > 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
