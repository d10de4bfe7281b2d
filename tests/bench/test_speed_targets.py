"""The project's speed targets (tools/speed_targets.py): what they make of rows, and the table in the docs."""

from __future__ import annotations

import pytest

from bench.speed.record import HARNESS, SpeedRow
from bench.speed.suites import EAGER, STEP_32
from tests.bench.test_speed_rows import changed, row
from tools.speed_targets import CPU_TARGETS, GPU_TARGETS, PAGE, latest_verdicts, table, verdicts, with_table


def verdict(rows, name, measure):
    [found] = [one for one in verdicts(rows) if (one.target.name, one.target.measure) == (name, measure)]
    return found


def test_a_target_is_met_or_missed_by_how_much():
    loop = row("loop", 6.0)
    met = verdict([loop, row("vectorized", 0.1)], "S1", "HGNN: loop / vectorized")
    assert (met.value, met.met, met.words) == (pytest.approx(60), True, "met")
    missed = verdict([loop, row("vectorized", 0.12)], "S1", "HGNN: loop / vectorized")
    assert (missed.met, missed.words) == (False, "missed by 16.7%")
    far = verdict([loop, row("vectorized", 1.0)], "S1", "HGNN: loop / vectorized")
    assert far.words == "missed 10.0 times"


def test_a_target_without_its_rows_is_not_measured():
    harness = [row(form, seconds, case=HARNESS) for form, seconds in
               (("harness", 1.01), ("bare loop", 1.0), ("fetching a batch", 0.005))]  # fmt: skip
    found = verdicts(harness)
    assert {one.target.name for one in found if one.met} == {"S5", "S6"}
    lines = table([({"name": "one", "start": "2026"}, harness)]).splitlines()
    [s9] = [line for line in lines if "S9" in line]
    assert s9.split("|")[3].strip() == "–"
    assert all(one.words == "not measured" for one in found if one.value is None)


def test_a_gpu_target_takes_the_best_form_and_no_row_of_a_cpu():
    step = row(EAGER, 0.5, case=STEP_32, flops=100, matrix_flops_per_second=1000.0, peak_bytes=int(2e9))
    compiled = changed(step, form="compiled", seconds=[0.4])
    assert verdict([step, compiled], "S8", "MFU, baseline, B 32").value is None
    on_gpu = [changed(one, device="cuda") for one in (step, compiled)]
    best = verdict(on_gpu, "S8", "MFU, baseline, B 32")
    assert (best.value, best.how) == (pytest.approx(0.25), "compiled")
    assert verdict(on_gpu, "S10", "peak of the baseline step, bf16").met
    wrong = [on_gpu[0], changed(on_gpu[1], largest_difference=0.5)]
    assert verdict(wrong, "S8", "MFU, baseline, B 32").how == EAGER


def record(name: str, start: str, *rows: SpeedRow):
    return {"name": name, "start": start}, rows


def test_a_target_is_of_the_last_record_that_has_it_and_mixes_no_two():
    """The later loop has no form beside it: the earlier ratio stands. What both have is the later one's."""
    bare, harness = (row(form, 2.0, case=HARNESS) for form in ("bare loop", "harness"))
    early = record("early", "2026-01-01T00:00:00Z", row("loop", 70.0), row("vectorized", 1.0),
                   changed(harness, seconds=[1.0]), bare)  # fmt: skip
    late = record("late", "2026-01-02T00:00:00Z", row("loop", 9.0), changed(harness, seconds=[4.0]), bare)
    for order in ([early, late], [late, early]):
        known = [one for one in latest_verdicts(order) if one.value is not None]
        assert [(one.target.name, one.value, one.job) for one in known] == [
            ("S1", 70.0, "early"), ("S5", 2.0, "late"),
        ]  # fmt: skip


@pytest.mark.parametrize("broken", [{"error": "out of memory", "seconds": []}, {"largest_difference": 0.1}])
def test_a_target_that_failed_in_the_last_record_is_not_met_by_an_earlier_one(broken):
    loop, vectorized = row("loop", 70.0), row("vectorized", 1.0)
    early = record("early", "2026-01-01T00:00:00Z", loop, vectorized)
    late = record("late", "2026-01-02T00:00:00Z", loop, changed(vectorized, **broken))
    new = record("new", "2026-01-03T00:00:00Z", loop, vectorized)
    first = latest_verdicts([early, late])[0]
    assert (first.target.name, first.value, first.met, first.words) == ("S1", None, None, "failed")
    assert first.job == "late"
    first = latest_verdicts([early, late, new])[0]
    assert (first.value, first.job) == (70.0, "new")


def test_the_table_of_the_page_follows_from_the_committed_records():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "write it again: python -m tools.speed_targets"


def test_every_target_of_the_specification_is_there():
    assert {f"S{n}" for n in range(1, 11)} <= {target.name for target in (*CPU_TARGETS, *GPU_TARGETS)}


def test_a_form_over_its_floor():
    alone = row("vectorized", 3.0, case="static alone", device="cuda", floor_seconds=1.0, precision="bf16")
    compiled = changed(alone, form="compiled", seconds=[1.4])
    found = verdict([alone, compiled], "S7", "static / floor")
    assert (found.value, found.met, found.how) == (1.4, True, "compiled")
