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
from bench.measure import search_process, trials
from bench.measure.fit_process import FitRequest, fit_here, fit_in_child
from bench.measure.search_process import SearchFailed, in_child
from bench.measure.trials import Trials, TrialSetup
from bench.run import main
from bench.training.batch_size import NoFeasibleBatch, Trial
from bench.training.fit import Tried, concluded
from bench.training.shape import ParametersNotApplied, Shape, ladder
from gnnmoe import GNNMoEConfig
from tests.bench.test_run import only_run, results_of

REPOSITORY = Path(__file__).parents[2]
SMALL = GNNMoEConfig(embed_dim=8, num_heads=2, num_layers=1, max_seq_length=16, vocab_size=43)
FIT = ["--fit-shape", "--memory-budget", "140KiB", "--shape-length-step", "4"]
SETUP = TrialSetup(SMALL, TrainingConfig(), 4, 130_000, "cpu")
REQUEST = FitRequest(SETUP, 130_000, tuple(ladder([8, 16], [1, 2])), 8, 100.0)


def test_b6_a_child_s_fit_is_the_same():
    told: list[Tried] = []
    child, here = fit_in_child(REQUEST, told.append), fit_here(REQUEST)
    assert tuple(told) == child.tries
    assert (child.shape, child.stopped) == (here.shape, here.stopped)
    peaks = [(tried.shape, tried.trial.measured_peak_bytes) for tried in here.tries]
    assert [(tried.shape, tried.trial.measured_peak_bytes) for tried in child.tries] == peaks


def test_b6_a_child_s_fit_is_ended_at_its_deadline():
    begun = time.monotonic()
    with pytest.raises(SearchFailed, match=r"no trial ended within 0.2 s \(--tune-max-seconds\)"):
        fit_in_child(replace(REQUEST, max_seconds=0.2))
    assert time.monotonic() - begun < 30


def dies(request, seconds, send):
    os._exit(9)


def breaks(request, seconds, send):
    raise ZeroDivisionError("a fault")


def applies_nothing(request, seconds, send):
    raise ParametersNotApplied("parameters not applied")


def never_ends(request, seconds, send):
    send(Tried(Shape(1, 8), None, Trial(1)))
    send(Tried(Shape(1, 16), None, Trial(1, "no")))
    time.sleep(1000)


def in_a_child(work, on_message=print):
    def so_far(tries):
        return concluded(tries, REQUEST.shapes, 1, "max_seconds")

    return in_child(work, REQUEST, 100.0, on_message, so_far)


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
        in_a_child(work)


def test_b6_at_the_deadline_the_answer_is_what_ran_before_it(monkeypatch):
    def late(tried: Tried) -> None:
        if not tried.trial.ran:  # the last message: from here on the time is up
            monkeypatch.setattr(search_process, "time", SimpleNamespace(time=lambda: float("inf")))

    found = in_a_child(never_ends, late)
    assert (found.shape, found.stopped, len(found.tries)) == (Shape(1, 8), "max_seconds", 2)


@pytest.mark.parametrize("error", [SearchFailed("died"), NoFeasibleBatch([Trial(1, "no")], 1)])
def test_a8_a_failed_fit_is_loud_and_falls_back_only_where_asked(tiny, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("bench.fitting.fit_here", fails)
    assert main([*tiny, *FIT]) == 1
    _, record = only_run(results_of(tiny))
    assert type(error).__name__ in record["error"]
    assert record["tuned"]["status"] == "failed"
    assert main([*tiny, *FIT, "--tune-fallback", "--study", "fallback"]) == 0
    assert "WARNING: the fit failed" in " ".join(capsys.readouterr().out.split())


RANKS = """
import sys, torch.distributed as dist
from bench import fitting
from bench.cli import parse
from bench.config import RunConfig
from bench.prepare import prepare
from bench.training.batch_size import NoFeasibleBatch, Trial
from bench.training.fit import Fit, Tried
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
prepared = prepare(parse(RunConfig, sys.argv[3:]))

def found(*places):
    def fit_here(request, *_):
        if places[rank] is None:
            raise NoFeasibleBatch([Trial(1, "no")], 1)
        shape = request.shapes[places[rank]]
        return Fit(shape, 1, "limit", (Tried(shape, None, Trial(shape.rows)),))
    fitting.fit_here = fit_here
    record, failure = fitting.find_shape(prepared, None, lambda _: None)
    return record["status"], record["length"], record["micro_batch_size"], type(failure).__name__

print(*found(2, 1), *found(3, 4), *found(None, 2))
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
        both = "ok 8 1 NoneType ok 16 1 NoneType failed 16 None "
        assert " ".join(out.split()) == both + ours


def test_a_prediction_is_worked_out_once(monkeypatch):
    asked = []

    def predict(*arguments, **named):
        asked.append(named["micro_batch_size"])
        return 1

    monkeypatch.setattr(trials, "predict_peak", predict)
    tries = Trials(REQUEST.setup)
    assert tries.predicted(2) == 1
    assert tries(2).predicted_peak_bytes == 1
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
    found = fit_in_child(FitRequest(setup, budget, tuple(ladder([full // 2, full], rows)), 12, 100.0))
    peak = found.found.trial.measured_peak_bytes
    assert peak is not None
    assert peak <= setup.limit_bytes
    assert found.stopped == "limit"
    assert torch.cuda.memory_allocated() == before
