"""The project's speed targets S1 to S10, and what the committed records of bench.speed say of them.

    python -m tools.speed_targets    in the root of the repository: write the table into docs/performance.md

The product knows no targets. ``tests/bench/test_speed_targets.py`` holds the table against the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.files import between, write_between
from bench.record import number
from bench.speed.record import (
    BARE,
    FETCH,
    FILE,
    HARNESS,
    HARNESSED,
    SpeedRow,
    ratio,
    read_speed_record,
    spread,
)
from bench.speed.show import markdown
from bench.speed.suites import (
    AUTO,
    EAGER,
    EXPERTS,
    EXPERTS_16,
    GNN,
    GNN_SAVED,
    HGNN,
    LINEAR,
    LOOP,
    STEP_32,
    STEP_64_EXPERTS,
    STEP_256,
    STEP_LARGE,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS, PAGE = REPOSITORY / "results/reference/speed", REPOSITORY / "docs/performance.md"
MARKS = (
    "<!-- begin of what tools.speed_targets writes -->",
    "<!-- end of what tools.speed_targets writes -->",
)
Find = Callable[[str, str], SpeedRow | None]
"""From a case and a form to its row, None if it was not measured."""
Found = tuple[float, str] | None
"""A number and a word on how it came about; None if a row is missing."""
Unit = Literal["times", "share", "bytes"]


@dataclass(frozen=True)
class Target:
    """One line of the table: a number, and the limit from which on it is met."""

    name: str
    measure: str
    limit: float
    at_least: bool
    unit: Unit
    value: Callable[[Find], Found]


@dataclass(frozen=True)
class TargetVerdict:
    """A target and what was measured of it on a device, ``cpu`` or ``cuda``."""

    target: Target
    device: str
    value: float | None
    how: str = ""
    job: str = ""
    """Name of the record with the number, if there are several records."""
    failed: bool = False
    """There is no number, since a form failed or computes something else."""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit

    @property
    def words(self) -> str:
        """Met, or by which share of the target it is missed, as text."""
        if self.value is None:
            return "failed" if self.failed else "not measured"
        if self.met:
            return "met"
        share = self.value / self.target.limit
        times = max(share, 1 / share) if share else float("inf")
        return f"missed {times:.1f} times" if times >= 2 else f"missed by {abs(share - 1):.1%}"


def verdicts(rows: Sequence[SpeedRow]) -> list[TargetVerdict]:
    """Return every target with what the rows say: CPU targets by CPU rows, GPU targets by CUDA rows."""
    found = []
    for device, targets in (("cpu", CPU_TARGETS), ("cuda", GPU_TARGETS)):
        by_name = {(row.case, row.form): row for row in rows if row.device == device}
        for target in targets:
            broken: list[SpeedRow] = []

            def find(case: str, form: str, by_name=by_name, broken=broken) -> SpeedRow | None:
                row = by_name.get((case, form))
                if row is None or not (row.error or row.wrong):
                    return row
                broken.append(row)
                return None

            value, how = target.value(find) or (None, "")
            found.append(TargetVerdict(target, device, value, how, failed=value is None and bool(broken)))
    return found


def latest_verdicts(records: Sequence[tuple[dict[str, Any], Sequence[SpeedRow]]]) -> list[TargetVerdict]:
    """Return every target by the latest record that measured it; no number mixes two records."""
    found = verdicts([])
    for data, rows in sorted(records, key=lambda record: record[0]["start"]):
        found = [
            replace(new, job=data["name"]) if new.value is not None or new.failed else old
            for old, new in zip(found, verdicts(rows), strict=True)
        ]
    return found


def table(records: Sequence[tuple[dict[str, Any], Sequence[SpeedRow]]]) -> str:
    """Return the targets over all records as a table in Markdown."""
    cells = []
    for one in latest_verdicts(records):
        target, how = one.target, f", {one.how}" if one.how else ""
        limit = f"{'≥' if target.at_least else '≤'} {quantity(target.limit, target)}"
        measure = target.measure + how
        cells.append([target.name, measure, quantity(one.value, target), limit, one.words, one.job])
    return markdown(["", "measure", "measured", "target", "", "job"], cells)


def quantity(value: float | None, target: Target) -> str:
    """Return a value in the unit of its target."""
    if value is None:
        return "–"
    if target.unit == "share":
        return f"{100 * value:.3g} %"
    if target.unit == "bytes":
        return f"{value / 1e9:.3g} GB"
    return number(value, 3) if 0.5 < value < 2 and value != target.limit else f"{value:,.4g}"


def with_table(text: str) -> str:
    """Return the page's text with the table of the committed records between its marks."""
    records = [read_speed_record(path) for path in sorted(RECORDS.glob(f"*/{FILE}"))]
    return between(text, MARKS, table(records))


def _ratio(case: str, over: str, under: str) -> Callable[[Find], Found]:
    def value(find: Find) -> Found:
        one, other = find(case, over), find(case, under)
        found = ratio(one, other) if one and other else None
        if one is None or other is None or found is None:
            return None
        return found, spread(one, other)

    return value


def _saved(case: str, ours: str, theirs: str) -> Callable[[Find], Found]:
    def value(find: Find) -> Found:
        one, other = find(case, ours), find(case, theirs)
        if one is None or other is None or one.saved_bytes is None or not other.saved_bytes:
            return None
        if one.wrong or other.wrong:
            return None
        return one.saved_bytes / other.saved_bytes, ""

    return value


def _share_of_time(find: Find) -> Found:
    fetch, step = find(HARNESS, FETCH), find(HARNESS, HARNESSED)
    return (sum(fetch.seconds) / sum(step.seconds), "") if fetch and step and step.seconds else None


def _over(bound: str, case: str) -> Callable[[Find], Found]:
    """Return the best form's time over its floor or roofline."""

    def value(find: Find) -> Found:
        best = None
        for form in ("vectorized", "compiled"):
            row = find(case, form)
            under = getattr(row, f"{bound}_seconds", None)
            if row is None or row.wrong or row.median is None or not under:
                continue
            if best is None or row.median / under < best[0]:
                best = row.median / under, "compiled" if form == "compiled" else "eager"
        return best

    return value


def _mfu(case: str) -> Callable[[Find], Found]:
    """Return the best variant's share of the matrix rate."""

    def value(find: Find) -> Found:
        shares = {}
        for form in (EAGER, "compiled", "compiled, reduce-overhead"):
            row = find(case, form)
            share = row.mfu if row and not row.wrong else None
            if share is not None:
                shares[form] = share
        return max(((share, form) for form, share in shares.items()), default=None)

    return value


def _peak(case: str, form: str) -> Callable[[Find], Found]:
    def value(find: Find) -> Found:
        row = find(case, form)
        return (row.peak_bytes, "") if row and row.peak_bytes is not None and not row.wrong else None

    return value


CPU_TARGETS = (
    Target("S1", "HGNN: loop / vectorized", 60, True, "times", _ratio(HGNN, "loop", "vectorized")),
    Target("S1", "HGNN linear: loop / vectorized", 150, True, "times", _ratio(LINEAR, "loop", "vectorized")),
    Target("S2", "HGNN: pyg / vectorized", 2.5, True, "times", _ratio(HGNN, "pyg", "vectorized")),
    Target("S2", "HGNN linear: pyg / vectorized", 8, True, "times", _ratio(LINEAR, "pyg", "vectorized")),
    Target("S3", "GNN: pair by pair / vectorized", 2.5, True, "times",
           _ratio(GNN, "reference()", "vectorized")),
    Target("S3", "GNN, E 16: saved bytes, of pair by pair's", 1 / 8, False, "share",
           _saved(GNN_SAVED, "vectorized", "reference()")),
    Target("S4", "step on CPU: one by one / auto (the same)", 0.95, True, "times",
           _ratio(EXPERTS, "loop", AUTO)),
    Target("S5", "harness / bare loop", 1.02, False, "times", _ratio(HARNESS, HARNESSED, BARE)),
    Target("S6", "fetching a batch, of a step", 0.01, False, "share", _share_of_time),
)  # fmt: skip
GPU_TARGETS = (
    Target("S4", "step on GPU, E 4: one by one / auto", 3, True, "times", _ratio(EXPERTS, "loop", AUTO)),
    Target("S4", "step on GPU, E 16: one by one / auto", 3, True, "times", _ratio(EXPERTS_16, "loop", AUTO)),
    *(Target("S7", f"{name} / floor", 1.5, False, "times", _over("floor", f"{name} alone"))
      for name in ("static", "gate")),
    *(Target("S7", f"{name} / roofline", 1.6, False, "times", _over("roofline", f"{name} alone"))
      for name in ("HGNN", "HNHN", "GNN")),
    Target("S8", "MFU, baseline, B 32", 0.25, True, "share", _mfu(STEP_32)),
    Target("S8", "MFU, baseline, B 256", 0.35, True, "share", _mfu(STEP_256)),
    Target("S8", "MFU, D 512, E 8, L 256, B 64", 0.45, True, "share", _mfu(STEP_LARGE)),
    Target("S9", "HGNN on GPU: loop / vectorized", 1000, True, "times", _ratio(LOOP, "loop", "vectorized")),
    Target("S10", "peak of the baseline step, bf16", 3e9, False, "bytes", _peak(STEP_32, EAGER)),
    Target("S10", "peak of a step at E 64", 40e9, False, "bytes", _peak(STEP_64_EXPERTS, EAGER)),
)  # fmt: skip


if __name__ == "__main__":
    write_between(PAGE, with_table)
