"""Several records of bench.speed together, and the plot of whole steps by the number of experts."""

from __future__ import annotations

from dataclasses import replace

from bench.speeding.rows import Row
from bench.speeding.step_figure import steps_plot
from bench.speeding.targets import HARNESS, STEPS, latest_verdicts
from tests.bench.test_speeding import row


def record(name: str, start: str, *rows: Row):
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


def step(name: str, experts: int, seconds: float, peak: int | None, **changes) -> Row:
    return row(name, seconds, seconds, case=STEPS, subject="step", experts=experts, peak_bytes=peak,
               floor_bytes=None, **changes)  # fmt: skip


def test_the_plot_of_steps_shows_throughput_and_peak_by_experts():
    rows = [step(name, experts, experts / 100, peak and experts * peak) for experts in (2, 4, 8)
            for name, peak in (("mean", 2**20), ("GNN", None))]  # fmt: skip
    other = step("mean", 16, 1.0, 2**20, width=32)  # another model: no point of these lines
    plot = steps_plot([*rows, other, row("vectorized", 1.0)], "CPU")
    assert plot is not None
    throughput, memory = plot.figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in throughput.lines}  # pyright: ignore
    assert lines == {name: [[2, 800], [4, 400], [8, 200]] for name in ("mean", "GNN")}  # 16 tokens a step
    peaks = {line.get_label(): line.get_xydata().tolist() for line in memory.lines}  # pyright: ignore
    assert peaks == {"mean": [[2, 2], [4, 4], [8, 8]], "GNN": []}
    assert steps_plot(rows[:2], "CPU") is None
    assert steps_plot([], "CPU") is None
