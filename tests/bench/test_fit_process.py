"""A fit in a process of its own (A8, B6, B9), on several ranks (B12), and what it asks for once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.config import TrainingConfig
from bench.device import is_out_of_memory
from bench.run.__main__ import main
from bench.tune import trials
from bench.tune.search import Found, NoFeasibleBatch, SearchFailed, Shape, Trial
from bench.tune.trials import ParametersNotApplied, Request, Trials, TrialSetup, search_here, search_in_child
from gnnmoe import GNNMoEConfig
from tests.bench.test_run import only_run, results_of

REPOSITORY = Path(__file__).parents[2]
SMALL = GNNMoEConfig(embed_dim=8, num_heads=2, num_layers=1, max_seq_length=16, vocab_size=43)
FIT = ["--fit-shape", "--memory-budget", "140KiB", "--shape-length-step", "4"]
TINIEST = Shape(1, 8)
SETUP = TrialSetup(SMALL, TrainingConfig(), 4, 130_000, "cpu")
REQUEST = Request(SETUP, 130_000, 1.0, "shape", (8, 16), (1, 2), 1, 8, 100.0)


def test_b6_a_child_s_fit_is_the_same():
    told: list[Trial] = []
    child, here = search_in_child(REQUEST, told.append), search_here(REQUEST, lambda _: None)
    assert tuple(told) == child.trials
    assert (child.shape, child.stopped) == (here.shape, here.stopped)
    peaks = [(trial.shape, trial.measured_peak_bytes) for trial in here.trials]
    assert [(trial.shape, trial.measured_peak_bytes) for trial in child.trials] == peaks


def test_b6_a_child_s_fit_is_ended_at_its_deadline():
    begun = time.monotonic()
    with pytest.raises(SearchFailed, match=r"no trial ended within 0.2 s \(--tune-max-seconds\)"):
        search_in_child(replace(REQUEST, max_seconds=0.2), print)
    assert time.monotonic() - begun < 30


def dies(request, send) -> Found:
    os._exit(9)


def breaks(request, send) -> Found:
    raise ZeroDivisionError("a fault")


def applies_nothing(request, send) -> Found:
    raise ParametersNotApplied("parameters not applied")


def never_ends(request, send) -> Found:
    send(Trial(Shape(1, 8)))
    send(Trial(Shape(1, 16), "no"))
    time.sleep(1000)
    raise AssertionError("it was not ended")


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (dies, SearchFailed, "died .exit code 9"),
        (breaks, SearchFailed, "ZeroDivisionError: a fault"),
        (applies_nothing, ParametersNotApplied, "^parameters not applied$"),
    ],
)
def test_a8_what_goes_wrong_in_a_child_is_a_failed_search_or_what_it_is(work, error, said):
    with pytest.raises(error, match=said):
        search_in_child(REQUEST, print, work)


def test_b6_at_the_deadline_the_answer_is_what_ran_before_it(monkeypatch):
    def late(trial: Trial) -> None:
        if not trial.ran:  # the last message: from here on the time is up
            monkeypatch.setattr(trials, "time", SimpleNamespace(time=lambda: float("inf")))

    found = search_in_child(REQUEST, late, never_ends)
    assert (found.shape, found.stopped, len(found.trials)) == (Shape(1, 8), "max_seconds", 2)


@pytest.mark.parametrize("error", [SearchFailed("died"), NoFeasibleBatch([Trial(TINIEST, "no")], TINIEST)])
def test_a8_a_failed_fit_is_loud_and_falls_back_only_where_asked(tiny, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "cache"))

    def fails(*_):
        raise error

    monkeypatch.setattr("bench.tune.find.search_here", fails)
    assert main([*tiny, *FIT]) == 1
    _, record = only_run(results_of(tiny))
    assert type(error).__name__ in record["error"]
    assert record["tuned"]["status"] == "failed"
    assert main([*tiny, *FIT, "--tune-fallback", "--study", "fallback"]) == 0
    assert "WARNING: the fit failed" in " ".join(capsys.readouterr().out.split())


RANKS = """
import sys, torch.distributed as dist
from bench.cli import parse
from bench.config import RunConfig
from bench.run.prepare import prepare
from bench.training.ranks import Ranks
from bench.tune import find
from bench.tune.search import Found, NoFeasibleBatch, SearchFailed, Trial
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
real, collectives = dist.all_gather_object, []
dist.all_gather_object = lambda *arguments: (collectives.append(1), real(*arguments))
request = prepare(parse(RunConfig, sys.argv[3:])).search(print)
shapes = request.shapes

def found(*places):
    def search_here(*_):
        if places[rank] is None:
            raise NoFeasibleBatch([Trial(shapes[0], "no")], shapes[0])
        shape = shapes[places[rank]]
        return Found(shape, "limit", (Trial(shape),))
    find.search_here = search_here
    find.cached_search = lambda request, make, say, keep: (make(), False)
    try:
        record = find.find(request, Ranks(rank, 2, backend="gloo"), lambda _: None)
    except SearchFailed as error:
        return "failed", type(error).__name__
    return record["status"], record["length"], record["micro_batch_size"]

print(*found(2, 1), *found(3, 4), *found(None, 2), len(collectives))
"""


def test_b12_two_ranks_fit_the_smaller_shape_and_none_waits_for_one_on_which_nothing_fits(tiny, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RANKS]
    rest, pipes = [str(tmp_path / "store"), *tiny, *FIT], dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    ranks = [
        subprocess.Popen([*command, str(rank), *rest], env=environment, text=True, **pipes) for rank in (0, 1)
    ]
    for rank, ours in zip(ranks, ("NoFeasibleBatch", "SearchFailed"), strict=True):
        out, err = rank.communicate(timeout=100)
        assert rank.returncode == 0, err[-2000:]
        assert " ".join(out.split()) == f"ok 8 1 ok 16 1 failed {ours} 3", "one collective a search"


def test_a_prediction_is_worked_out_once(monkeypatch):
    asked = []

    def predict(*arguments, **named):
        asked.append(named["micro_batch_size"])
        return 1

    monkeypatch.setattr(trials, "predict_peak", predict)
    tries = Trials(REQUEST.setup)
    assert tries.predicted(Shape(2, 16)) == 1
    assert tries(Shape(2, 16)).predicted_peak_bytes == 1
    assert asked == [2]


def test_b9_a_text_of_onednn_that_may_mean_many_things_is_no_sign_of_memory():
    """Torch also raises it with memory to spare, where no page may be made executable (see the docstring)."""
    assert not is_out_of_memory(RuntimeError("could not create a primitive"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_b6_d4_a_fit_on_the_device_keeps_to_its_budget_in_a_child():
    """B6, D4 (gpu): the child's allocator gets the budget; the parent's device is untouched."""
    before, full = torch.cuda.memory_allocated(), 256
    model = GNNMoEConfig(embed_dim=256, num_layers=4, max_seq_length=full, vocab_size=8192)
    budget, rows = 2 * 2**30, [2**power for power in range(9)]
    setup = TrialSetup(model, TrainingConfig(), max(rows), int(budget * 0.85), "cuda")
    asked = Request(setup, budget, 0.85, "shape", (full // 2, full), tuple(rows), 1, 12, 100.0)
    found = search_in_child(asked, print)
    peak = found.trial.measured_peak_bytes
    assert peak is not None
    assert peak <= setup.limit_bytes
    assert found.stopped == "limit"
    assert torch.cuda.memory_allocated() == before
