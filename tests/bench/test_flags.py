"""Every flag of the original, the presets, and the list of the commands."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from bench.__main__ import commands
from bench.__main__ import main as list_commands
from bench.cli import parse
from bench.config import PRESETS, RunConfig, flags_of, preset_names
from bench.run.prepare import Identifier, prepare
from tests.bench._runs import refusal

# Flag of the original, value on the command line (None: a switch), group, field, value in the config.
ORIGINAL = [
    ("embed_dim", "32", "model", "embed_dim", 32),
    ("num_layers", "3", "model", "num_layers", 3),
    ("num_heads", "4", "model", "num_heads", 4),
    ("dropout_rate", "0.25", "model", "dropout_rate", 0.25),
    ("num_experts", "5", "model", "num_experts", 5),
    ("gnn_layers", "3", "model", "gnn_layers", 3),
    ("coupler_type", "GNN", "model", "coupler_type", "GNN"),
    ("hgnn_conv_type", "PyGHypergraphConv", "model", "hgnn_conv_type", "PyGHypergraphConv"),
    ("static_hyperedge_strategy", "all_triplets", "model", "static_hyperedge_strategy", "all_triplets"),
    ("hgnn_learnable_edge_weights", None, "model", "hgnn_learnable_edge_weights", True),
    ("no_hgnn_learnable_edge_weights", None, "model", "hgnn_learnable_edge_weights", False),
    ("vocab_size", "50000", "model", "vocab_size", 50_000),
    ("max_seq_length", "64", "model", "max_seq_length", 64),
    ("batch_size", "8", "training", "batch_size", 8),
    ("learning_rate", "5e-4", "training", "learning_rate", 5e-4),
    ("epochs", "2", "training", "epochs", 2),
    ("max_batches_per_epoch", "7", "training", "max_batches_per_epoch", 7),
    ("eval_every", "9", "training", "eval_every", 9),
    ("seed", "11", "training", "seed", 11),
    ("dataset_name", "wikitext", "data", "dataset_name", "wikitext"),
    ("dataset_config_name", "wikitext-103-v1", "data", "dataset_config_name", "wikitext-103-v1"),
    ("dataset_config_name", "wikitext-2-v1", "data", "dataset_config_name", "wikitext-2-v1"),
    ("num_train_samples", "100", "data", "num_train_samples", 100),
    ("num_eval_samples", "50", "data", "num_eval_samples", 50),
    ("checkpoint_dir", "kept", "places", "checkpoint_dir", Path("kept")),
    ("resume_checkpoint", "a.pt", "places", "resume_checkpoint", Path("a.pt")),
    ("run_name", "first", "places", "run_name", "first"),
    ("num_workers_dataloader", "2", "places", "num_workers_dataloader", 2),
    ("quiet", None, "places", "quiet", True),
]


@pytest.mark.parametrize(
    ("flag", "value", "group", "field", "expected", "hyphens"),
    [(*row, place % 2 == 0) for place, row in enumerate(ORIGINAL)],
    ids=[row[0] for row in ORIGINAL],
)
def test_every_flag_of_the_original_lands_where_it_belongs(flag, value, group, field, expected, hyphens):
    # Off before a switch turns it on, so that a switch without effect shows.
    start = ["--no-hgnn-learnable-edge-weights"] if expected is True and group == "model" else []
    name = "--" + (flag.replace("_", "-") if hyphens else flag)
    config = parse(RunConfig, [*start, name, *([] if value is None else [value])], presets=True)
    found = getattr(getattr(config, group), field)
    assert (found, type(found)) == (expected, type(expected))
    if not start:
        assert found != getattr(getattr(RunConfig(), group), field)


def shape(config: RunConfig) -> tuple:
    model, training = config.model, config.training
    return (model.num_experts, model.embed_dim, model.num_layers, model.max_seq_length,
            training.batch_size, training.epochs, training.max_batches_per_epoch,
            training.max_steps)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "epochs", "batches", "dropout", "test", "every"),
    [("baseline", 4, 200, 0.1, False, 0.25), ("full", 20, None, 0.3, True, 0.05)],
)
def test_the_presets_of_the_original_plan(preset, epochs, batches, dropout, test, every):
    config = parse(RunConfig, ["--preset", preset], presets=True)
    assert shape(config) == (4, 256, 4, 128, 32, epochs, batches, None)
    assert (config.model.dropout_rate, config.data.evaluate_test) == (dropout, test)
    assert (config.data.num_train_samples, config.data.num_eval_samples) == (None, None)
    assert config.measure.speed_warmup_steps == "auto"
    assert config.training.eval_every == every
    quick = parse(RunConfig, ["--preset", "quick"], presets=True).measure
    assert (quick.speed_warmup_steps, quick.speed_steps) == ("auto", 10)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_holds_flags_by_their_field_names(name):
    known = flags_of(RunConfig)
    for key in tomllib.loads((PRESETS / f"{name}.toml").read_text()):
        assert known[key].field == key


@pytest.mark.parametrize(
    ("flags", "epochs", "max_steps"),
    [
        ([], 4, None),
        (["--max-steps", "20"], None, 20),
        (["--max_steps=20"], None, 20),
        (["--epochs", "2"], 2, None),
        (["--epochs=2", "--max-steps", "20"], 2, 20),
        (["--run-name", "x-epochs"], 4, None),
    ],
)
def test_the_users_length_of_training_drops_the_presets(flags, epochs, max_steps):
    training = parse(RunConfig, ["--preset", "baseline", *flags], presets=True).training
    assert (training.epochs, training.max_steps) == (epochs, max_steps)
    assert training.max_batches_per_epoch == 200


def prepared(folder: Path, results: Path, *flags: str):
    given = ["--data-dir", str(folder), "--results-dir", str(results), "--max-seq-length", "16"]
    return prepare(parse(RunConfig, [*given, "--batch-size", "4", *flags], presets=True))


def test_a_larger_vocabulary_pads_and_counts_for_the_run_id(small_data_dir, tmp_path):
    plain = prepared(small_data_dir, tmp_path)
    words = plain.corpus.vocabulary.size
    assert plain.model_config.vocab_size == words
    same = prepared(small_data_dir, tmp_path, "--vocab-size", str(words))
    larger = prepared(small_data_dir, tmp_path, "--vocab-size", "1000")
    assert (larger.model_config.vocab_size, larger.model_config.padded_vocab_size) == (1000, 1024)
    assert plain.run_id == same.run_id != larger.run_id


def test_pinning_follows_the_device_of_the_run(small_data_dir, tmp_path, monkeypatch):
    """C2: a GPU in the machine does not matter to a run on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bench.device.device_memory_bytes", lambda _: 2**40)
    flags = ["--evaluate-test", "--num-eval-samples", "4", "--device"]
    found = prepared(small_data_dir, tmp_path, *flags, "cpu")
    assert [loader.pin_memory for loader in found.loaders.values()] == [False] * 4
    found = prepared(small_data_dir, tmp_path, *flags, "cuda")
    assert [loader.pin_memory for loader in found.loaders.values()] == [True] * 4


def test_a_schedule_is_checked_as_far_as_the_training_goes(small_data_dir, tmp_path):
    """A6: an epoch that is never reached refuses nothing; one that is does."""
    flags = ["--num-eval-samples", "4", "--batch-schedule", "0:4,999:512"]
    assert prepared(small_data_dir, tmp_path, *flags, "--max-steps", "12")
    assert prepared(small_data_dir, tmp_path, *flags, "--epochs", "999")
    assert prepared(small_data_dir, tmp_path, *flags[:3], "0:4,100000000:512")
    with pytest.raises(ValueError, match="batch_size 512 with drop_last gives no batch in epoch 999"):
        prepared(small_data_dir, tmp_path, *flags, "--epochs", "1000")


@pytest.mark.parametrize("flags", ["--epochs 1", "--epochs 3 --curriculum-start 1"])
def test_a_curriculum_with_all_blocks_is_the_run_without_one(small_data_dir, tmp_path, flags):
    """Also in its batches: the same blocks in the same order."""
    given = ["--num-eval-samples", "4", *flags.split()]
    plain = prepared(small_data_dir, tmp_path, *given)
    paced = prepared(small_data_dir, tmp_path, *given, "--curriculum", "rarity")
    assert paced.run_id == plain.run_id
    for epoch in range(3):
        for found in (plain, paced):
            found.loaders["train"].sampler_obj.move_to(epoch)
        orders = [found.loaders["train"].sampler_obj.order().tolist() for found in (plain, paced)]
        assert orders[0] == orders[1]
    slower = "--num-eval-samples 4 --curriculum rarity --min-steps-per-epoch 1 --epochs".split()
    assert prepared(small_data_dir, tmp_path, *slower, "3").identity["training"]["curriculum"] is not None
    paces = [[*slower, "2", "--curriculum-pacing", pacing] for pacing in ("linear", "competence_sqrt")]
    assert len({prepared(small_data_dir, tmp_path, *pace).run_id for pace in paces}) == 1, (
        "two epochs are one"
    )


def test_workers_reach_every_loader_and_change_no_number(small_data_dir, tmp_path):
    flags = ["--evaluate-test", "--num-train-samples", "40"]
    alone = prepared(small_data_dir, tmp_path, *flags)
    helped = prepared(small_data_dir, tmp_path, *flags, "--num-workers-dataloader", "1")
    assert helped.run_id == alone.run_id
    assert {name: loader.num_workers for name, loader in helped.loaders.items()} == {
        "train": 1, "val": 1, "val_final": 1, "test": 1,
    }  # fmt: skip
    assert alone.loaders["train"].num_workers == 0


def test_the_commands_are_listed_without_torch_in_80_columns(run_command):
    script = "import sys, bench.__main__ as m\nm.main([])\nprint('torch' in sys.modules)"
    lines = run_command("timeit", "-n1", "-r1", script).stdout.splitlines()
    assert "False" in lines
    assert max(map(len, lines)) <= 80
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert {"run", "check", "speed"} <= set(listed)
    assert "train a model" in listed["run"]
    assert not {"cli", "config", "prepare", "session"} & set(listed)


def test_a_command_is_a_module_with_a_main_and_is_not_imported(tmp_path):
    (tmp_path / "one.py").write_text(
        '"""``python -m bench.one``: does one.\n\nMore."""\nraise OSError\ndef main(): ...\n'
    )
    (tmp_path / "none.py").write_text('"""Nothing."""\n')
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "__main__.py").write_text('"""Does two."""\ndef main(): ...\n')
    assert commands(tmp_path) == {"one": "does one.", "two": "Does two."}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("chek", "Did you mean 'check'?"),
        ("--hlp", "unknown command '--hlp'"),
        ("runs", "Did you mean 'run'?"),
    ],
)
def test_an_unknown_command_gets_the_nearest_name(capsys, argument, said):
    assert said in refusal(capsys, [argument], list_commands)


@pytest.mark.parametrize(
    "flags",
    ["--dataset wikitext", "--dataset Salesforce/wikitext", "--dataset wikitext-2-v1",
     "--dataset_config_name wikitext-2-v1",
     "--dataset_name wikitext --dataset_config_name wikitext-2-v1"],
)  # fmt: skip
def test_every_name_of_wikitext_2_takes_its_folder(wikitext_dir, tmp_path, flags):
    identify = Identifier()
    places = ["--data-dir", str(wikitext_dir), "--results-dir", str(tmp_path), "--num-eval-samples", "4"]
    found = identify(parse(RunConfig, [*places, *flags.split()]))
    assert (found.corpus.name, found.corpus.config_name) == ("wikitext", "wikitext-2-v1")
    assert found.identity == identify(parse(RunConfig, places))[0]
