"""Whole steps by the number of experts: throughput and peak memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.report.plots.style import Plot, headed_figure, log_ticks, plot_style, printable
from bench.speeding.figure import draw_line, ticks_by_size
from bench.speeding.rows import SpeedRow
from bench.speeding.targets import STEPS

NAME, TITLE = "steps", "A training step by the number of experts"
NOTE = (
    "Whole steps (forward, backward, clipping, update) with each coupler, in turn in one process. "
    "Throughput: tokens over all timed steps. Peak memory: tensors alive, model and optimizer included."
)
COLUMNS = ("model", "experts", "tokens", "tokens_per_second", "peak_mebibytes")
PANELS: tuple[tuple[str, Callable[[SpeedRow], float | None]], ...] = (
    ("tokens per second", lambda row: len(row.seconds) * row.tokens / sum(row.seconds)),
    ("peak memory (MiB)", lambda row: None if row.peak_bytes is None else row.peak_bytes / 2**20),
)


def steps_plot(rows: Sequence[SpeedRow], device: str) -> Plot | None:
    """Return the plot of what ``--whole-steps`` measured, or None where fewer than two E were timed.

    Of several other sizes it shows the one with the most E.
    """
    shown = [row for row in rows if row.case == STEPS and row.seconds and not row.error and not row.wrong]
    kinds = dict.fromkeys(map(_but_experts, shown))
    of_each = [[row for row in shown if _but_experts(row) == kind] for kind in kinds]
    of_one = max(of_each, key=_number_of_experts, default=[])
    if _number_of_experts(of_one) < 2:
        return None
    names = list(dict.fromkeys(row.form for row in of_one))
    with plot_style():
        first = of_one[0]
        size = f"D {first.width}, B {first.batch}, L {first.length}, layers {first.layers}"
        figure = headed_figure(TITLE, printable(f"{device}, {first.precision}, {size}"), [], 7.8, 3.4, NOTE)
        for axes, (label, value) in zip(figure.subplots(1, 2), PANELS, strict=True):
            of_all = [(row.form, row.experts, value(row)) for row in of_one]
            found = [[(x, y) for form, x, y in of_all if form == name and y is not None] for name in names]
            for number, (name, points) in enumerate(zip(names, found, strict=True)):
                draw_line(axes, sorted(points), number, name)
            ticks_by_size(axes, [row.experts for row in of_one], "experts E")
            heights = [y for points in found for _, y in points]
            if heights:
                log_ticks(axes, 0.8 * min(heights), 1.25 * max(heights))
            axes.set_ylabel(label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    table = [[row.form, row.experts, row.tokens, *(value(row) for _, value in PANELS)] for row in of_one]
    return Plot(NAME, figure, COLUMNS, table)


def _number_of_experts(rows: Sequence[SpeedRow]) -> int:
    return len({row.experts for row in rows})


def _but_experts(row: SpeedRow) -> tuple[object, ...]:
    return row.device, row.precision, row.batch, row.length, row.width, row.layers
