"""The end of a run on the screen: one line where all is well, each difference, and the next command."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.record import Record, is_measured, not_measured, read_record
from bench.report.summary import print_summary
from tests.report._made_studies import made_study
from tests.study.test_study import runs_of

AGAIN = "python -m bench.run --coupler GNN --seed=3 --study 'a b' --resume"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    study = made_study(tmp_path_factory.mktemp("made") / "one", {"GNN": 0.0}, seeds=1, history=4)
    return runs_of(study, "GNN")[0]


@pytest.fixture
def record(folder) -> Record:
    return read_record(folder)


def shown(record: Record, folder: Path, again: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_summary(record, folder, console, again)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def words(*arguments: Any) -> str:
    return " ".join(" ".join(shown(*arguments)).split())


def test_counts_as_planned_are_one_line_and_a_difference_is_named(record, folder):
    assert "counts as planned: " in words(record, folder)
    assert is_measured(record.used)
    record.used.ledger.training["tokens"].got -= 1
    found = record.used.ledger.training["tokens"]
    assert f"✗ training tokens: {found.asked:,} planned, {found.got:,} counted" in words(record, folder)
    assert "as planned" not in words(record, folder)


def test_the_leak_check_is_one_line_and_a_failure_is_named(record, folder):
    assert is_measured(record.check)
    count = len(record.check.checks)
    assert f"leak check ✓ passed: {count} checks" in words(record, folder)
    record.check.checks[next(iter(record.check.checks))].passed = False
    name = next(iter(record.check.checks)).replace("_", " ")
    assert f"leak check ✗ FAILED: {name}; passed: {count - 1} checks" in words(record, folder)


def test_the_training_row_has_the_last_loss_and_the_clipped_updates(record, folder):
    rows = (folder / "history.jsonl").read_text().count('"train"')
    text = words(record, folder)
    assert "learning rate 0.008" in text
    assert "warm-up steps; final training loss " in text
    record.config.training["max_grad_norm"] = 1e-9
    assert f"clipped to norm 1e-09 in {rows} of {rows} updates" in words(record, folder)
    record.config.training["max_grad_norm"] = 1e9
    assert "no gradient was clipped" in words(record, folder)
    assert "final training loss" not in words(record, folder / "none")


def test_updates_that_were_not_done_are_said(record, folder):
    assert is_measured(record.used)
    done = record.used.steps
    assert f"{done} updates, as requested" in words(record, folder)
    record.used.total_steps = done + 5
    assert f"{done} of {done + 5} updates" in words(record, folder)


@pytest.mark.parametrize(
    ("status", "command"),
    [
        ("ok", "python -m bench.run --seed=3 --study 'a b' --coupler mean"),
        ("interrupted", "python -m bench.run --coupler GNN --seed=3 --study 'a b' --resume"),
        ("diverged", "python -m bench.run --coupler GNN --seed=3 --study 'a b' --learning-rate 0.004"),
        ("check_failed", "python -m bench.check --coupler GNN"),
    ],
)
def test_the_next_command_follows_from_the_end_of_the_run(status, command, record, folder):
    record.status = status
    assert shown(record, folder, AGAIN)[-1] == f"next:   {command}"
    assert not any(line.startswith("next:") for line in shown(record, folder))


def test_several_runs_are_compared_next(tmp_path):
    study = made_study(tmp_path / "two", {"GNN": 0.0}, seeds=2, history=2)
    run = runs_of(study, "GNN")[0]
    assert shown(read_record(run), run, AGAIN)[-1] == f"next:   python -m bench.report {study}"


def test_a_speed_that_was_left_out_is_said(record, folder):
    record.speed = not_measured("left out by --no-speed")
    assert "speed not measured: left out by --no-speed" in words(record, folder)
