"""Flags, presets and what wrong input gets: one message, exit status 2, nothing written."""

from __future__ import annotations

import importlib
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bench import interruption
from bench.check.__main__ import CheckConfig
from bench.cli import parse
from bench.config import Flag, RunConfig, TuneConfig, build, flags_of
from bench.data.__main__ import ProfileConfig
from bench.interruption import Interruption, interruptible, keeping, say, sending_again
from bench.report.__main__ import CompareConfig, ReportConfig
from bench.speed.__main__ import SpeedConfig
from bench.sweep.__main__ import main as sweep
from bench.sweep.executors.base import with_options
from bench.sweep.specification import SweepConfig
from gnnmoe.config import Refused
from tests.bench._runs import refusal

DATA = "--data-dir DATA --max-seq-length 16".split()


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
    flags = (
        "--coupler_type mean --coupler GNN --static_hyperedge_strategy all --no_hgnn_learnable_edge_weights"
    )
    more = (
        "--hgnn_conv_type=PyGHypergraphConv --num_experts 3 --coupler-option k=loop --coupler-option r=false"
    )
    model = parse(RunConfig, [*flags.split(), *more.split()]).model
    assert (model.coupler_type, model.static_hyperedge_strategy) == ("GNN", "all"), "a later flag wins"
    assert model.hgnn_learnable_edge_weights is False
    assert (model.hgnn_conv_type, model.num_experts) == ("PyGHypergraphConv", 3)
    assert model.resolved(100).coupler_options == {"k": "loop", "r": "false"}
    config = parse(RunConfig, ["--num_eval_samples", "None", "--num_workers_dataloader", "auto"])
    assert (config.data.num_eval_samples, config.places.num_workers_dataloader) == (None, "auto")


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
        ("bench.tune.__main__", "bench.tune.find.checked", []),
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
        (["--num-experts", "0"], ["--num-experts is 0", "from 1 to 10,000"]),
        (["--num-experts", "-2"], ["--num-experts is -2"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--learning-rate", "-1"], ["--learning-rate is -1", "greater than 0"]),
        (["--max-steps", "many"], ["--max-steps is 'many'", "a whole number from 1 to 1,000,000,000 or"]),
        (["--max-steps"], ["--max-steps has no value", "a whole number"]),
        (["--seed=1", "more"], ["'more' belongs to no flag"]),
        (["--num-eval-samples", "0"], ["--num-eval-samples is 0"]),
        (["--device", "tpu"], ["--device is 'tpu'", "'cpu', 'cuda'"]),
        (["--vocab-size", "0"], ["--vocab-size is 0", "from 1 to 100,000,000"]),
        (["--num-workers-dataloader", "-1"], ["is -1", "a whole number from 0 to 256 or 'auto'"]),
        (["--num-workers-dataloader", "many"], ["--num-workers-dataloader is 'many'"]),
        (["--coupler", ":Class"], ["package.module:Name"]),
        (["--learning-rate", "inf"], ["--learning-rate is inf", "a finite number"]),
        (["--weight-decay", "nan"], ["--weight-decay is nan", "a finite number of at least 0"]),
        (["--study", "a/b"], ["--study is ", "plain folder name"]),
        (["--study", ".."], ["--study is ", "plain folder name"]),
        (["--data-source", "embedded", "--dataset-name", "wikitext"], ["asked for wikitext", "pydoc-topics"]),
        (["--data-source", "folder"], ["needs a folder", "--data-dir"]),
        *((["--speed-warmup-steps", steps], [f"--speed-warmup-steps is {steps}"]) for steps in ("0", "-3")),
        (["--speed-warmup-steps", "soon"], ["soon"]),
        (["--curriculum", "rarity"], ["error: a curriculum paces itself by epochs; say how many"]),
        (["--device", "cuda"], ["'cuda' is not available", "available: cpu"]),
        (["--data-dir", "DATA", "--max-seq-length", "5000"], ["one block needs 5000"]),
        ([*DATA, "--batch-size", "9999"], ["batch_size 9999"]),  # with drop_last: not zero batches (A6)
        ([*DATA, "--vocab-size", "10"], ["vocab_size is 10, but the data have 44 words; it must be 44"]),
        ([*DATA, "--dataset", "Salesforce/wikitext"],
         ["asked for wikitext wikitext-2-v1 by name, but the folder holds local text (other);"]),
        ([*DATA, "--dataset-config-name", "wikitext-2-v1"], ["drop --dataset-config-name to use it"]),
        ([*DATA, "--dataset", "wikitext-103-v1"], ["asked for wikitext wikitext-103-v1 by name"]),
        ([*DATA, "--dataset", "my/own", "--dataset-config-name", "x"],
         ["asked for my/own x by name", "drop --dataset and --dataset-config-name to use it"]),
        (["--data-dir", "PARTS"], ["wiki.valid.tokens", "wiki.test.tokens", "notes.txt"]),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_with_what_is_allowed(capsys, tmp_path, small_data_dir, flags, said):
    """One message, and nothing is written."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("wiki.train.tokens", "notes.txt"):
        (parts / name).write_text(" a \n")
    places = {"DATA": str(small_data_dir), "PARTS": str(parts)}
    given = [str(places.get(flag, flag)) for flag in flags]
    message = refusal(capsys, ["--results-dir", str(tmp_path / "results"), *given])
    for part in said:
        assert part in message
    assert not (tmp_path / "results").exists()


COMMANDS = {
    "run": RunConfig,
    "tune": TuneConfig,
    "check": CheckConfig,
    "data": ProfileConfig,
    "speed": SpeedConfig,
    "sweep": with_options(SweepConfig),
    "report": ReportConfig,
    "compare": CompareConfig,
}
WRONG = ("", "abc", "-5", "0", str(10**30), str(2**63), "1e400", "nan", "inf", "1.5", "x" * 3000, "9" * 5000,
         "~nobody/x")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_refuses_a_wrong_value_in_one_short_message(command):
    """No number beyond 64 bits, no NaN and no infinity gets past a flag, and no library speaks."""
    for flag in set(flags_of(COMMANDS[command]).values()):
        for value in WRONG:
            found = outcome(COMMANDS[command], flag, value)
            if isinstance(found, str):
                assert len(found) <= 230, (flag.field, value, found)
                assert not re.search("literal|Error|could not convert", found), (flag.field, found)
            else:
                assert all(math.isfinite(number) for number in numbers_in(found)), (flag.field, value)


def outcome(config_type: type, flag: Flag, value: str) -> Any:
    """Return the config with this value of a flag, or its refusal."""
    words = [value] if flag.is_list else value
    try:
        return build(config_type, {flag.field: flag.read(words)}, {flag.field: flag.option()})
    except Refused as error:
        return str(error)


def numbers_in(value: Any) -> Iterator[float]:
    """Yield all numbers of a config; a whole number beyond 64 bits as infinity."""
    if is_dataclass(value):
        value = tuple(vars(value).values())
    if isinstance(value, tuple):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int):
        yield value if abs(value) < 2**63 else math.inf
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--embed-dim", "99999999999999999999"], "it must be a whole number from 1 to 1,048,576"),
        (["--gnn-layers", "999999"], "it must be a whole number from 1 to 1,000"),
        (["--embed-dim", str(2**20)], "a training step of this model needs at least"),
        (["--gnn-layers", "400", "--embed-dim", str(2**14)], "GiB of memory, and device cpu has"),
        (["--checkpoint-dir", "/dev/null"], "the checkpoint folder /dev/null cannot be written"),
        (["--text-column", "x"], "text_column is 'x', but the embedded text has no columns; drop it"),
        (["--device", "gpu"], "Did you mean 'cuda'?"),
        (["--preset", "fast"], "it must be one of 'baseline'"),
        (["--max-steps", "x" * 9000], "--max-steps is 'xxx"),
    ],
)
def test_what_is_too_much_is_refused_before_anything_is_built(capsys, tmp_path, flags, said):
    places = ["--data-source", "embedded", "--device", "cpu", "--results-dir", str(tmp_path / "results")]
    message = refusal(capsys, [*places, *flags])
    assert said in message
    assert len(message) <= 240
    assert not (tmp_path / "results").exists()


def test_a_flag_of_a_run_is_no_flag_of_a_sweep_and_says_where_it_belongs(capsys):
    message = refusal(capsys, ["sweeps/first.toml", "--max-steps", "5"], sweep)
    assert "set max_steps for all runs under [base]" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), None], ids=["itself", "as another error"])
def test_an_interrupted_command_says_so_in_one_line(capsys, error):
    """Also where a library makes another error of the interrupt."""

    @interruptible("nothing is kept.")
    def command(_argv: object = None) -> int:
        if error is not None:
            raise error
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise ImportError("half imported")

    assert command(None) == 130
    assert capsys.readouterr().err == "interrupted: nothing is kept.\n"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_in_a_destructor_interrupts_and_does_not_end_the_process_at_once(capsys, monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    @interruptible("nothing is kept.")
    def command(_argv: object = None) -> int:
        keeping("the table is kept.")
        Dying()
        time.sleep(5)
        return 0

    began = time.monotonic()
    monkeypatch.setattr(sys, "unraisablehook", sending_again(sys.unraisablehook))
    assert command(None) == 130
    assert capsys.readouterr().err == "interrupted: the table is kept.\n"
    assert time.monotonic() - began < 4


def test_a_command_that_has_ended_is_not_interrupted(capsys):
    """Its process has the handler of the import before ``main`` begins."""

    @interruptible("nothing is kept.")
    def command(_argv: object = None) -> int:
        return 0

    before = signal.signal(signal.SIGINT, interruption._end)
    try:
        assert command(None) == 0
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({"RANK": "3"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1),
        (TWO | {"RANK": "1"}, 0),
        (TWO | {"RANK": "0"}, 1),
    ],
)
def test_one_line_says_that_a_run_was_interrupted_whatever_is_left_of_other_ranks(
    capsys, monkeypatch, variables, lines
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    say("nothing is kept.")
    assert capsys.readouterr().err.count("\n") == lines


def test_a_run_heeds_a_closed_terminal_unless_it_is_ignored():
    with Interruption().installed() as heeding, heeding.deferred():
        signal.raise_signal(signal.SIGHUP)
        assert heeding.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption().installed() as ignoring:
            signal.raise_signal(signal.SIGHUP)  # as under nohup
            assert not ignoring.requested
    finally:
        signal.signal(signal.SIGHUP, before)


WITHIN_TORCH = """
import sys, time
class Finder:
    def find_spec(name, *_):
        if name == "torch.nn":
            print(1, flush=True)
            time.sleep(60)
sys.argv[:1], sys.meta_path[:0] = ["-m"], [Finder]
import bench, torch
"""


def test_a_command_is_interrupted_while_it_is_imported():
    """In a process of its own, the import of torch has come to torch.nn, and waits there for the signal."""
    command = [sys.executable, "-c", WITHIN_TORCH]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parents[2])  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[1] == "interrupted: nothing is kept.\n"
    assert child.returncode == 130


SRUN = "WORLD_SIZE=2 RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
WORLD = "WORLD_SIZE is 2 in the environment, but"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2", f"{WORLD} RANK is not set; unset WORLD_SIZE"),
        ("WORLD_SIZE=2 RANK=1", f"{WORLD} MASTER_PORT is not set"),
        ("WORLD_SIZE=2 RANK=0 MASTER_PORT=29500", f"{WORLD} MASTER_ADDR is not set"),
        (
            f"{SRUN} LOCAL_RANK=1",
            f"{WORLD} LOCAL_WORLD_SIZE is not set; set it to the number of ranks on thi",
        ),
        (f"{SRUN} LOCAL_RANK=0", f"{WORLD} LOCAL_WORLD_SIZE is not set"),
        (f"{SRUN} LOCAL_WORLD_SIZE=2", f"{WORLD} LOCAL_RANK is not set"),
        ("WORLD_SIZE=abc RANK=0", "WORLD_SIZE is 'abc' in the environment; it must be a whole number from 1"),
        ("WORLD_SIZE=2 RANK=2", "RANK is '2' in the environment; it must be a whole number from 0 to 1"),
        ("WORLD_SIZE=0", "WORLD_SIZE is '0'"),
    ],
)
def test_half_of_the_variables_of_torchrun_are_refused(capsys, monkeypatch, variables, said):
    for name, value in (pair.split("=") for pair in variables.split()):
        monkeypatch.setenv(name, value)
    assert said in refusal(capsys, ["--data-source", "embedded"])
    assert "WORLD_SIZE" in refusal(capsys, ["--sweep", "coupler=mean"], sweep)


def test_a_results_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    message = refusal(capsys, ["--results-dir", str(blocker / "results")])
    assert "cannot be written" in message
    assert "--results-dir" in message
    assert blocker.read_text() == ""


@pytest.mark.parametrize("name", ["--dataset-config-name wikitext-2-v1", "--dataset some/set"])
def test_what_was_asked_for_by_name_is_not_replaced_by_the_embedded_text(capsys, tmp_path, monkeypatch, name):
    """Data: it fails with what to do."""

    def nothing_cached(*_):
        raise FileNotFoundError

    monkeypatch.setattr("bench.data.sources.hub_reachable", lambda *_: False)
    monkeypatch.setattr("bench.data.sources.read_cache", nothing_cached)
    message = refusal(capsys, ["--results-dir", str(tmp_path / "results"), *name.split()])
    assert "not in the local cache of `datasets`, and the hub cannot be reached" in message
    assert "--data-dir" in message
    assert not (tmp_path / "results").exists()
