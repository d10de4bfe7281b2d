"""The targets S1 to S10 and what was measured of them, from rows alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.speeding.rows import SpeedRow, mfu, ratio, spread

Find = Callable[[str, str], SpeedRow | None]
"""From a case and a form to its row, None where it was not measured."""
Unit = Literal["times", "share", "bytes"]

HGNN, LINEAR, GNN, GNN_SAVED = "HGNN", "HGNN linear", "GNN", "GNN, E 16"
EXPERTS, EXPERTS_16, HARNESS = "experts", "experts, E 16", "harness"
STEP_32, STEP_256, STEP_LARGE, STEP_64_EXPERTS = "step B 32", "step B 256", "step D 512", "step E 64"
LOOP = "HGNN, token by token"
CURVE, PARITY, STEPS = "curve", "parity", "steps"
ALONE = ("static", "gate", "HGNN", "HNHN", "GNN")
EAGER, AUTO, CHUNKED, PLAIN = "eager", "auto", "chunked head", "plain head"

HARNESSED, BARE, FETCH = "harness", "bare loop", "fetching a batch"


@dataclass(frozen=True)
class Target:
    """One line of the table: a number, and from where on it is met."""

    name: str
    measure: str
    limit: float
    at_least: bool
    unit: Unit
    value: Callable[[Find], tuple[float, str] | None]
    """The number and how it came about in a word, or None where a row is missing."""


@dataclass(frozen=True)
class TargetVerdict:
    """A target and what was measured on a device, ``cpu`` or ``cuda``."""

    target: Target
    device: str
    value: float | None
    how: str = ""
    job: str = ""
    """Name of the record that it is from, where there are several."""
    failed: bool = False
    """No number, since a form that it needs failed, or computes something else."""

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit

    @property
    def words(self) -> str:
        """Met, or by which share of the target it is missed."""
        if self.value is None:
            return "failed" if self.failed else "not measured"
        if self.met:
            return "met"
        share = self.value / self.target.limit
        times = max(share, 1 / share) if share else float("inf")
        return f"missed {times:.1f} times" if times >= 2 else f"missed by {abs(share - 1):.1%}"


def verdicts(rows: Sequence[SpeedRow]) -> list[TargetVerdict]:
    """Return every target with what the rows say of it: CPU targets by CPU rows, GPU ones by CUDA rows."""
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
    """Return every target as the last of the records that tried it says; no figure mixes two records."""
    found = verdicts([])
    for data, rows in sorted(records, key=lambda record: record[0]["start"]):
        found = [replace(new, job=data["name"]) if new.value is not None or new.failed else old
                 for old, new in zip(found, verdicts(rows), strict=True)]  # fmt: skip
    return found


def unmeasured_targets(verdicts: Sequence[TargetVerdict]) -> str:
    """Return which targets were not measured, and what measures them; empty where all were."""
    parts = []
    for device, suite in (("cpu", "cpu"), ("cuda", "gpu")):
        own = [one for one in verdicts if one.device == device]
        missing = [one for one in own if one.value is None and not one.failed]
        if missing:
            partly = {one.target.name for one in own if one.value is not None}
            texts = [one.target.name + (f" {one.target.measure}" if one.target.name in partly else "")
                     for one in missing]  # fmt: skip
            parts.append(f"{', '.join(dict.fromkeys(texts))} (--suite {suite})")
    return "; ".join(parts)


def _ratio(case: str, over: str, under: str) -> Callable[[Find], tuple[float, str] | None]:
    def value(find: Find) -> tuple[float, str] | None:
        one, other = find(case, over), find(case, under)
        found = ratio(one, other) if one and other else None
        if one is None or other is None or found is None:
            return None
        return found, spread(one, other)

    return value


def _saved(case: str, ours: str, theirs: str) -> Callable[[Find], tuple[float, str] | None]:
    def value(find: Find) -> tuple[float, str] | None:
        one, other = find(case, ours), find(case, theirs)
        if one is None or other is None or one.saved_bytes is None or not other.saved_bytes:
            return None
        if one.wrong or other.wrong:
            return None
        return one.saved_bytes / other.saved_bytes, ""

    return value


def _share_of_time(find: Find) -> tuple[float, str] | None:
    fetch, step = find(HARNESS, FETCH), find(HARNESS, HARNESSED)
    return (sum(fetch.seconds) / sum(step.seconds), "") if fetch and step and step.seconds else None


def _over(bound: str, case: str) -> Callable[[Find], tuple[float, str] | None]:
    """Return the best form's time over its floor or roofline."""

    def value(find: Find) -> tuple[float, str] | None:
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


def _mfu(case: str) -> Callable[[Find], tuple[float, str] | None]:
    """Return the best variant's share of the matrix rate."""

    def value(find: Find) -> tuple[float, str] | None:
        shares = {}
        for form in (EAGER, "compiled", "compiled, reduce-overhead"):
            row = find(case, form)
            share = mfu(row) if row and not row.wrong else None
            if share is not None:
                shares[form] = share
        return max(((share, form) for form, share in shares.items()), default=None)

    return value


def _peak(case: str, form: str) -> Callable[[Find], tuple[float, str] | None]:
    def value(find: Find) -> tuple[float, str] | None:
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
