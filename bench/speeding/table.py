"""Rows and targets as tables of 80 columns. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from bench.report.quantities import number
from bench.report.terminal import PlainTable
from bench.speeding.rows import SpeedRow, derived
from bench.speeding.targets import CURVE, PARITY, Target, TargetVerdict, unmeasured_targets

Cell = Callable[[SpeedRow, dict[str, Any]], str]
MIB, NONE = 2**20, ""


def compact(value: float | None) -> str:
    """Return a number with three digits that count: 0.0123, 1.23, 12.3, 1,230."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return number(value, digits)


TIME: dict[str, Cell] = {
    "form": lambda row, _: row.form,
    "fwd ms": lambda _, found: _short(found["forward_ms"]),
    "ms": lambda _, found: _short(found["median_ms"]),
    "floor": lambda _, found: _short(found["floor_ms"]),
    "×floor": lambda _, found: _short(found["over_floor"]),
    "×roof": lambda _, found: _short(found["over_roofline"]),
    "loop/it": lambda _, found: _short(found["loop_over_this"]),
    "pyg/it": lambda _, found: _short(found["pyg_over_this"]),
    "off by": lambda row, _: "" if row.largest_difference is None else f"{row.largest_difference:.0e}",
    "n": lambda row, _: str(len(row.seconds)),
}
MEMORY: dict[str, Cell] = {
    "form": lambda row, _: row.form,
    "peak MiB": lambda row, _: _in(MIB, row.peak_bytes),
    "saved MiB": lambda row, _: _in(MIB, row.saved_bytes),
    "moved at least MiB": lambda row, _: _in(MIB, row.floor_bytes),
    "GFLOP": lambda row, _: _in(1e9, row.flops),
    "first call s": lambda row, _: compact(row.first_seconds),
}
STEPS: dict[str, Cell] = {
    "form": lambda row, _: row.form,
    "ms": lambda _, found: compact(found["median_ms"]),
    "loop/it": lambda _, found: compact(found["loop_over_this"]),
    "tokens/s": lambda _, found: number(found["tokens_per_second"], 0),
    "MFU": lambda _, found: "" if found["mfu"] is None else f"{found['mfu']:.1%}",
    "peak MiB": lambda row, _: _in(MIB, row.peak_bytes),
    "off by": lambda row, _: "" if row.largest_difference is None else f"{row.largest_difference:.0e}",
    "first s": lambda row, _: compact(row.first_seconds),
    "n": lambda row, _: str(len(row.seconds)),
}


def one_line(row: SpeedRow) -> str:
    """Return a row as it is shown while others are measured."""
    if row.error:
        return f"{heading(row)}, {row.form}: {row.error}"
    time = f"{compact(1e3 * row.median)} ms" if row.median is not None else "not timed"
    bounds = [f"{name} {compact(1e3 * value)}" for name, value in
              (("floor", row.floor_seconds), ("roofline", row.roofline_seconds)) if value]  # fmt: skip
    off = [] if row.largest_difference is None else [f"off by {row.largest_difference:.0e}"]
    return f"{heading(row)}, {row.form}: {', '.join([time, *bounds, *off])}"


def print_rows(rows: Sequence[SpeedRow], console: Console) -> None:
    """Print what was measured: couplers as a table of times and one of memory, then whole steps."""
    shown = [row for row in rows if row.case not in (CURVE, PARITY)]
    couplers = [row for row in shown if row.floor_bytes is not None]
    steps = [row for row in shown if row.floor_bytes is None and row.form]
    in_memory = [row for row in couplers if row.saved_bytes is not None or row.peak_bytes is not None]
    for title, columns, some in (
        ("forward + backward of couplers alone, medians", TIME, couplers),
        ("memory of couplers alone, beyond inputs and parameters", MEMORY, in_memory),
        ("whole training steps, medians", STEPS, steps),
    ):
        if some:
            console.print(f"\n{title}", style="bold", markup=False)
            _print([(row, derived(row, rows)) for row in some], columns, console)
    if any(row.case == CURVE for row in rows):
        _print_curve([row for row in rows if row.case == CURVE], console)
    if any(row.case == PARITY for row in rows):
        _print_parity([row for row in rows if row.case == PARITY], console)
    for row in rows:
        for note in _notes(row):
            console.print(note, markup=False)


def _print(
    rows: Sequence[tuple[SpeedRow, dict[str, Any]]], columns: dict[str, Cell], console: Console
) -> None:
    """Print a table for each case and size, with columns of the same width."""
    lines = [(row, {name: cell(row, found) for name, cell in columns.items()}) for row, found in rows]
    widths = {name: max(len(name), *(len(cells[name]) for _, cells in lines))
              for name in columns if any(cells[name] for _, cells in lines)}  # fmt: skip
    for (_, place), group in groupby(lines, lambda line: (line[0].case, heading(line[0]))):
        console.print(place, style="italic", markup=False)
        table = PlainTable()
        for name, width in widths.items():
            if name == "form":
                table.add_column(name, ratio=1)
            else:
                table.add_column(name, justify="right", width=width)
        for _, cells in group:
            table.add_row(*(cells[name] for name in widths))
        console.print(table)


def heading(row: SpeedRow) -> str:
    """Return what was measured, at which size and precision, and on what."""
    return f"{row.subject}, {row.size}, {row.precision}, {row.device}" if row.batch else row.subject


def _notes(row: SpeedRow) -> list[str]:
    """Return what to know of a row: an error, a remark, a wrong result."""
    texts = [f"{_named(row)}: {row.remark}"] if row.remark else []
    return [f"- {text}" for text in (*texts, failure_of(row)) if text]


def failure_of(row: SpeedRow) -> str:
    """Return why a row's time does not count: an error or a wrong result; empty where it does."""
    wrong = f"WRONG by {row.largest_difference:.0e}: its time does not count" if row.wrong else ""
    why = "; ".join(filter(None, (row.error, wrong)))
    return f"{_named(row)}: {why}" if why else ""


def _named(row: SpeedRow) -> str:
    return f"{heading(row)}, {row.form}" if row.form else row.subject


def _print_curve(rows: Sequence[SpeedRow], console: Console) -> None:
    console.print("\nforward + backward by experts and tokens, ms", style="bold")
    names, table = list(dict.fromkeys(row.subject for row in rows if row.form)), PlainTable()
    for column in ("E", "N", *names, "bytes' floor"):
        table.add_column(column, justify="right")
    for (experts, tokens), group in groupby(rows, lambda row: (row.experts, row.tokens)):
        found = {row.subject: row for row in group}
        values = ["failed" if found[name].error else compact(derived(found[name], rows)["median_ms"])
                  if name in found else "" for name in names]  # fmt: skip
        floor = next((row.bytes_floor_seconds for row in found.values()), None)
        table.add_row(str(experts), f"{tokens:,}", *values, compact(None if floor is None else 1e3 * floor))
    console.print(table)


def _print_parity(rows: Sequence[SpeedRow], console: Console) -> None:
    good = [row for row in rows if not row.wrong and not row.error]
    console.print(f"\nparity: {len(good)} of {len(rows)} agree on {rows[0].device}", style="bold")


def print_verdicts(verdicts: Sequence[TargetVerdict], console: Console) -> None:
    """Print the targets: what was measured, what was asked for, whether it is met; then what was not."""
    measured = [one for one in verdicts if one.value is not None or one.failed]
    console.print("\ntargets", style="bold")
    table = PlainTable()
    for column, justify in (("", "left"), ("measure", "left"), ("measured", "right"), ("target", "right"),
                             ("", "left")):  # fmt: skip
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for cells in verdict_cells(measured):
        table.add_row(*cells)
    if measured:
        console.print(table)
    missing = unmeasured_targets(verdicts)
    if missing:
        console.print(f"not measured here: {missing}", markup=False)


def verdict_cells(verdicts: Sequence[TargetVerdict]) -> list[list[str]]:
    """Return the table of the targets as texts: number, measure, measured, target, verdict."""
    found = []
    for one in verdicts:
        how = f", {one.how}" if one.how else ""
        found.append([one.target.name, one.target.measure + how, quantity(one.value, one.target),
                      f"{'≥' if one.target.at_least else '≤'} {quantity(one.target.limit, one.target)}",
                      one.words])  # fmt: skip
    return found


def quantity(value: float | None, target: Target) -> str:
    """Return a value in its target's unit."""
    if value is None:
        return "–"
    if target.unit == "share":
        return f"{100 * value:.3g} %"
    if target.unit == "bytes":
        return f"{value / 1e9:.3g} GB"
    return number(value, 3) if 0.5 < value < 2 and value != target.limit else f"{value:,.4g}"


def _short(value: float | None) -> str:
    """Return a number in at most six characters up to ten million: a hundred thousand is 100k."""
    return compact(value) if value is None or value < 1e5 else f"{value / 1e3:,.0f}k"


def _in(unit: float, value: float | None) -> str:
    return NONE if value is None else compact(value / unit)
