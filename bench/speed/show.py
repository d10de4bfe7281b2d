"""Rows shown: as tables of 80 columns, as plots, and as Markdown tables in a page. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tabulate import tabulate

from bench.files import between, write_between
from bench.record import number
from bench.report.plots.style import write_plots
from bench.report.terminal import PlainTable
from bench.speed.figures import cost_plot, steps_plot
from bench.speed.record import (
    BARE,
    CURVE,
    FETCH,
    HARNESS,
    HARNESSED,
    PARITY,
    Rows,
    SpeedRow,
    derived,
    ratio,
    read_speed_record,
    spread,
)

Column = Callable[[SpeedRow, dict[str, Any]], str]
"""From a row, and what follows from it, to the text of one column."""
SpeedRecords = Sequence[tuple[dict[str, Any], list[SpeedRow]]]
MIB = 2**20
NARROW = 72
"""Columns below which a table would break its numbers."""
MARKS = (
    "<!-- begin of what bench.speed --page writes -->",
    "<!-- end of what bench.speed --page writes -->",
)


def compact(value: float | None) -> str:
    """Return a number with three significant digits: 0.012, 1.23, 12.3, 1,230; empty if there is none."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return number(value, digits)


def _short(value: float | None) -> str:
    """Return a number in at most six characters up to ten million: a hundred thousand is 100k."""
    return compact(value) if value is None or value < 1e5 else f"{value / 1e3:,.0f}k"


def _in(unit: float, value: float | None) -> str:
    return "" if value is None else compact(value / unit)


def _off(row: SpeedRow) -> str:
    return "" if row.largest_difference is None else f"{row.largest_difference:.0e}"


TIME_COLUMNS: dict[str, Column] = {
    "form": lambda row, _: row.form,
    "fwd ms": lambda _, found: _short(found["forward_ms"]),
    "ms": lambda _, found: _short(found["median_ms"]),
    "floor": lambda _, found: _short(found["floor_ms"]),
    "×floor": lambda _, found: _short(found["over_floor"]),
    "×roof": lambda _, found: _short(found["over_roofline"]),
    "loop/it": lambda _, found: _short(found["loop_over_this"]),
    "pyg/it": lambda _, found: _short(found["pyg_over_this"]),
    "off by": lambda row, _: _off(row),
    "n": lambda row, _: str(len(row.seconds)),
}
MEMORY_COLUMNS: dict[str, Column] = {
    "form": lambda row, _: row.form,
    "peak MiB": lambda row, _: _in(MIB, row.peak_bytes),
    "saved MiB": lambda row, _: _in(MIB, row.saved_bytes),
    "moved at least MiB": lambda row, _: _in(MIB, row.floor_bytes),
    "GFLOP": lambda row, _: _in(1e9, row.flops),
    "first call s": lambda row, _: compact(row.first_seconds),
}
STEP_COLUMNS: dict[str, Column] = {
    "form": lambda row, _: row.form,
    "ms": lambda _, found: compact(found["median_ms"]),
    "loop/it": lambda _, found: compact(found["loop_over_this"]),
    "tokens/s": lambda _, found: number(found["tokens_per_second"], 0),
    "MFU": lambda _, found: "" if found["mfu"] is None else f"{found['mfu']:.1%}",
    "peak MiB": lambda row, _: _in(MIB, row.peak_bytes),
    "off by": lambda row, _: _off(row),
    "first s": lambda row, _: compact(row.first_seconds),
    "n": lambda row, _: str(len(row.seconds)),
}


# --- records ---------------------------------------------------------------------------------------


def print_records(places: Sequence[Path], console: Console, *, draw: bool, page: Path | None) -> None:
    """Print the tables of records, draw their plots, and put the tables into a page if one is named.

    Raises:
        Refused: a record or the page cannot be read or written.
    """
    records = [read_speed_record(place) for place in places]
    for place, (data, rows) in zip(places, records, strict=True):
        title = f"{data['name']}: {data['machine'].get('device')}, {data['start']}, {data['status']}"
        console.print(title, style="bold", markup=False)
        show(data, rows, console)
        if draw:
            write_plots_of(place if place.is_dir() else place.parent, data, rows, console)
    if page is not None:
        write_between(page, lambda text: with_tables(text, records))


def show(data: dict[str, Any], rows: Rows, console: Console) -> None:
    """Print the tables of a record, and what it has no time for."""
    print_rows(rows, console)
    if data["left_out"]:
        console.print(
            f"not measured, because the time budget ended: {'; '.join(data['left_out'])}", markup=False
        )


def write_plots_of(folder: Path, data: dict[str, Any], rows: Rows, console: Console) -> None:
    """Draw a record's rows into its folder, or say that there is nothing to draw."""
    device = data["machine"].get("device", "")
    plots = [plot for plot in (cost_plot(rows, device), steps_plot(rows, device)) if plot is not None]
    if not plots:
        console.print("no plot: fewer than two sizes were timed")
    write_plots(folder, plots)


# --- the terminal ----------------------------------------------------------------------------------


def one_line(row: SpeedRow) -> str:
    """Return a row as it is shown while other rows are measured."""
    if row.error:
        return f"{heading(row)}, {row.form}: {row.error}"
    parts = [f"{compact(1e3 * row.median)} ms" if row.median is not None else "not timed"]
    for name, value in (("floor", row.floor_seconds), ("roofline", row.roofline_seconds)):
        parts += [f"{name} {compact(1e3 * value)}"] if value else []
    parts += [f"off by {_off(row)}"] if _off(row) else []
    return f"{heading(row)}, {row.form}: {', '.join(parts)}"


def print_rows(rows: Rows, console: Console) -> None:
    """Print what was measured: times and memory of couplers, whole steps, the harness, and remarks."""
    shown = [row for row in rows if row.case not in (CURVE, PARITY)]
    couplers = [row for row in shown if row.floor_bytes is not None]
    steps = [row for row in shown if row.floor_bytes is None and row.form]
    in_memory = [row for row in couplers if row.saved_bytes is not None or row.peak_bytes is not None]
    for title, columns, some in (
        ("forward + backward of couplers alone, medians", TIME_COLUMNS, couplers),
        ("memory of couplers alone, beyond inputs and parameters", MEMORY_COLUMNS, in_memory),
        ("whole training steps, medians", STEP_COLUMNS, steps),
    ):
        if some:
            console.print(f"\n{title}", style="bold", markup=False)
            _print([(row, derived(row, rows)) for row in some], columns, console)
    if harness := harness_sentence(rows):
        console.print(f"\n{harness}", markup=False)
    if curve := [row for row in rows if row.case == CURVE]:
        _print_curve(curve, console)
    if parity := [row for row in rows if row.case == PARITY]:
        good = [row for row in parity if not row.wrong and not row.error]
        agreeing = f"{len(good)} of {len(parity)} agree on {parity[0].device}"
        console.print(f"\nparity: {agreeing}", style="bold", markup=False)
    for row in rows:
        remark = f"{_named(row)}: {row.remark}" if row.remark else ""
        for note in filter(None, (remark, failure_of(row))):
            console.print(f"- {note}", markup=False)


def _print(
    rows: Sequence[tuple[SpeedRow, dict[str, Any]]], columns: dict[str, Column], console: Console
) -> None:
    """Print a table for each case and size, with columns of the same width; sentences if it is narrow."""
    lines = [(row, {name: text(row, found) for name, text in columns.items()}) for row, found in rows]
    widths = {
        name: max(len(name), *(len(cells[name]) for _, cells in lines))
        for name in columns
        if any(cells[name] for _, cells in lines)
    }
    for (_, place), group in groupby(lines, lambda line: (line[0].case, heading(line[0]))):
        console.print(place, style="italic", markup=False)
        if console.width < NARROW:
            for _, cells in group:
                values = [f"{name} {cells[name]}" for name in widths if name != "form" and cells[name]]
                console.print(f"{cells['form']}: {', '.join(values)}", markup=False)
            continue
        table = PlainTable()
        for name, width in widths.items():
            if name == "form":
                table.add_column(name, ratio=1)
            else:
                table.add_column(name, justify="right", width=width)
        for _, cells in group:
            table.add_row(*(Text(cells[name]) for name in widths))
        console.print(table)


def heading(row: SpeedRow) -> str:
    """Return what was measured, at which size and precision, and on what."""
    return f"{row.subject}, {row.size}, {row.precision}, {row.device}" if row.batch else row.subject


def _named(row: SpeedRow) -> str:
    return f"{heading(row)}, {row.form}" if row.form else row.subject


def failure_of(row: SpeedRow) -> str:
    """Return why a row's time does not count: an error or a wrong result; empty if it counts."""
    wrong = f"WRONG by {row.largest_difference:.0e}: its time does not count" if row.wrong else ""
    why = "; ".join(filter(None, (row.error, wrong)))
    return f"{_named(row)}: {why}" if why else ""


def harness_sentence(rows: Rows) -> str:
    """Return what the harness costs beside a bare loop, and what fetching costs; empty if not measured."""
    by_form = {row.form: row for row in rows if row.case == HARNESS and not row.error}
    if not {HARNESSED, BARE, FETCH} <= by_form.keys():
        return ""
    ours, bare = by_form[HARNESSED], by_form[BARE]
    spreads, times = spread(ours, bare), ratio(ours, bare)
    if times is None:
        return ""
    found = f"{times:.3f} times a bare loop" + (f" ({spreads})" if spreads else "")
    share = sum(by_form[FETCH].seconds) / sum(ours.seconds)
    return f"the harness takes {found}; fetching a batch is {share:.2%} of a step"


def _print_curve(rows: Rows, console: Console) -> None:
    console.print("\nforward + backward by experts and tokens, ms", style="bold")
    names, table = list(dict.fromkeys(row.subject for row in rows if row.form)), PlainTable()
    for column in ("E", "N", *names, "bytes' floor"):
        table.add_column(Text(column), justify="right")
    for (experts, tokens), group in groupby(rows, lambda row: (row.experts, row.tokens)):
        found = {row.subject: row for row in group}
        values = ["" if name not in found else _curve_time(found[name]) for name in names]
        floor = next((row.bytes_floor_seconds for row in found.values()), None)
        table.add_row(str(experts), f"{tokens:,}", *values, _in(1e-3, floor))
    console.print(table)


def _curve_time(row: SpeedRow) -> str:
    return "failed" if row.error else _in(1e-3, row.median)


# --- a page ----------------------------------------------------------------------------------------


def with_tables(text: str, records: SpeedRecords) -> str:
    """Return a page's text with the tables of these records between its marks.

    Raises:
        Refused: the page has no such marks.
    """
    return between(text, MARKS, tables(records))


def tables(records: SpeedRecords) -> str:
    """Return the rows of each record as tables in Markdown."""
    parts = []
    for data, rows in records:
        found = (_coupler_table(rows), _step_table(rows))
        parts += [_origin(data), *(markdown(*table) for table in found if table[1])]
        parts += [f"- {failure}\n" for failure in map(failure_of, rows) if failure]
        if data["left_out"]:
            parts.append(f"Left out for want of time: {'; '.join(data['left_out'])}.\n")
    return "\n".join(parts)


def _origin(data: dict[str, Any]) -> str:
    environment, machine = data["environment"], data["machine"]
    threads = f", {environment['threads']} threads" if environment["device_type"] == "cpu" else ""
    measured = "nothing was measured"
    if machine.get("copy_bytes_per_second"):
        rates = [
            f"{value / 1e12:,.3g} TFLOP/s in {precision}"
            for precision, value in machine["matrix_flops_per_second"].items()
        ]
        measured = f"copies {machine['copy_bytes_per_second'] / 1e9:,.3g} GB/s, multiplies {', '.join(rates)}"
    return (
        f"Job `{data['name']}`: **{machine.get('device', 'no device')}**{threads}, "
        f"torch {environment['packages'].get('torch')}, {data['start'][:10]}: {measured}. "
        f"`{data['command']}`\n"
    )


def _coupler_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    names = ["coupler", "form", "ms", "forward ms", "floor ms", "× floor", "× roofline", "loop / it"]
    keys = ["median_ms", "forward_ms", "floor_ms", "over_floor", "over_roofline", "loop_over_this"]
    found = []
    for row in rows:
        if row.floor_bytes is not None and row.case != CURVE and row.seconds:
            more = derived(row, rows)
            texts = [compact(more[key]) for key in (*keys, "pyg_over_this")]
            found.append([heading(row), row.form, *texts, _in(MIB, row.saved_bytes)])
    return [*names, "pyg / it", "saved MiB"], found


def _step_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    found = []
    for row in rows:
        if row.floor_bytes is None and row.case != PARITY and row.seconds:
            more = derived(row, rows)
            texts = [compact(more[key]) for key in ("median_ms", "loop_over_this", "tokens_per_second")]
            found.append([heading(row), row.form, *texts, _mfu(row.mfu), _in(MIB, row.peak_bytes)])
    return ["training step", "form", "ms", "loop / it", "tokens/s", "MFU", "peak MiB"], found


def _mfu(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.1%}" + (", over the products timed" if share > 1 else "")


def markdown(headings: list[str], cells: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return tabulate(cells, headings, tablefmt="github", disable_numparse=True) + "\n"
