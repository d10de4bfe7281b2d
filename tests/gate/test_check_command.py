"""``python -m bench.check``: the exit status, and what is on the screen."""

import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--embed-dim", "16", "--max-seq-length", "12"]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.check", *SMALL, *arguments],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_honest_coupler_passes():
    done = check("--coupler", "mean")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓") == 7
    assert "passed: mean at 4 experts" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_leaking_coupler_fails():
    done = check("--coupler", "examples.leaking_coupler:LeakingCoupler", "--num-experts", "4")
    assert done.returncode == 1, done.stderr
    assert "✗" in done.stdout
    assert "FAILED" in done.stdout
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--coupler", "maen"], "Did you mean 'mean'?"),
        (["--coupler", "HGNN", "--static-hyperedge-strategy", "all_pair"], "all_pairs"),
        (["--coupler", "mean", "--coupler-option", "k=2"], "unknown option of coupler mean 'k'"),
    ],
)
def test_wrong_input_is_one_message(arguments, text):
    done = check(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
