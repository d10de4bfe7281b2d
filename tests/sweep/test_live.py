"""What a person sees: lines where there is no terminal, and a table of 80 columns where there is one."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from bench.sweep.executors.base import Task
from bench.sweep.live import Display, last_validation
from bench.sweep.outcome import Attempt, Outcome, SweepResult
from bench.sweep.plan import PlannedRun
from tests.sweep._fake import Study

LABEL = "HGNN hypergraph_conv all_triplets learnable_edge_weights E 16 layers 3 · seed 12"


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path)


def attempt_at(tmp_path: Path, rows: list[dict], label: str = LABEL, name: str = "a" * 12) -> Attempt:
    """A running run whose history has these rows."""
    folder = tmp_path / name
    run = PlannedRun(name, label, (), folder, steps=120)
    attempt = Attempt(run, Task(name, [], tmp_path / "log", folder), ())
    folder.mkdir()
    (folder / "record.json").write_text("{}")
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return attempt


def screen(width: int = 80, height: int = 24) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=None), file


def row(step: int, kind: str = "train") -> dict:
    return {"kind": kind, "step": step, "nll_sum": 6.0 * 10, "tokens": 10}


def test_the_last_validation_is_read_from_the_end_of_the_history(tmp_path):
    rows = [row(step) for step in range(1, 5000)] + [row(4999, "validation")] + [row(5000), row(5001)]
    attempt = attempt_at(tmp_path, rows)
    assert last_validation(attempt) == "step 5001/120: perplexity 403.4"
    history = tmp_path / ("a" * 12) / "history.jsonl"
    with history.open("a") as file:
        file.write('{"kind": "train", "st')  # as it is being written
    assert last_validation(attempt) == "step 5001/120: perplexity 403.4"
    history.write_text(json.dumps(row(3)))
    assert last_validation(attempt) == "step 3/120"
    history.write_text("")
    assert last_validation(attempt) is None
    history.unlink()
    assert last_validation(attempt) is None


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_fits(tmp_path, width):
    console, file = screen(width)
    attempts = [attempt_at(tmp_path, [row(80, "validation")], name=f"run{n}") for n in range(3)]
    runs = [attempt.run for attempt in attempts]
    outcomes = {"best": Outcome("ok", loss_nats=math.log(123456.7)), "run2": Outcome("crashed")}
    result = SweepResult([*runs, PlannedRun("best", LABEL, (), tmp_path)], outcomes)
    console.print(Display(console, result, 3).table(attempts, 9876, 86400.0))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 5
    if width == 80:
        assert "step 80/120: perplexity 403.4" in lines[0]
        assert "2 of 4 done · 3 running · 1 failed · 9876 waiting · about 24 h 0 min" in lines[3]
        assert "best: perplexity 123,456.7 HGNN" in lines[4]


def test_a_table_of_many_slots_is_cut_to_the_screen(tmp_path):
    console, file = screen(height=12)
    attempts = [attempt_at(tmp_path, [], name=f"run{n}") for n in range(30)]
    display = Display(console, SweepResult([attempt.run for attempt in attempts]), 30)
    console.print(display.table(attempts, 0, None))
    assert len(file.getvalue().splitlines()) == 8
    assert "… and 24 more" in file.getvalue()


def test_plain_lines_where_there_is_no_terminal(study):
    study.put("interrupted", "run2")
    study.put("ok", "run3")
    study.sweep(study.runs("ok", "raises", "ok", "ok"))
    lines = re.sub(r"\b\d s\b", "0 s", study.output.getvalue()).splitlines()  # a busy machine takes one
    assert lines[0] == "4 runs, 1 at a time; already done: 1 ok"
    assert lines[1] == "starts       ok"
    assert lines[2] == "ok           ok: perplexity 20.1, 0 s (2 of 4)"
    assert lines[4] == "crashed      raises: 0 s (3 of 4)"
    assert lines[5] == "             KeyError: 'x'"
    assert lines[6] == "continues    ok"
    assert lines[8] == "4 runs in 0 s: 3 ok, 1 crashed; best: perplexity 20.1, ok"
    assert lines[9] == "crashed      raises (run1): KeyError: 'x'"
    assert lines[10] == f"The output of each run is in {study.folder / '.logs'}."
    assert len(lines) == 11


def test_the_best_has_the_lowest_loss_also_where_perplexities_are_infinite(study):
    runs = study.runs("a", "b", "c")
    file = io.StringIO()
    losses = zip(runs, (4046.0, 1500.0, 2000.0), strict=True)
    outcomes = {run.run_id: Outcome("ok", loss_nats=loss) for run, loss in losses}
    Display(Console(file=file, width=80), SweepResult(runs, outcomes), 1).summary("again")
    assert file.getvalue() == "3 runs in 0 s: 3 ok; best: perplexity inf, b\n"


def test_a_live_table_and_no_thread_beside_it(study, monkeypatch):
    """Children are forked: a thread that holds a lock at that moment would be a trap."""
    console, file = screen()
    display = Display(console, SweepResult(study.runs("a")), 1)
    import threading

    before = threading.active_count()  # other tests may have left some
    with display.shown():
        display.refresh([], 1, lambda: None)
        display.refresh([], 1, lambda: pytest.fail("it is not time yet"))
        display.ended(attempt_at(study.results.parent, []), Outcome("ok", loss_nats=math.log(2.0)))
        assert threading.active_count() == before
    assert "0 of 1 done · 0 running · 0 failed · 1 waiting" in file.getvalue()
    assert "perplexity 2.0" in file.getvalue()


def test_markup_in_a_label_is_text(study):
    console, file = screen()
    (run,) = study.runs("[red]x[/nope]")
    attempt = Attempt(run, Task(run.run_id, [], study.folder / "log", run.folder), ())
    outcome = Outcome("crashed", "[/bold] y")
    display = Display(console, SweepResult([run], {"run0": outcome}), 1)
    console.print(display.table([attempt], 0, None))
    display.ended(attempt, outcome)
    display.summary("again")
    assert file.getvalue().count("[red]x[/nope]") == 3


def test_an_earlier_runs_history_is_not_shown(tmp_path):
    attempt_at(tmp_path, [row(7, "validation")])
    run = PlannedRun("a" * 12, "", (), tmp_path / ("a" * 12))
    task = Task(run.run_id, [], tmp_path / "log", run.folder)
    assert last_validation(Attempt(run, task, ())) is None


def test_many_failures_are_cut_short(study):
    runs = study.runs(*["x"] * 50)
    file = io.StringIO()
    result = SweepResult(runs, {run.run_id: Outcome("oom", "a" * 500) for run in runs})
    Display(Console(file=file, width=80), result, 1).summary("the same command")
    assert "… and 30 more" in file.getvalue()
    assert len(file.getvalue()) < 6000
