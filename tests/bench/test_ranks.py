"""Two gloo processes do what one does with the same global batch; they are started once for all tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _two_ranks import WINDOWS, batch, evaluations, gradients, idle_parameter, train

from bench.data.corpus import load_corpus
from bench.data.loader import Shard
from bench.training.ranks import ALONE, Ranks, refuse_shared_device
from gnnmoe.seeds import stream_seed

REPOSITORY = Path(__file__).parents[2]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # float64


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_data_dir) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 found."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    script = str(Path(__file__).with_name("_two_ranks.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(out), str(small_data_dir)], text=True,
                         env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]  # fmt: skip
    for rank in ranks:
        _, stderr = rank.communicate(timeout=100)
        assert rank.returncode == 0, stderr[-3000:]
    found = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [{**of_rank, "log": (out / "log.txt").read_text()} for of_rank in found]


@pytest.fixture(scope="module")
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


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


def test_only_the_last_piece_of_a_batch_waits_for_the_other_ranks(both):
    assert [found["sums"] for found in both] == [[1, 1, 1]] * 2


def test_a_parameter_that_no_loss_depends_on_is_left_alone(both):
    losses, parameters = idle_parameter(ALONE)
    for found in both:
        its_losses, its_parameters = found["idle"]
        assert its_losses == pytest.approx(losses, rel=1e-10)
        for name, value in parameters.items():
            torch.testing.assert_close(its_parameters[name], value, **EXACT)
    assert torch.equal(parameters["idle"], torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.core("ranks")
def test_a_training_is_that_of_one_process(both, corpus):
    """Losses, norms, evaluations, counts and parameters; over two epochs, whose order the ranks share."""
    alone = train(ALONE, corpus, 0.0)
    for found in both:
        ours = found["train"]
        assert len(ours["rows"]) == len(alone["rows"]) == 8
        for row, expected in zip(ours["rows"], alone["rows"], strict=True):
            assert row == {name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
                           for name, value in expected.items()}  # fmt: skip
        assert (ours["ledger"], ours["batch_shapes"]) == (alone["ledger"], alone["batch_shapes"])
        for value, expected in zip(ours["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_each_rank_has_its_own_dropout_and_all_the_same_parameters(both, corpus):
    seeds = [found["dropout"]["seed"] for found in both]
    assert seeds == [stream_seed(0, "dropout"), stream_seed(0, "dropout.1")]
    assert seeds[0] == train(ALONE, corpus, 0.5)["seed"]
    first, second = (found["dropout"] for found in both)
    assert first["rows"] == second["rows"]
    assert all(torch.equal(*pair) for pair in zip(first["parameters"], second["parameters"], strict=True))
    assert first["rows"] != both[0]["train"]["rows"]


def test_a_checkpoint_has_the_random_state_of_every_rank(both):
    first, second = (found["dropout"]["random"] for found in both)
    assert len(first) == len(second) == 2
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(*first)


@pytest.mark.core("ranks")
@pytest.mark.parametrize("place", range(len(WINDOWS)))
def test_an_evaluation_scores_every_target_once_in_the_order_of_the_text(both, corpus, place):
    """Also where there are fewer windows than ranks, or an odd number."""
    expected = evaluations(ALONE, corpus)[place]
    for found in both:
        ours = found["evaluations"][place]
        assert ours["tokens"] == expected["tokens"] == len(ours["nll"])
        torch.testing.assert_close(ours["nll"], expected["nll"], rtol=1e-6, atol=0)  # kept in float32
        assert ours["sum"] == pytest.approx(expected["sum"], rel=1e-7)
    assert both[0]["evaluations"][place]["sum"] == both[1]["evaluations"][place]["sum"]


def test_speed_is_all_tokens_over_the_slowest_ranks_time(both):
    for found in both:
        speed = found["measured"]["speed"]
        assert (speed["rank"], speed["step_seconds"]) == (1, [2.0] * 3)
        assert speed["step_tokens"] == [64] * 3


def test_memory_is_that_of_the_rank_that_takes_most(both):
    first, second = (found["measured"]["memory"] for found in both)
    assert first == second
    assert first["rank"] == 0  # it runs four rows at once, the other one row


def test_ranks_warm_up_equally_long(both):
    """One is steady long before the other, which would go on alone."""
    assert both[0]["measured"]["warmup_steps"] == both[1]["measured"]["warmup_steps"] == 50


def test_what_ranks_agree_on(both):
    for rank, found in enumerate(both):
        assert found["agreements"] == {
            "totals": [2, 10], "any": [True, False], "gather": ["a", "b"], "largest": 2.5,
            "worst": (1, {"x": 1}), "in_turn": rank, "from_first": "from 0",
            "first_refused": "the disk is full", "second_refused": "the disk is full",
        }  # fmt: skip
        assert found["log"] == "0\n1\n"  # the first went first


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
