"""``--config FILE.toml``: a file of flags, between the preset and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cli import parse
from bench.config import PlacesConfig, RunConfig
from tests.bench._runs import refusal


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.toml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys, tmp_path):
    """What is printed for wrong flags; nothing was written."""

    def refused(*flags: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = refusal(capsys, ["--results-dir", str(tmp_path / "results"), *flags])
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return refused


def from_file(path: str, *flags: str) -> RunConfig:
    return parse(RunConfig, ["--config", path, *flags], presets=True)


def test_a_file_says_all_that_flags_can(write):
    config = from_file(write("""
        coupler = "GNN"
        num-experts = 3
        learning_rate = 1
        adam_betas = [0.8, 0.9]
        hgnn_learnable_edge_weights = false
        quiet = true
        num_eval_samples = "None"
        num_workers_dataloader = "auto"
        data_dir = "some/where"
        run_name = "--odd"
        coupler_option = ["residual=false", "backend=loop"]
    """))  # fmt: skip
    assert (config.model.coupler_type, config.model.num_experts) == ("GNN", 3)
    assert (config.training.learning_rate, config.training.adam_betas) == (1.0, (0.8, 0.9))
    assert (config.model.hgnn_learnable_edge_weights, config.places.quiet) == (False, True)
    assert (config.data.num_eval_samples, config.places.num_workers_dataloader) == (None, "auto")
    assert (config.places.data_dir, config.places.run_name) == (Path("some/where"), "--odd")
    assert config.model.resolved(9).coupler_options == {"residual": "false", "backend": "loop"}


def test_flags_override_the_file_and_the_file_the_preset(write):
    path = write('preset = "baseline"\nembed_dim = 32\nnum_experts = 3\nquiet = true')
    config = from_file(path, "--num_experts", "2", "--no-quiet", f"--config={write('seed = 2', '2.toml')}")
    assert (config.model.num_layers, config.model.embed_dim, config.model.num_experts) == (4, 32, 2)
    assert (config.places.quiet, config.training.seed) == (False, 2)
    path = write('preset = "baseline"')
    assert from_file(path).training.epochs == 4
    assert from_file(path, "--preset", "full").training.epochs == 20
    assert from_file(path, "--preset=quick") == RunConfig()


@pytest.mark.parametrize(
    ("text", "flags", "epochs", "max_steps"),
    [
        ("max_steps = 20", [], None, 20),
        ("max-steps = 20", ["--epochs", "3"], 3, None),
        ("max_steps = 20\nepochs = 3", [], 3, 20),
        ("epochs = 3", ["--max-steps", "5"], None, 5),
        ("seed = 1", [], 4, None),
    ],
)
def test_the_length_of_training_comes_from_the_last_that_gives_one(write, text, flags, epochs, max_steps):
    training = from_file(write(f'preset = "baseline"\n{text}'), *flags).training
    assert (training.epochs, training.max_steps) == (epochs, max_steps)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_expert = 4", ["unknown key 'num_expert'", "bench.run --help-all", "'num_experts'?"]),
        ("config = 'other.toml'", ["unknown key 'config'"]),
        ("[model]\nnum_experts = 4", ["unknown key 'model'"]),
        ("[coupler]\nnum_experts = 4", ["coupler is a table", "must be text"]),
        ('num_experts = "four"', ["num_experts is 'four'", "must be a whole number"]),
        ("num_experts = 2.5", ["num_experts is 2.5", "must be a whole number"]),
        ("num_experts = 0", ["num_experts is 0; it must be a whole number from 1 to 10,000"]),
        ("num_experts = true", ["num_experts is True", "must be a whole number"]),
        ('epochs = "all"', ["epochs is 'all'", 'a whole number from 1 to 1,000,000,000 or "None"']),
        ("quiet = 3", ["quiet is 3", "must be true or false"]),
        ("run_name = 3", ["run_name is 3", "text"]),
        ('device = "tpu"', ["device is 'tpu'", "'auto', 'cpu', 'cuda', 'mps'"]),
        ('num_workers_dataloader = "many"', ["'many'", "a whole number from 0 to 256 or 'auto'"]),
        ("learning_rate = '8e-3'", ["learning_rate is '8e-3'", "must be a finite number greater than 0"]),
        ("adam_betas = [0.9]", ["adam_betas is [0.9]", "a list of a number in [0, 1) and a number"]),
        ("coupler_option = 'k=2'", ["coupler_option is 'k=2'", "a list of text"]),
        ("seed = 2024-01-01", ["seed is", "must be a whole number"]),
        ("coupler = 'GNN'\ncoupler_type = 'mean'", ["coupler_type and coupler are the same flag"]),
        ("seed = 1\nnum_experts = \nquiet = true", ["not TOML", "line 2"]),
        ("preset = 'basline'", ["preset is 'basline'", "'baseline', 'full'", "Did you mean 'baseline'"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_like_the_flags(refused, write, text, said):
    path = write(text)
    message = refused("--config", path)
    for part in [f"error: --config {path}", *said]:
        assert part in message
    assert message.count("error") == 1


def test_a_file_that_cannot_be_read_is_refused(refused, tmp_path):
    assert "absent.toml cannot be read: No such file" in refused("--config", str(tmp_path / "absent.toml"))
    assert "Is a directory" in refused("--config", str(tmp_path))
    assert "--config has no value" in refused("--config")
    assert "name a TOML file" in refused("--config", "")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml" in refused("--config", str(tmp_path / "binary.toml"))


def test_other_commands_know_neither_presets_nor_files(write, capsys):
    for flag in ("--config", "--preset"):
        assert flag in refusal(capsys, [flag, write("seed = 1")], lambda given: parse(PlacesConfig, given))
