"""A fit in a process of its own (A8, B6, B9), on several ranks (B12), and what it asks for once."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from bench.cli import parse
from bench.config import RunConfig, TrainingConfig
from bench.run.__main__ import main
from bench.run.prepare import prepare
from bench.training.ranks import Ranks
from bench.tune import find, trials
from bench.tune.search import Found, NoFeasibleBatch, SearchFailed, Shape, Trial
from bench.tune.trials import ParametersNotApplied, Request, TrialSetup, search_in_child
from gnnmoe import GNNMoEConfig
from tests.bench._forked import fork_context
from tests.bench._runs import only_run, results_of

SMALL = GNNMoEConfig(embed_dim=8, num_heads=2, num_layers=1, max_seq_length=16, vocab_size=43)
FIT = ["--fit-shape", "--memory-budget", "140KiB", "--shape-length-step", "4"]
SETUP = TrialSetup(SMALL, TrainingConfig(), 4, 130_000, "cpu")
REQUEST = Request(SETUP, 130_000, 1.0, "shape", (8, 16), (1, 2), 1, 8, 100.0)


@pytest.fixture
def forked(monkeypatch) -> None:
    """Let the search's process begin at once; that a spawned process searches is shown in test_tune."""
    monkeypatch.setattr(trials, "multiprocessing", SimpleNamespace(get_context=lambda _: fork_context()))


def dies(request, send) -> Found:
    os._exit(9)


def breaks(request, send) -> Found:
    raise ZeroDivisionError("a fault")


def applies_nothing(request, send) -> Found:
    raise ParametersNotApplied("parameters not applied")


def finds_nothing(request, send) -> Found:
    raise NoFeasibleBatch([Trial(Shape(1, 8), "no")], Shape(1, 8))


def is_silent(request, send) -> Found:
    time.sleep(1000)
    raise AssertionError("it was not ended")


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
        (finds_nothing, NoFeasibleBatch, "no batch fits"),
        (is_silent, SearchFailed, "no trial ended within"),
        (applies_nothing, ParametersNotApplied, "^parameters not applied$"),
    ],
)
def test_a8_what_goes_wrong_in_a_child_is_a_failed_search_or_what_it_is(forked, work, error, said):
    with pytest.raises(error, match=said):
        search_in_child(replace(REQUEST, max_seconds=0.2) if work is is_silent else REQUEST, print, work)


def test_b6_at_the_deadline_the_answer_is_what_ran_before_it(forked, monkeypatch):
    def late(trial: Trial) -> None:
        if not trial.ran:  # the last message: from here on the time is up
            monkeypatch.setattr(trials, "time", SimpleNamespace(time=lambda: float("inf")))

    found = search_in_child(REQUEST, late, never_ends)
    assert (found.shape, found.stopped, len(found.trials)) == (Shape(1, 8), "max_seconds", 2)


def test_a8_a_failed_fit_is_loud_and_falls_back_only_where_asked(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "cache"))

    def fails(*_):
        raise SearchFailed("died")

    monkeypatch.setattr("bench.tune.find.search_here", fails)
    assert main([*tiny, *FIT]) == 1
    _, record = only_run(results_of(tiny))
    assert record["error"] == "SearchFailed: died"
    assert record["tuned"]["status"] == "failed"
    assert main([*tiny, *FIT, "--tune-fallback", "--study", "fallback"]) == 0
    assert "WARNING: the fit failed" in " ".join(capsys.readouterr().out.split())


def fit_on_rank(rank: int, store: Path, flags: list[str], said: Any) -> None:
    """Fit three times with made-up searches of the two ranks; send what came of it, and the collectives."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    real, collectives = dist.all_gather_object, []
    dist.all_gather_object = lambda *arguments: (collectives.append(1), real(*arguments))
    request = prepare(parse(RunConfig, flags)).search(print)
    find.cached_search = lambda request, make, say, keep: (make(), False)
    answers: list[Any] = []
    for places in ((2, 1), (3, 4), (None, 2)):
        find.search_here = lambda *_, place=places[rank]: found_at(request.shapes, place)
        try:
            record = find.find(request, Ranks(rank, 2, backend="gloo"), lambda _: None)
        except SearchFailed as error:
            answers.append(type(error).__name__)
        else:
            answers.append((record["status"], record["length"], record["micro_batch_size"]))
    said.put((rank, answers, len(collectives)))


def found_at(shapes: list[Shape], place: int | None) -> Found:
    if place is None:
        raise NoFeasibleBatch([Trial(shapes[0], "no")], shapes[0])
    return Found(shapes[place], "limit", (Trial(shapes[place]),))


def test_b12_two_ranks_fit_the_smaller_shape_and_none_waits_for_one_on_which_nothing_fits(tiny, tmp_path):
    context = fork_context()
    said = context.Queue()
    ranks = [
        context.Process(target=fit_on_rank, args=(rank, tmp_path / "store", [*tiny, *FIT], said), daemon=True)
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    try:
        answers = sorted(said.get(timeout=100) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for (_, found, collectives), failed in zip(answers, ("NoFeasibleBatch", "SearchFailed"), strict=True):
        assert found == [("ok", 8, 1), ("ok", 16, 1), failed]
        assert collectives == 3, "one collective per search"
