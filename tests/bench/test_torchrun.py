"""Whole runs under torchrun on two gloo processes: as one process, whatever happens to a rank."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from _torchrun import Torchrun

from bench.run.__main__ import main
from bench.training.checkpoint import load_checkpoint

FLAGS = (
    "--embed-dim 8 --num-heads 2 --num-layers 1 --max-seq-length 16 --batch-size 4 --warmup-steps 1"
    " --speed-warmup-steps 1 --speed-steps 2 --num-eval-samples 7 --no-plots --data-source embedded"
).split()
SHORT = [*FLAGS, "--max-steps", "6", "--eval-every", "3", "--micro-batch-size", "1", "--evaluate-test"]
LONG = [*FLAGS, "--max-steps", "3000", "--eval-every", "1000", "--quiet"]
FILES = {"record.json", "history.jsonl", "communication.npz", "nll.npz", "log.txt", "checkpoint.pt"}


def kill(rank: int):
    return lambda torchrun: os.kill(torchrun.rank(rank), signal.SIGKILL)


def stop_all(torchrun: Torchrun) -> None:
    torchrun.process.send_signal(signal.SIGTERM)


@pytest.mark.core("ranks")
def test_two_ranks_are_as_one_process(tmp_path, capsys):
    """Losses, evaluations (an odd number of windows), weights and counts, in micro-batches of one row."""
    two = Torchrun(SHORT, tmp_path / "two")
    status, stdout, stderr = two.ended()
    assert status == 0, stderr
    assert main([*SHORT, "--results-dir", str(tmp_path / "one"), "--quiet"]) == 0
    (one,) = (tmp_path / "one").glob("*/*")
    record, expected = two.record, json.loads((one / "record.json").read_text())
    assert record["status"] == "ok"
    history = [json.loads(line) for line in (one / "history.jsonl").read_text().splitlines()]
    assert len(two.history) == len(history) == 8
    for row, like in zip(two.history, history, strict=True):
        assert row == {name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                       for name, value in like.items()}  # fmt: skip
    for name in ("nll.npz", "communication.npz"):
        ours, theirs = np.load(two.folder / name), np.load(one / name)
        assert set(ours) == set(theirs)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    for split in ("validation", "test"):
        assert record["quality"][split]["nll_sum"] == pytest.approx(expected["quality"][split]["nll_sum"])
        assert record["quality"][split]["tokens"] == expected["quality"][split]["tokens"]
    used = record["used"]
    assert used["ledger"] == expected["used"]["ledger"]
    assert (used["world_size"], used["backend"]) == (2, "gloo")
    assert used["micro_batch_size"] * used["accumulation"] * used["world_size"] == 4
    assert record["run_id"] != expected["run_id"]
    assert record["speed"]["step_tokens"] == [64, 64]
    assert {path.name for path in two.folder.iterdir()} == FILES
    assert stdout.count("\nvalidation ") == stdout.count("building the model") == 1
    assert "on each of 2 ranks" in " ".join(stdout.split())
    assert (two.folder / "log.txt").read_text().count("building the model") == 1
    plain = load_checkpoint(one / "checkpoint.pt")["model"]
    assert set(load_checkpoint(two.folder / "checkpoint.pt")["model"]) == set(plain)


def test_a_killed_rank_ends_the_run_as_crashed(tmp_path):
    torchrun = Torchrun(LONG, tmp_path).when_it_has(5, kill(1))
    status, stdout, _ = torchrun.ended()
    assert status != 0
    record = torchrun.record
    assert (record["status"], record["time"]["end"] is not None) == ("crashed", True)
    assert record["error"].startswith("rank 1 died")
    assert record["used"]["steps"] >= 5
    assert "crashed" in stdout


def test_a_failure_of_one_rank_is_the_runs_own(tmp_path, monkeypatch):
    """Memory runs out on rank 1 only: the record of rank 0 says so, and on which rank."""
    coupler = f"{Path(__file__).with_name('_failing_coupler.py')}:FailingCoupler"
    monkeypatch.setenv("FAIL_WHEN", str(tmp_path / "now"))
    torchrun = Torchrun([*LONG, "--coupler", coupler], tmp_path / "results")
    torchrun.when_it_has(5, lambda _: (tmp_path / "now").touch()).ended()
    record = torchrun.record
    assert record["status"] == "oom"
    assert record["error"] == "rank 1: OutOfMemoryError: memory ran out, for the test's sake"
    assert "_failing_coupler.py" in (torchrun.folder / "log.txt").read_text()  # where it was


@pytest.mark.core("ranks")
def test_stopped_and_continued_is_as_undisturbed(tmp_path, capsys):
    """SIGTERM to torchrun reaches all ranks: interrupted, with a checkpoint; bit for bit, with dropout.

    Another number of ranks is another run, which has nothing to go on with.
    """
    flags = [*FLAGS, "--max-steps", "400", "--eval-every", "200", "--dropout-rate", "0.1", "--quiet"]
    flags += ["--num-workers-dataloader", "1"]  # whom torchrun's signal reaches too
    undisturbed = Torchrun(flags, tmp_path / "undisturbed")
    assert undisturbed.ended()[0] == 0
    torchrun = Torchrun(flags, tmp_path / "stopped").when_it_has(20, stop_all)
    torchrun.ended()
    assert torchrun.record["status"] == "interrupted"
    steps = load_checkpoint(torchrun.folder / "checkpoint.pt")["trainer"]["done"]["steps"]
    assert 20 <= steps < 400
    alone, checkpoint = (
        [*flags, "--results-dir", str(tmp_path / "stopped")],
        torchrun.folder / "checkpoint.pt",
    )
    for asked, said in (
        (["--resume-checkpoint", str(checkpoint)], "world_size: 2 there, 1 here"),
        (["--resume"], "2 ranks there, 1 here"),
    ):
        with pytest.raises(SystemExit):
            main([*alone, *asked])
        assert said in capsys.readouterr().err
    again = Torchrun([*flags, "--resume"], tmp_path / "stopped")
    status, _, stderr = again.ended()
    assert status == 0, stderr
    assert again.record["time"]["resumed_at_step"] == steps
    assert [part["resumed_at_step"] for part in again.record["time"]["parts"]] == [None, steps]
    assert (torchrun.folder / "log.txt").read_text().count("building the model") == 2
    assert again.history == undisturbed.history
    ours, theirs = (np.load(run.folder / "nll.npz") for run in (again, undisturbed))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (load_checkpoint(run.folder / "checkpoint.pt")["model"] for run in (again, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_wrong_input_is_refused_once_and_nothing_is_written(tmp_path):
    torchrun = Torchrun([*FLAGS, "--batch-size", "5"], tmp_path / "results")
    status, stdout, stderr = torchrun.ended()
    assert status != 0
    assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [
        "error: a batch of 5 cannot be shared evenly by 2 ranks."
    ]
    assert "Root Cause" in stderr.split("error: ")[1]  # torchrun's own report, which names rank 0
    assert "exitcode  : 2 " in stderr.split("Root Cause")[1]
    assert stdout == ""
    assert not (tmp_path / "results").exists()
