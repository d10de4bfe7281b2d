"""The measured tables of a page, made of records and written between two marks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.files import between, write_between
from bench.speeding.rows import SpeedRow, derived
from bench.speeding.table import compact, failure_of, heading, verdict_cells
from bench.speeding.targets import CURVE, PARITY, latest_verdicts

BEGIN, END = (
    "<!-- begin of what bench.speed --page writes -->",
    "<!-- end of what bench.speed --page writes -->",
)
Records = Sequence[tuple[dict[str, Any], list[SpeedRow]]]


def write_page(path: Path, records: Records) -> None:
    """Put the tables of ``records`` between the marks of a page.

    Raises:
        Refused: the page cannot be read or written, or has no such marks.
    """
    write_between(path, lambda text: with_tables(text, records))


def with_tables(text: str, records: Records) -> str:
    """Return a page's text with these tables between its marks.

    Raises:
        Refused: it has no such marks.
    """
    return between(text, (BEGIN, END), tables(records))


def tables(records: Records) -> str:
    """Return the targets over all records, and the rows of each, in Markdown."""
    found = latest_verdicts(records)
    cells = [[*cells, one.job] for one, cells in zip(found, verdict_cells(found), strict=True)]
    parts = [_markdown(["", "measure", "measured", "target", "", "job"], cells)]
    for data, rows in records:
        parts += [
            _origin(data),
            *(_markdown(*table) for table in (_couplers(rows), _steps(rows)) if table[1]),
        ]
        parts += [f"- {failure}\n" for failure in map(failure_of, rows) if failure]
        if data["left_out"]:
            parts.append(f"Left out for want of time: {'; '.join(data['left_out'])}.\n")
    return "\n".join(parts)


def _origin(data: dict[str, Any]) -> str:
    environment, machine = data["environment"], data["machine"]
    threads = f", {environment['threads']} threads" if environment["device_type"] == "cpu" else ""
    device, measured = machine.get("device", "no device"), "nothing was measured"
    if machine.get("copy_bytes_per_second"):
        rates = ", ".join(f"{value / 1e12:,.3g} TFLOP/s in {precision}"
                          for precision, value in machine["matrix_flops_per_second"].items())  # fmt: skip
        measured = f"copies {machine['copy_bytes_per_second'] / 1e9:,.3g} GB/s, multiplies {rates}"
    return (
        f"Job `{data['name']}`: **{device}**{threads}, torch {environment['packages']['torch']}, "
        f"{data['start'][:10]}: {measured}. `{data['command']}`\n"
    )


def _couplers(rows: Sequence[SpeedRow]) -> tuple[list[str], list[list[str]]]:
    names = ["coupler", "form", "ms", "forward ms", "floor ms", "× floor", "× roofline", "loop / it",
             "pyg / it", "saved MiB"]  # fmt: skip
    found = []
    for row in rows:
        if row.floor_bytes is None or row.case == CURVE or not row.seconds:
            continue
        more = derived(row, rows)
        values = (more["median_ms"], more["forward_ms"], more["floor_ms"], more["over_floor"],
                  more["over_roofline"], more["loop_over_this"], more["pyg_over_this"],
                  None if row.saved_bytes is None else row.saved_bytes / 2**20)  # fmt: skip
        found.append([heading(row), row.form, *map(compact, values)])
    return names, found


def _steps(rows: Sequence[SpeedRow]) -> tuple[list[str], list[list[str]]]:
    names = ["training step", "form", "ms", "loop / it", "tokens/s", "MFU", "peak MiB"]
    found = []
    for row in rows:
        if row.floor_bytes is not None or row.case == PARITY or not row.seconds:
            continue
        more = derived(row, rows)
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
        found.append([heading(row), row.form, compact(more["median_ms"]), compact(more["loop_over_this"]),
                      compact(more["tokens_per_second"]),
                      _mfu(more["mfu"]), compact(peak)])  # fmt: skip
    return names, found


def _mfu(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.1%}" + (", over the products timed" if share > 1 else "")


def _markdown(headings: list[str], cells: list[list[str]]) -> str:
    return tabulate(cells, headings, tablefmt="github", disable_numparse=True) + "\n"
