"""The names of the original experiments stay importable from ``gnnmoe`` (DESIGN, "Names")."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gnnmoe
from tests.gnnmoe._support import make_model, small_config

REPOSITORY = Path(gnnmoe.__file__).parents[1]
ORIGINAL_NAMES = [
    "GNNMoEConfig", "GNNMoEModel", "GNNMoELayer", "GNNExpertCoupler", "HGNNExpertCoupler",
    "PyGHypergraphConvWrapper",
]  # fmt: skip
ORIGINAL_FIELDS = {
    "coupler_type", "hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights",
    "num_experts", "gnn_layers", "embed_dim", "num_layers", "num_heads", "max_seq_length",
    "dropout_rate", "vocab_size",
}  # fmt: skip


def test_names_are_importable_and_listed_and_others_raise_an_attribute_error():
    for name in [*ORIGINAL_NAMES, "Coupler", "build_coupler", "register_coupler"]:
        assert getattr(gnnmoe, name).__name__ == name
        assert name in gnnmoe.__all__
        assert name in dir(gnnmoe)
    with pytest.raises(AttributeError, match="'gnnmoe' has no attribute 'GNNMoE'"):
        gnnmoe.GNNMoE  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_names_of_config_fields_and_methods():
    assert {field.name for field in dataclasses.fields(gnnmoe.GNNMoEConfig)} >= ORIGINAL_FIELDS
    parameters = inspect.signature(gnnmoe.GNNMoEModel.forward).parameters
    assert list(parameters) == [
        "self", "input_ids", "attention_mask", "labels", "targets", "return_logits"
    ]  # fmt: skip
    generate = inspect.getattr_static(gnnmoe.HGNNExpertCoupler, "generate_static_hyperedges")
    assert isinstance(generate, staticmethod)
    assert list(inspect.signature(generate.__func__).parameters) == ["num_experts", "strategy"]
    layer = make_model(coupler_type="GNN").layers[0]
    assert isinstance(layer, gnnmoe.GNNMoELayer)
    assert isinstance(layer.coupler, gnnmoe.GNNExpertCoupler)
    assert isinstance(layer.coupler.get_expert_communication_matrices(), list)


@pytest.mark.slow
def test_torch_is_imported_for_a_model_only_and_pyg_for_its_own_backends_only():
    code = (
        "import sys, gnnmoe; from gnnmoe import GNNMoEConfig; GNNMoEConfig(); dir(gnnmoe);"
        "print([m for m in ('torch', 'torch_geometric') if m in sys.modules]);"
        "import torch; config = GNNMoEConfig(embed_dim=8, vocab_size=64, max_seq_length=4);"
        "gnnmoe.GNNMoEModel(config, seed=0)(torch.zeros(1, 4, dtype=torch.int64));"
        "print('torch_geometric' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["[]", "False"], done.stderr


def test_the_model_never_imports_the_harness():
    for path in (REPOSITORY / "gnnmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not any(module.split(".")[0] == "bench" for module in modules), path


SIZES = ["num_experts", "embed_dim", "num_layers", "num_heads", "gnn_layers", "max_seq_length", "vocab_size"]


@pytest.mark.parametrize("name", SIZES)
def test_config_refuses_sizes_that_are_no_positive_whole_number(name):
    for value in (0, -1, True, 2.0, "4", None, 2**63):
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be a whole number from 1 to "):
            small_config(**{name: value})


def test_config_refuses_a_dropout_outside_its_range():
    for rate in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_rate is .*; it must lie in \[0, 1\)"):
            small_config(dropout_rate=rate)


def test_config_refuses_heads_that_do_not_divide_and_lists_those_that_do():
    with pytest.raises(ValueError, match="num_heads is 5 and does not divide embed_dim 12") as caught:
        small_config(embed_dim=12, num_heads=5)
    assert "heads that do: 1, 2, 3, 4, 6, 12." in str(caught.value)
    assert small_config(embed_dim=12, num_heads=6).num_heads == 6


@pytest.mark.parametrize(("words", "rows"), [(1, 64), (63, 64), (64, 64), (65, 128), (33_278, 33_280)])
def test_config_pads_the_vocabulary_to_a_multiple_of_64(words, rows):
    assert small_config(vocab_size=words).padded_vocab_size == rows


def test_config_to_dict_holds_every_field_and_builds_it_again():
    config = small_config(coupler_options={"backend": "loop"}, dropout_rate=0.1)
    values = config.to_dict()
    assert values.keys() >= ORIGINAL_FIELDS
    assert gnnmoe.GNNMoEConfig(**values) == config
    values["coupler_options"]["backend"] = "pyg"
    assert config.coupler_options == {"backend": "loop"}
