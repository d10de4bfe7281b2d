"""``python -m bench.check``: the exit status, and what is on the screen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.check import main

SMALL = ["--embed-dim", "16", "--max-seq-length", "12"]


def test_honest_coupler_passes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, "--coupler", "mean"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("✓") == 7
    assert "passed: mean at 4 experts" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_leaking_coupler_fails():
    leaking = ["--coupler", "examples.leaking_coupler:LeakingCoupler", "--num-experts", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.check", *SMALL, *leaking],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "✗" in done.stdout
    assert "FAILED" in done.stdout
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_coupler_that_cannot_be_built_is_reported_not_raised(capsys):
    assert main([*SMALL, "--coupler", "tests.gate.couplers:Unbuildable"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--coupler", "maen"], "Did you mean 'mean'?"),
        (["--coupler", "HGNN", "--static-hyperedge-strategy", "all_pair"], "all_pairs"),
        (["--coupler", "mean", "--coupler-option", "k=2"], "unknown option of coupler mean 'k'"),
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
