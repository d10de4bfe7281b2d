"""Flags, presets and what wrong input gets: one message, exit status 2, nothing written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NoReturn

import pytest

from bench.cli import parse
from bench.config import RunConfig
from bench.data.corpus import load_corpus
from bench.run.__main__ import main
from gnnmoe.config import Refused


def test_the_defaults_are_the_quick_preset_of_the_design():
    config = parse(RunConfig, [])
    model, training, data = config.model, config.training, config.data
    assert (model.num_experts, model.embed_dim, model.num_heads, model.num_layers) == (4, 64, 2, 2)
    assert (model.max_seq_length, model.dropout_rate, training.batch_size) == (128, 0.0, 16)
    assert (training.learning_rate, training.adam_betas, training.weight_decay) == (8e-3, (0.9, 0.95), 0.1)
    assert (training.warmup_steps, training.min_lr_ratio, training.max_grad_norm) == (0.125, 0.05, 1.0)
    assert (data.num_eval_samples, data.evaluate_test) == (512, False)
    assert parse(RunConfig, ["--preset", "quick"], presets=True) == config


def test_underscores_and_the_flag_names_of_the_original_work():
    flags = [
        "--coupler_type",
        "GNN",
        "--static_hyperedge_strategy",
        "all",
        "--no_hgnn_learnable_edge_weights",
    ]
    config = parse(RunConfig, [*flags, "--hgnn_conv_type=PyGHypergraphConv", "--num_experts", "3"])
    assert config.model.coupler_type == "GNN"
    assert config.model.static_hyperedge_strategy == "all"
    assert config.model.hgnn_learnable_edge_weights is False
    assert (config.model.hgnn_conv_type, config.model.num_experts) == ("PyGHypergraphConv", 3)


def test_a_flag_given_later_wins():
    assert parse(RunConfig, ["--coupler", "HGNN", "--coupler", "mean"]).model.coupler_type == "mean"


def test_coupler_options_reach_the_model_config():
    config = parse(RunConfig, ["--coupler-option", "backend=loop", "--coupler-option", "residual=false"])
    resolved = config.model.resolved(100)
    assert resolved.coupler_options == {"backend": "loop", "residual": "false"}
    assert resolved.vocab_size == 100


def test_help_is_quick_because_it_imports_no_torch(run_command):
    """Speed row of the main job: ``--help`` in under three seconds; torch alone takes two."""
    script = "import sys, bench.run.__main__ as run\ntry: run.main(['--help'])\nexcept SystemExit: pass\n"
    done = run_command("timeit", "-n1", "-r1", script + "print('torch' in sys.modules)")
    assert "--coupler" in done.stdout
    assert "False" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("module", "called", "arguments"),
    [
        ("bench.run.__main__", "bench.run.prepare.prepare", []),
        ("bench.tune.__main__", "bench.training.loaders.load_text", []),
        ("bench.sweep.__main__", "bench.sweep.__main__.read_sweep", ["sweep.toml"]),
        ("bench.report.__main__", "bench.study.runs.the_study", ["study"]),
        ("bench.speed.__main__", "bench.speed.show.print_records", ["--table", "record"]),
        ("bench.check.__main__", "bench.check.leak_check.refuse_wrong_names", []),
        ("bench.data.__main__", "bench.data.__main__.measure", ["profile"]),
    ],
)
def test_a_refusal_is_one_message_and_a_mistake_of_our_own_a_traceback(
    module, called, arguments, monkeypatch, capsys
):
    command = importlib.import_module(module).main
    monkeypatch.setattr(called, failing(Refused("yours")))
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: yours\n")
    monkeypatch.setattr(called, failing(ValueError("ours")))
    with pytest.raises(ValueError, match="ours"):
        command(arguments)


def failing(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


def refusal(capsys, results, *flags: str) -> str:
    """Return what is printed for wrong ``flags``; the status is 2 and nothing was written."""
    with pytest.raises(SystemExit) as stopped:
        main(["--results-dir", str(results), *flags])
    assert stopped.value.code == 2
    assert not results.exists()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return " ".join((printed.err + printed.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coupler", "HGN"], ["unknown coupler 'HGN'", "GNN, HGNN, attention", "Did you mean 'HGNN'"]),
        (["--coupler", "nowhere:Class"], ["module 'nowhere' cannot be imported"]),
        (["--static-hyperedge-strategy", "all_pair"], ["unknown static_hyperedge_strategy", "'all_pairs'?"]),
        (["--hgnn-conv-type", "HyperConv"], ["unknown hgnn_conv_type", "Did you mean 'HypergraphConv'"]),
        (["--coupler-option", "bakend=loop"], ["unknown option", "Did you mean 'backend'"]),
        (["--coupler-option", "backend"], ["NAME=VALUE"]),
        (["--preset", "quik"], ["--preset is 'quik'", "'baseline', 'full'", "Did you mean 'quick'"]),
        (["--preset"], ["--preset has no value", "'baseline', 'full'"]),
        (["--num-expert", "4"], ["unknown flag '--num-expert'", "Did you mean '--num-experts'?"]),
        (["--num-heads", "3"], ["--num-heads is 3", "does not divide embed_dim 64", "1, 2, 4"]),
        (["--num-experts", "0"], ["--num-experts is 0", "at least 1"]),
        (["--num-experts", "-2"], ["--num-experts is -2"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--learning-rate", "-1"], ["--learning-rate is -1", "greater than 0"]),
        (["--max-steps", "many"], ["--max-steps is 'many'", "a whole number of at least 1 or"]),
        (["--max-steps"], ["--max-steps has no value", "a whole number"]),
        (["--seed=1", "more"], ["'more' belongs to no flag"]),
        (["--num-eval-samples", "0"], ["--num-eval-samples is 0"]),
        (["--device", "tpu"], ["--device is 'tpu'", "'cpu', 'cuda'"]),
        (["--vocab-size", "0"], ["--vocab-size is 0", "at least 1"]),
        (["--num-workers-dataloader", "-1"], ["is -1", "a whole number of at least 0 or 'auto'"]),
        (["--num-workers-dataloader", "many"], ["--num-workers-dataloader is 'many'"]),
        (["--coupler", ":Class"], ["package.module:Class"]),
        (["--learning-rate", "inf"], ["--learning-rate is inf", "a finite number"]),
        (["--weight-decay", "nan"], ["--weight-decay is nan", "a finite number of at least 0"]),
        (["--study", "a/b"], ["--study is ", "plain folder name"]),
        (["--study", ".."], ["--study is ", "plain folder name"]),
        (["--data-source", "embedded", "--dataset-name", "wikitext"], ["asked for wikitext", "pydoc-topics"]),
        (["--data-source", "folder"], ["needs a folder", "--data-dir"]),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_with_what_is_allowed(capsys, tmp_path, flags, said):
    message = refusal(capsys, tmp_path / "results", *flags)
    for part in said:
        assert part in message


def test_a_curriculum_without_epochs_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--results-dir", str(tmp_path / "results"), "--curriculum", "rarity"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: a curriculum paces itself by epochs; say how many, with --epochs.\n"
    )


def test_cuda_without_a_gpu_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refusal(capsys, tmp_path / "results", "--device", "cuda")
    assert "'cuda' is not available" in message
    assert "available: cpu" in message


def test_a_data_folder_without_the_files_names_what_is_missing_and_what_is_there(capsys, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "wiki.train.tokens").write_text(" a \n")
    (folder / "notes.txt").write_text("")
    message = refusal(capsys, tmp_path / "results", "--data-dir", str(folder))
    for part in ("wiki.valid.tokens", "wiki.test.tokens", "notes.txt"):
        assert part in message


def test_a_split_too_small_for_one_block_is_refused(capsys, tmp_path, small_data_dir):
    flags = ["--data-dir", str(small_data_dir), "--max-seq-length", "5000"]
    message = refusal(capsys, tmp_path / "results", *flags)
    assert "one block needs 5000" in message


def test_a_batch_larger_than_the_data_is_refused(capsys, tmp_path, small_data_dir):
    """A6: with drop_last a batch larger than the data is an error, not zero batches."""
    flags = ["--data-dir", str(small_data_dir), "--max-seq-length", "16", "--batch-size", "9999"]
    assert "batch_size 9999" in refusal(capsys, tmp_path / "results", *flags)


def test_a_vocabulary_smaller_than_that_of_the_data_is_refused(capsys, tmp_path, small_data_dir):
    flags = ["--data-dir", str(small_data_dir), "--max-seq-length", "16", "--vocab-size", "10"]
    message = refusal(capsys, tmp_path / "results", *flags)
    words = load_corpus(data_dir=small_data_dir, source="folder").vocabulary.size
    assert f"vocab_size is 10, but the data have {words} words; it must be {words} or more" in message


def test_a_results_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    message = refusal(capsys, blocker / "results")
    assert "cannot be written" in message
    assert "--results-dir" in message
    assert blocker.read_text() == ""


def test_named_wikitext_is_not_replaced_by_the_embedded_text(capsys, tmp_path, monkeypatch):
    """Data: asked for WikiText-2 by name, it fails with what to do."""

    def nothing_cached(*_):
        raise FileNotFoundError

    monkeypatch.setattr("bench.data.sources.hub_reachable", lambda *_: False)
    monkeypatch.setattr("bench.data.sources.read_cache", nothing_cached)
    message = refusal(capsys, tmp_path / "results", "--dataset-name", "wikitext")
    assert "--data-dir" in message
