"""``python -m bench.check``: the exit status, and what is on the screen."""

import re
from importlib.metadata import EntryPoint

import pytest

from bench.check.__main__ import ANY_VOCABULARY, main, refuse_too_large_to_check
from bench.check.leak_check import list_couplers
from bench.config import ModelConfig
from bench.run import __main__ as run
from gnnmoe import discovery
from gnnmoe.couplers.registry import COUPLERS, coupler_names
from gnnmoe.hypergraph.strategies import STRATEGIES
from gnnmoe.layers.base import LAYERS

SMALL = ["--embed-dim", "16", "--max-seq-length", "12"]


def test_honest_coupler_passes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, "--coupler", "mean"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("✓") == 8
    assert "passed: mean at 4 experts" in shown
    assert re.search(r"parameters +304, ", shown)  # 16² + 16 + 2 · 16, all in the combiner
    assert re.search(r"FLOPs per token +512 ", shown)
    assert "before the combiner, this coupler equals the mean over experts to 1e-1" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_leaking_coupler_fails(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, "--coupler", "examples.leaking_coupler:LeakingCoupler", "--num-experts", "4"]) == 1
    shown, errors = capsys.readouterr()
    assert "✗" in shown
    assert "FAILED" in shown
    assert "no portrait: it mixes tokens" in shown
    assert "Traceback" not in errors
    assert max(map(len, shown.splitlines())) <= 80


def test_a_coupler_that_cannot_be_built_is_reported_not_raised(capsys):
    assert main([*SMALL, "--coupler", "tests.check.couplers:Unbuildable"]) == 1
    shown = capsys.readouterr().out
    assert "ZeroDivisionError" in shown
    assert "no portrait: it raised ZeroDivisionError" in shown


def test_a_portrait_follows_a_failed_check_and_shows_dead_parameters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, "--coupler", "tests.check.couplers:Dead"]) == 1
    shown = capsys.readouterr().out
    assert "unread (not declared in inert_parameters())" in shown
    assert "verdict: " in shown


def test_a_wrong_flops_formula_is_a_failure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*SMALL, "--coupler", "tests.check.portrait_couplers:WrongFlops"]) == 1
    shown = capsys.readouterr().out
    assert "✗" not in shown
    assert "has no leak, but `flops()` is wrong: it returns 12 for 12 tokens; PyTorch counts " in shown
    assert "passed" not in shown


@pytest.fixture
def few(monkeypatch):
    """A short roster: two conv types, and a strategy that needs an argument."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("bench.check.leak_check.coupler_names", lambda: ["HGNN", "mean"])
    for registry, names in ((LAYERS, "HypergraphConv PyGHypergraphConv"), (STRATEGIES, "all_pairs all file")):
        monkeypatch.setattr(registry, "registered", {name: registry[name] for name in names.split()})


ALL = ["mean", "HGNN HypergraphConv", "HGNN PyGHypergraphConv", "HGNN all"]


def test_all_passes_in_80_columns(few, capsys):
    ignored = ["--hgnn-conv-type", "PyGHypergraphConv", "--static-hyperedge-strategy", "all"]
    assert main([*SMALL, "--all", *ignored]) == 0
    shown = capsys.readouterr().out
    assert shown.count("✓") == len(ALL)
    assert "passed: none of the 4 couplers leaks" in shown
    assert re.search(r"^left out: HGNN file \(.*path", shown, re.MULTILINE)
    assert re.search(r"^mean +✓ +304 +512 +equals the mean over experts to 1e-1\d", shown, re.MULTILINE)
    assert shown.count("is not linear in the experts") == 3
    assert max(map(len, shown.splitlines())) <= 80


def test_all_checks_the_named_coupler_too_and_fails_with_its_details(few, capsys):
    named = ["--coupler", "tests.check.couplers:PastMixing"]
    assert main([*SMALL, "--all", *named]) == 1
    shown = capsys.readouterr().out
    assert (shown.count("✓"), shown.count("✗")) == (len(ALL), 1)
    assert "tests.check.couplers:PastMixing: token_isolation: causal but not token-isolated" in shown
    assert "FAILED: 1 of 5: tests.check.couplers:PastMixing" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_all_fails_where_a_flops_formula_is_wrong(few, capsys):
    wrong = "tests.check.portrait_couplers:WrongFlops"
    assert main([*SMALL, "--all", "--coupler", wrong]) == 1
    shown = capsys.readouterr().out
    assert (shown.count("✓"), shown.count("✗")) == (len(ALL), 1)
    assert f"{wrong}: `flops()` is wrong: it returns 12 for 12 tokens; " in " ".join(shown.split())
    assert f"FAILED: 1 of 5: {wrong}" in shown


def names(**fields) -> list[str]:
    return [entry.name for entry in list_couplers(ModelConfig(**fields).resolved(ANY_VOCABULARY))[0]]


def test_the_roster_holds_everything_that_is_registered_whatever_the_flags_of_the_hypergraph():
    config = ModelConfig(
        num_experts=5, embed_dim=32, hgnn_conv_type="PyGHypergraphConv", static_hyperedge_strategy="all"
    )
    entries, left_out = list_couplers(config.resolved(ANY_VOCABULARY))
    found = {entry.name: entry.config for entry in entries}
    hypergraphs = {f"HGNN {name}" for name in (*LAYERS, *STRATEGIES)} - {"HGNN all_pairs"}
    assert {*found, *left_out} == {*coupler_names(), *hypergraphs} - {"HGNN"}
    assert all((made.num_experts, made.embed_dim) == (5, 32) for made in found.values())
    assert found["HGNN PyGHypergraphConv"].hgnn_conv_type == "PyGHypergraphConv"
    assert found["HGNN PyGHypergraphConv"].static_hyperedge_strategy == "all_pairs"
    assert found["HGNN all"].static_hyperedge_strategy == "all"
    assert found["HGNN all"].hgnn_conv_type == "HypergraphConv"
    assert "HGNN all_pairs" not in found


def test_the_named_coupler_is_added_once_and_with_its_options():
    assert names(coupler_type="mean") == names()
    assert names(coupler_option=("activation=none",)) == [*names(), "HGNN activation=none"]
    stranger = "tests.check.couplers:Dead"
    assert names(coupler_type=stranger) == [*names(), stranger]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--coupler", "maen"], "Did you mean 'mean'?"),
        (["--coupler", "HGNN", "--static-hyperedge-strategy", "all_pair"], "all_pairs"),
        (["--coupler", "mean", "--coupler-option", "k=2"], "unknown option of coupler mean 'k'"),
        (["--all", "--coupler", "maen"], "Did you mean 'mean'?"),
        (["--coupler", "mean", "--hgnn-conv-type", "HNH"], "unknown hgnn_conv_type 'HNH'; allowed: "),
        (["--coupler", "mean", "--static-hyperedge-strategy", "all_pair"], "Did you mean 'all_pairs'?"),
        (["--coupler", "mean", "--static-hyperedge-strategy", "ring:n=2"], "there is no argument 'n'"),
        (["--all", "--hgnn-conv-type", "HNH"], "Did you mean 'HNHN'?"),
        (["--all", "--static-hyperedge-strategy", "all_pair"], "Did you mean 'all_pairs'?"),
    ],
)
def test_wrong_input_is_one_message(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *arguments])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert text in shown.err
    assert not shown.out


TOO_LARGE = ["--coupler", "mean", "--embed-dim", "65536", "--num-experts", "1000"]


def test_what_a_check_never_builds_counts_no_memory_and_is_no_advice(capsys, monkeypatch):
    """A check has no embedding, one layer and few tokens."""
    monkeypatch.setattr("bench.device.host_memory_bytes", lambda: 2**30)
    refuse_too_large_to_check(ModelConfig(coupler_type="mean", embed_dim=64).resolved(10**8))
    with pytest.raises(SystemExit):
        main(TOO_LARGE)
    said = capsys.readouterr().err
    assert "a check of this model needs at least " in said
    assert said.endswith("has 1.0 GiB; lower embed_dim or num_experts.\n")


def test_running_out_of_memory_is_one_message(capsys, monkeypatch):
    def greedy(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    monkeypatch.setattr("bench.check.leak_check.run_leak_check", greedy)
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, "--coupler", "mean"])
    assert stopped.value.code == 2
    assert "memory ran out, so nothing is known of the coupler" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, run.main])
def test_list_has_a_line_for_everything_also_of_installed_packages(command, monkeypatch, capsys):
    point = EntryPoint("scaled", "tests.check.couplers:Dead", "gnnmoe.couplers")
    monkeypatch.setattr(COUPLERS, "registered", dict(COUPLERS))
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point] if group == point.group else [])
    COUPLERS.forget_discovery()
    assert command(["--list"]) == 0
    monkeypatch.undo()
    COUPLERS.forget_discovery()
    lines = [
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)
    ]
    assert [name for name, _ in lines] == [
        *sorted([*COUPLERS, "scaled"], key=str.lower),
        *LAYERS,
        *STRATEGIES,
    ]
    assert dict(lines)["ring"].startswith("Hyperedge i holds experts i to i + k − 1")
