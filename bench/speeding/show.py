"""Records shown: their tables in the terminal, their plots, a page's tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report.plots.style import write_plots
from bench.speeding.figure import cost_plot
from bench.speeding.page import write_page
from bench.speeding.record import read_speed_record
from bench.speeding.rows import SpeedRow
from bench.speeding.step_figure import steps_plot
from bench.speeding.table import print_rows, print_verdicts
from bench.speeding.targets import latest_verdicts, verdicts


def show(data: dict[str, Any], rows: Sequence[SpeedRow], console: Console, *, targets: bool = False) -> None:
    """Print the tables of a record, and what it says of the targets if asked."""
    print_rows(rows, console)
    if targets:
        print_verdicts(verdicts(rows), console)
    if data["left_out"]:
        console.print(f"left out for want of time: {'; '.join(data['left_out'])}", markup=False)


def write_plots_of(folder: Path, data: dict[str, Any], rows: Sequence[SpeedRow], console: Console) -> None:
    """Draw a record's rows into its folder; say so where there is nothing to draw."""
    device = data["machine"].get("device", "")
    plots = [plot for plot in (cost_plot(rows, device), steps_plot(rows, device)) if plot is not None]
    if not plots:
        console.print("no plot: fewer than two sizes were timed")
    write_plots(folder, plots)


def print_records(places: Sequence[Path], console: Console, *, draw: bool, page: Path | None) -> None:
    """Print records, their targets together, and put their tables into a page where one is named.

    Raises:
        Refused: a record or the page cannot be read or written.
    """
    records = [read_speed_record(place) for place in places]
    for place, (data, rows) in zip(places, records, strict=True):
        console.print(f"{data['name']}: {data['machine'].get('device')}, {data['start']}, {data['status']}",
                      style="bold", markup=False)  # fmt: skip
        show(data, rows, console)
        if draw:
            write_plots_of(place if place.is_dir() else place.parent, data, rows, console)
    print_verdicts(latest_verdicts(records), console)
    if page is not None:
        write_page(page, records)
