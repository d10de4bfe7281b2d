"""What the analysis makes of the speed pass: MFU, waiting for data, and the coupler's cost timed in turn."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.record import Marginal, Record, Time, TimePart, is_measured, not_measured, read_record
from bench.report import quantities
from bench.report.comparison import ComparisonRow, compare
from bench.report.contents import verdict_sentences
from bench.report.plots.cost import added_cost
from bench.report.provenance import run_facts
from bench.report.summary import print_summary
from bench.report.tables import comparison_table, runs_table
from bench.study.labels import flags_that_count
from bench.study.runs import Run, load_study
from tests.report._made_studies import made_study

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "small"
OURS, THEIRS = [0.3, 0.36, 0.33], [0.2, 0.3, 0.22]


def marginal(**changes: Any) -> dict[str, Any]:
    return {
        "reference_warmup": {"warmup_steps": 3, "steady": True, "remark": ""},
        "reference": "mean", "step_seconds": OURS, "reference_step_seconds": THEIRS, "steady": True,
        "peak_allocated_bytes": 3 * 2**20, "training_flops_per_token": 250_000.0, "parameters": 777,
        **changes,
    }  # fmt: skip


def changed(study: Path, coupler: str, **speed: Any) -> None:
    """Add to the speed of every run of a coupler."""
    for path in study.glob("*/record.json"):
        record = json.loads(path.read_text())
        if record["config"]["model"]["coupler_type"] == coupler:
            record["speed"] |= speed
            path.write_text(json.dumps(record))


def rows_of(study: Path) -> dict[str, ComparisonRow]:
    return {row.configuration.label: row for row in compare(load_study(study).groups[0]).rows}


@pytest.fixture
def study(tmp_path) -> Path:
    return made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.02}, seeds=2, history=2)


@pytest.fixture
def record(study) -> Record:
    return read_record(next(study.glob("*/record.json")).parent)


# --- quantities ------------------------------------------------------------------------------------


def test_utilisation_is_the_models_flops_over_those_of_a_product(record):
    assert quantities.utilisation(record) is None
    reached = record.speed.tokens_per_second * record.flops.training_flops_per_token
    record.speed.matrix_flops_per_second = 4 * reached
    assert quantities.utilisation(record) == pytest.approx(0.25)
    record.speed.matrix_flops_per_second = 0.9 * reached
    assert quantities.utilisation(record) == pytest.approx(1 / 0.9)


def test_the_share_of_data_is_that_of_a_median_fetch(record):
    assert quantities.data_share(record) is None
    step = statistics.median(record.speed.step_seconds)
    record.speed.fetch_seconds = [50 * step, 0.01 * step, 0.01 * step]  # the first opens the file
    assert quantities.data_share(record) == pytest.approx(0.01)


def test_a_record_without_a_speed_pass_has_none_of_it(record):
    record.speed = not_measured("not reached")
    assert quantities.marginal(record) is None
    assert quantities.utilisation(record) is None
    assert quantities.data_share(record) is None


# --- the coupler's cost ----------------------------------------------------------------------------


def test_costs_timed_in_turn_come_before_those_of_separate_runs(study):
    before = rows_of(study)["GNN"].cost
    assert before is not None
    assert not before.in_turn
    changed(study, "GNN", marginal=marginal())
    cost = rows_of(study)["GNN"].cost
    assert cost is not None
    assert cost.in_turn
    assert cost.step_time_ratio() == pytest.approx(statistics.median([1.5, 1.2, 1.5]))
    assert cost.added_seconds.values == pytest.approx({0: 0.33 - 0.22, 1: 0.33 - 0.22})
    assert (cost.memory_bytes, cost.parameters, cost.flops_per_token) == (3 * 2**20, 777, 250_000.0)
    assert cost.mean is not None
    assert cost.mean.label == "mean"
    assert rows_of(study)["mean"].cost is None


def test_one_run_without_them_is_enough_to_take_the_separate_runs(study):
    changed(study, "GNN", marginal=marginal())
    path = next(path for path in study.glob("*/record.json")
                if json.loads(path.read_text())["config"]["model"]["coupler_type"] == "GNN")  # fmt: skip
    record = json.loads(path.read_text())
    record["speed"]["marginal"] = {"value": None, "reason": "not asked for"}
    path.write_text(json.dumps(record))
    cost = rows_of(study)["GNN"].cost
    assert cost is not None
    assert not cost.in_turn


def test_they_need_no_run_with_the_mean_coupler(tmp_path):
    alone = made_study(tmp_path / "alone", {"GNN": 0.0, "HGNN": 0.01}, seeds=2, history=2)
    assert rows_of(alone)["HGNN"].cost is None
    changed(alone, "HGNN", marginal=marginal(peak_allocated_bytes={"value": None, "reason": "no meter"}))
    comparison = compare(load_study(alone).groups[0])
    row = next(row for row in comparison.rows if row.configuration.label == "HGNN")
    assert row.cost is not None
    assert (row.cost.mean, row.cost.memory_bytes) == (None, None)
    assert row.cost.over == "the mean coupler"
    added = added_cost(row, comparison)
    assert added is not None
    assert added.milliseconds.mean == pytest.approx(110.0)
    assert added.floor is None
    assert any("Cost relative to the mean coupler, timed alternately: +50% time per step" in text
               for text in verdict_sentences(comparison))  # fmt: skip


@pytest.mark.parametrize(
    ("in_turn", "words"),
    [((), "timed in separate runs."), (("GNN",), "in one process where each run did so."),
     (("GNN", "gate"), "timed alternately in one process.")],
)  # fmt: skip
def test_the_table_says_how_costs_were_timed(in_turn, words, tmp_path):
    study = made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.02, "gate": 0.0}, seeds=2, history=2)
    for coupler in in_turn:
        changed(study, coupler, marginal=marginal())
    table = comparison_table(compare(load_study(study).groups[0]))
    assert any(note.endswith(words) for note in table.notes)


def test_what_is_measured_besides_makes_no_other_configuration(record):
    config = record.config
    measure = {**config.measure, "marginal": True, "profile": True}
    assert flags_that_count(config.model_copy(update={"measure": measure})) == flags_that_count(config)


# --- what a person sees ----------------------------------------------------------------------------


def summary_of(record: Record) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_summary(record, Path("folder"), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def reference_record() -> Record:
    path = next(path for path in sorted(REFERENCE.glob("*/record.json"))
                if json.loads(path.read_text())["config"]["model"]["coupler_type"] == "GNN")  # fmt: skip
    return read_record(path.parent)


def test_an_earlier_record_is_shown_as_ever():
    text = " ".join(" ".join(summary_of(reference_record())).split())
    assert "tokens/s, median step" in text
    assert "10 steps)" in text
    assert "; not steady" in text
    for word in ("MFU", "fetching"):
        assert word not in text


def test_a_run_in_parts_has_the_times_of_all_and_says_how_many():
    """The summary and the page; the sums are over the parts, the start is the first part's."""
    record = reference_record()
    first = {"prepare": 1.0, "train": 20.0, "total": 21.0}
    second = {"train": 30.0, "speed": 4.0, "total": 34.0}
    parts = [TimePart(command="x", start="2025-01-01T12:00:00Z", end=None, seconds=first,
                      resumed_at_step=None),
             TimePart(command="x", start="2025-01-01T13:00:00Z", end="2025-01-01T13:01:00Z", seconds=second,
                      resumed_at_step=9)]  # fmt: skip
    record.time = Time.of(parts)
    assert (record.time.start, record.time.end) == (parts[0].start, parts[1].end)
    assert "time 55 s in 2 parts (prepare 1, train 50, speed 4)" in " ".join(
        " ".join(summary_of(record)).split()
    )
    facts = dict(run_facts(Run(Path("folder"), record), "GNN", {}).facts)
    assert facts["started"] == "2025-01-01T12:00:00Z, 55.0 s in 2 parts"
    record.time = Time.of(parts[:1])
    assert "time 21 s (prepare 1, train 20)" in " ".join(" ".join(summary_of(record)).split())


def test_the_summary_shows_percentiles_waiting_mfu_parts_and_the_couplers_cost():
    record = reference_record()
    assert is_measured(record.speed)
    assert is_measured(record.memory)
    record.speed = record.speed.model_copy(update={
        "step_seconds": [0.1 * k for k in range(1, 11)], "fetch_seconds": [0.0055] * 10, "steady": True,
        "matrix_flops_per_second": 1e12, "marginal": Marginal(**marginal()), "compile_seconds": 12.34,
    })  # fmt: skip
    parts = {"model": 2**20, "gradients": 2**19, "optimizer": 2**21, "activations": 5 * 2**20}
    record.memory.by_part = parts
    lines = summary_of(record)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "median step 550 ms (p10 190, p90 910; 10 steps)" in text
    assert "of 1 TFLOP/s, fetching a batch takes 1.0% of a step, compiled in 12.3 s" in text
    utilisation = quantities.utilisation(record)
    assert utilisation is not None
    assert f"MFU {100 * utilisation:.1f}%" in text
    assert "+50.0% of a step (p10 +26.0%, p90 +50.0%), +110.0 ms, +3.0 MiB, +0.25 MFLOPs per token" in text
    assert "over mean (3 alternating rounds)" in text
    assert "model 1.0, gradients 0.5, optimizer 2.0, activations 5.0" in text
    record.memory.remark, record.memory.peak_reserved_bytes = "of another step", 7 * 2**20
    assert "activations 5.0; of another step" in " ".join(" ".join(summary_of(record)).split())
    record.memory.peak_allocated_bytes = not_measured("graphs")
    assert "peak 7.0 MiB reserved in a training step" in " ".join(" ".join(summary_of(record)).split())


def test_the_table_of_runs_has_mfu_where_a_run_has(study):
    groups = load_study(study).groups
    assert "MFU" not in runs_table(groups).shown.columns
    changed(study, "GNN", matrix_flops_per_second=1e12)
    table = runs_table(load_study(study).groups)
    ours = table.figures["configuration"] == "GNN"
    assert list(table.shown["MFU"].astype(bool)) == list(ours)
    assert all(0 < value < 1 for value in table.figures["matrix_utilisation"][ours])
