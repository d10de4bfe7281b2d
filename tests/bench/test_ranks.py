"""Two gloo processes do what one does with the same global batch; one torchrun serves all these tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _two_ranks import (
    DROPOUT,
    FAILED_AFTER,
    SHORT,
    STOPPED_AFTER,
    batch,
    evaluations,
    gradients,
    idle_parameter,
    train,
)

from bench.data.corpus import load_corpus
from bench.data.loader import Shard
from bench.run.__main__ import main
from bench.training.checkpoint import load_checkpoint
from bench.training.ranks import ALONE, Ranks, refuse_shared_device
from gnnmoe.seeds import stream_seed
from tests.bench._runs import only_folder, refusal

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # float64
FILES = {
    "record.json",
    "history.jsonl",
    "communication.npz",
    "experts.npz",
    "nll.npz",
    "log.txt",
    "checkpoint.pt",
}


def variables() -> dict[str, str]:
    """Return the environment of torchrun."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


@pytest.fixture(scope="module")
def out(tmp_path_factory, small_data_dir) -> Path:
    """The folder in which both ranks left what they found, and all their runs."""
    out = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("_two_ranks.py"))
    done = subprocess.run([*TORCHRUN, script, str(out), str(small_data_dir)], text=True, capture_output=True,
                          env=variables(), timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def both(out) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 found."""
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def history_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


# --- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.core("ranks")
def test_a_run_on_two_ranks_is_as_one_process(both, out, tmp_path, small_data_dir):
    """Losses, evaluations (an odd number of windows) and counts agree, in micro-batches of one row."""
    found, two = both[0]["runs"]["two"], only_folder(out / "two")
    places = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path)]
    assert (found["status"], main([*SHORT, *places, "--quiet"])) == (0, 0)
    one = only_folder(tmp_path)
    record, expected = found["record"], json.loads((one / "record.json").read_text())
    assert record["status"] == "ok"
    rows, expected_rows = history_of(two), history_of(one)
    assert len(rows) == len(expected_rows) == 8
    for row, like in zip(rows, expected_rows, strict=True):
        assert row == {name: close(value) for name, value in like.items()}
    for name in ("nll.npz", "communication.npz"):
        ours, theirs = np.load(two / name), np.load(one / name)
        assert set(ours) == set(theirs)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    for split in ("validation", "test"):
        for name in ("nll_sum", "tokens"):
            assert record["quality"][split][name] == close(expected["quality"][split][name])
    used = record["used"]
    assert used["ledger"] == expected["used"]["ledger"]
    assert (used["world_size"], used["backend"]) == (2, "gloo")
    assert used["micro_batch_size"] * used["accumulation"] * used["world_size"] == 4
    assert record["run_id"] != expected["run_id"]
    assert record["speed"]["step_tokens"] == [64, 64]
    weights = load_checkpoint(one / "checkpoint.pt")["model"]
    assert set(load_checkpoint(two / "checkpoint.pt")["model"]) == set(weights)
    # Only the first rank prints and writes.
    first, second = (found["runs"]["two"]["stdout"] for found in both)
    assert first.count("\nvalidation ") == first.count("building the model") == 1
    assert "on each of 2 ranks" in " ".join(first.split())
    assert second == ""
    assert {path.name for path in two.iterdir()} == FILES
    assert (two / "log.txt").read_text().count("building the model") == 1


@pytest.mark.slow
@pytest.mark.core("ranks")
def test_a_run_stopped_and_continued_is_as_undisturbed(both, out):
    """A signal that reaches one rank stops both; with dropout, the continued run is the same bit for bit."""
    stopped, continued = (both[0]["runs"][name] for name in ("stopped", "continued"))
    assert [found["runs"]["stopped"]["status"] for found in both] == [130, 130]
    assert stopped["record"]["status"] == "interrupted"
    assert continued["status"] == 0
    steps = STOPPED_AFTER + 1
    times = continued["record"]["time"]
    assert [part["resumed_at_step"] for part in times["parts"]] == [None, times["resumed_at_step"]]
    assert times["resumed_at_step"] == steps
    ours, theirs = only_folder(out / "stopped"), only_folder(out / "undisturbed")
    assert (ours / "log.txt").read_text().count("building the model") == 2
    assert history_of(ours) == history_of(theirs)
    found, expected = np.load(ours / "nll.npz"), np.load(theirs / "nll.npz")
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    found, expected = (load_checkpoint(folder / "checkpoint.pt")["model"] for folder in (ours, theirs))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_another_number_of_ranks_cannot_continue_the_run(both, out, small_data_dir, capsys):
    results = out / "left as stopped"
    alone = [*DROPOUT, "--data-dir", str(small_data_dir), "--results-dir", str(results)]
    checkpoint = only_folder(results) / "checkpoint.pt"
    for asked, said in (
        (["--resume-checkpoint", str(checkpoint)], "world_size: 2 there, 1 here"),
        (["--resume"], "2 ranks there, 1 here"),
    ):
        assert said in refusal(capsys, [*alone, *asked])


@pytest.mark.slow
def test_a_failure_of_one_rank_is_the_runs_own(both, out):
    """Memory runs out on rank 1 only: the record that rank 0 writes says so, and on which rank."""
    assert [found["runs"]["failed"]["status"] for found in both] == [1, 1]
    record = both[0]["runs"]["failed"]["record"]
    assert (record["status"], record["used"]["steps"]) == ("oom", FAILED_AFTER)
    assert record["error"] == "rank 1: OutOfMemoryError: memory ran out, for the test's sake"
    assert "_two_ranks.py" in (only_folder(out / "failed") / "log.txt").read_text()  # where it happened


@pytest.mark.slow
def test_wrong_input_is_refused_once_and_nothing_is_written(both, out):
    first, second = (found["runs"]["refused"] for found in both)
    assert (first["status"], first["stdout"]) == (2, "")
    assert first["stderr"] == "error: a batch of 5 cannot be shared evenly by 2 ranks.\n"
    assert (second["status"], second["stdout"], second["stderr"]) == (2, "", "")
    assert not (out / "refused").exists()


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_every_rank(tmp_path, small_data_dir):
    """Torchrun hands SIGTERM on to all its processes, also to the workers that load data."""
    flags = [*DROPOUT, "--max-steps", "3000", "--eval-every", "1000", "--num-workers-dataloader", "1"]
    places = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path)]
    torchrun = subprocess.Popen([*TORCHRUN, "-m", "bench.run", *flags, *places], env=variables(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") >= 5 for path in tmp_path.glob("*/*/history.jsonl")):
        assert torchrun.poll() is None, torchrun.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    torchrun.send_signal(signal.SIGTERM)
    torchrun.communicate(timeout=90)
    folder = only_folder(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", "stopped from outside")
    steps = load_checkpoint(folder / "checkpoint.pt")["trainer"]["done"]["steps"]
    assert 5 <= steps == len(history_of(folder)) < 3000


# --- parts of a run --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.core("ranks")
def test_loss_and_gradient_are_those_of_the_whole_batch(both):
    """A mean of the ranks' means would be far off: one of them has 32 targets and the other one."""
    loss, expected = gradients(ALONE, None)
    counted = [int((batch(rank, 2)["targets"] >= 0).sum()) for rank in (0, 1)]
    assert counted == [32, 1]
    for found in both:
        for its_loss, its_gradients in found["gradients"]:  # whole, in pieces of two rows, and of one
            torch.testing.assert_close(its_loss, loss, **EXACT)
            for ours, theirs in zip(its_gradients, expected, strict=True):
                torch.testing.assert_close(ours, theirs, **EXACT)
    assert [found["sums"] for found in both] == [[1, 1, 1]] * 2, "only the last piece waits for the others"


@pytest.mark.slow
def test_a_parameter_that_no_loss_depends_on_is_left_alone(both):
    losses, parameters = idle_parameter(ALONE)
    for found in both:
        its_losses, its_parameters = found["idle"]
        assert its_losses == pytest.approx(losses, rel=1e-10)
        for name, value in parameters.items():
            torch.testing.assert_close(its_parameters[name], value, **EXACT)
    assert torch.equal(parameters["idle"], torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.slow
def test_each_rank_has_its_own_dropout_and_random_state_and_all_the_same_parameters(both, corpus):
    seeds = [found["dropout"]["seed"] for found in both]
    assert seeds == [stream_seed(0, "dropout"), stream_seed(0, "dropout.1")]
    assert seeds[0] == train(ALONE, corpus)["seed"]
    first, second = (found["dropout"] for found in both)
    assert first["rows"] == second["rows"]
    assert all(torch.equal(*pair) for pair in zip(first["parameters"], second["parameters"], strict=True))
    first, second = (found["dropout"]["random"] for found in both)
    assert len(first) == len(second) == 2
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(*first)


@pytest.mark.slow
@pytest.mark.core("ranks")
def test_an_evaluation_scores_every_target_once_in_the_order_of_the_text(both, corpus):
    """Also where there are fewer windows than ranks, or an odd number."""
    evaluated = [found["evaluations"] for found in both]
    for expected, *found in zip(evaluations(ALONE, corpus), *evaluated, strict=True):
        for ours in found:
            assert ours["tokens"] == expected["tokens"] == len(ours["nll"])
            torch.testing.assert_close(ours["nll"], expected["nll"], rtol=1e-6, atol=0)  # kept in float32
            assert ours["sum"] == pytest.approx(expected["sum"], rel=1e-7)
        assert found[0]["sum"] == found[1]["sum"]


@pytest.mark.slow
def test_speed_is_of_the_slowest_rank_memory_of_the_largest_and_all_warm_up_equally_long(both):
    """All tokens over the slowest rank's time; one is steady long before the other."""
    first, second = (found["measured"] for found in both)
    for speed in (first["speed"], second["speed"]):
        assert (speed["rank"], speed["step_seconds"], speed["step_tokens"]) == (1, [2.0] * 3, [64] * 3)
    assert first["memory"] == second["memory"]
    assert first["memory"]["rank"] == 0  # it runs four rows at once, the other one row
    assert first["warmup_steps"] == second["warmup_steps"] == 50


@pytest.mark.slow
def test_what_ranks_agree_on(both, out):
    for rank, found in enumerate(both):
        assert found["agreements"] == {
            "totals": [2, 10], "any": [True, False], "gather": ["a", "b"], "largest": 2.5,
            "worst": (1, {"x": 1}), "in_turn": rank, "from_first": "from 0",
            "first_refused": "the disk is full", "second_refused": "the disk is full",
        }  # fmt: skip
    assert (out / "log.txt").read_text() == "0\n1\n"  # the first went first


def test_alone_nothing_is_asked_of_others():
    assert Ranks.join("cpu", 1.0, {}) is ALONE
    assert Ranks.join("cpu", 1.0, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is ALONE
    value = torch.ones(2)
    assert ALONE.sum(value) is value
    assert ALONE.gather(3) == [3]
    assert ALONE.shard == Shard(0, 1)
    assert ALONE.stream("dropout") == "dropout"


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "said"),
    [("cuda", 4, 2, "4 ranks on a machine with 2 GPUs: .*--nproc-per-node=2"),
     ("auto", 2, 1, "2 ranks on a machine with 1 GPU: "), ("mps", 2, None, "mps is one")],
)  # fmt: skip
def test_more_ranks_than_devices_are_refused(device, ranks, gpus, said):
    with pytest.raises(ValueError, match=said):
        refuse_shared_device(device, ranks, gpus)
    refuse_shared_device("cpu", 64, None)
    refuse_shared_device("cuda", 2, 2)
