"""Several records of bench.speed together, and the plot of whole steps by the number of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.speeding.page import tables
from bench.speeding.rows import SpeedRow
from bench.speeding.step_figure import steps_plot
from bench.speeding.targets import HARNESS, STEPS, latest_verdicts, unmeasured_targets
from tests.bench.test_speeding import record_of, row


def record(name: str, start: str, *rows: SpeedRow):
    return {"name": name, "start": start}, rows


def test_a_target_is_of_the_last_record_that_has_it_and_mixes_no_two():
    """The later loop has no form beside it: the earlier ratio stands. What both have is the later one's."""
    bare, harness = (row(form, 2.0, case=HARNESS) for form in ("bare loop", "harness"))
    early = record("early", "2026-01-01T00:00:00Z", row("loop", 70.0), row("vectorized", 1.0),
                   replace(harness, seconds=[1.0]), bare)  # fmt: skip
    late = record("late", "2026-01-02T00:00:00Z", row("loop", 9.0), replace(harness, seconds=[4.0]), bare)
    for order in ([early, late], [late, early]):
        known = [one for one in latest_verdicts(order) if one.value is not None]
        assert [(one.target.name, one.value, one.job) for one in known] == [
            ("S1", 70.0, "early"), ("S5", 2.0, "late"),
        ]  # fmt: skip


def test_what_failed_or_is_wrong_stands_on_a_page_as_that(tmp_path):
    kept = record_of(tmp_path)
    assert "nothing was measured" in tables([(kept.data, [])])
    machine = {"device": "CPU", "copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"fp32": 1e11}}
    kept.add([row("vectorized", 1.0, largest_difference=1e-2), row("loop", 2.0),
              row("pyg", error="out of memory"),
              row("harness", 1.0, case=HARNESS, floor_bytes=None, error="MFU 120 %")], machine)  # fmt: skip
    page = tables([(kept.data, kept.rows)])
    assert [line.partition(", cpu, ")[2] for line in page.splitlines() if line.startswith("- ")] == [
        "vectorized: WRONG by 1e-02: its time does not count", "pyg: out of memory", "harness: MFU 120 %",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", [{"error": "out of memory", "seconds": []}, {"largest_difference": 0.1}])
def test_a_target_that_failed_in_the_last_record_is_not_met_by_an_earlier_one(broken):
    loop, vectorized = row("loop", 70.0), row("vectorized", 1.0)
    early = record("early", "2026-01-01T00:00:00Z", loop, vectorized)
    late = record("late", "2026-01-02T00:00:00Z", loop, replace(vectorized, **broken))
    new = record("new", "2026-01-03T00:00:00Z", loop, vectorized)
    first = latest_verdicts([early, late])[0]
    assert (first.target.name, first.value, first.met, first.words) == ("S1", None, None, "failed")
    assert (first.job, unmeasured_targets([first])) == ("late", "")
    first = latest_verdicts([early, late, new])[0]
    assert (first.value, first.job) == (70.0, "new")


def step(name: str, experts: int, seconds: float, peak: int | None, **changes) -> SpeedRow:
    return row(name, seconds, seconds, case=STEPS, subject="step", experts=experts, peak_bytes=peak,
               floor_bytes=None, **changes)  # fmt: skip


def test_the_plot_of_steps_shows_throughput_and_peak_by_experts():
    rows = [step(name, experts, experts / 100, peak and experts * peak) for experts in (2, 4, 8)
            for name, peak in (("mean", 2**20), ("GNN", None))]  # fmt: skip
    other = step("mean", 16, 1.0, 2**20, width=32)  # another model: no point of these lines
    wrong = step("gate", 2, 1.0, 2**20, largest_difference=1.0)
    plot = steps_plot([other, *rows, wrong, row("vectorized", 1.0)], "CPU")
    assert plot is not None
    throughput, memory = plot.figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in throughput.lines}  # pyright: ignore
    assert lines == {name: [[2, 800], [4, 400], [8, 200]] for name in ("mean", "GNN")}  # 16 tokens a step
    peaks = {line.get_label(): line.get_xydata().tolist() for line in memory.lines}  # pyright: ignore
    assert peaks == {"mean": [[2, 2], [4, 4], [8, 8]], "GNN": []}
    assert steps_plot(rows[:2], "CPU") is None
    assert steps_plot([], "CPU") is None
