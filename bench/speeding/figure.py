"""What a coupler costs by the number of experts and of tokens, beside the floor. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.plots.style import (
    LINE_COLOURS,
    LINE_STYLES,
    Plot,
    headed_figure,
    log_ticks,
    plot_style,
    printable,
)  # fmt: skip
from bench.speeding.rows import SpeedRow
from bench.speeding.targets import CURVE

NAME, TITLE = "cost", "What a coupler costs alone"
NOTE = (
    "Forward + backward, median of the steps timed; couplers of one size in turn in one process. Floor: "
    "expert outputs and gradients read and written once, at the copy bandwidth measured in the same process."
)
COLUMNS = ("subject", "experts", "tokens", "milliseconds", "bytes_floor_milliseconds")
MARKERS = "os^Dv<>Pxh"


def cost_plot(rows: Sequence[SpeedRow], device: str) -> Plot | None:
    """Return the plot of the default forms, or None where nothing was timed at more than one size.

    Of a suite its curve alone is shown. One panel by E at the number of tokens that most rows have, one by
    N at such a number of experts.
    """
    of_a_curve = any(row.case == CURVE for row in rows)
    shown = [row for row in rows if row.floor_bytes is not None and row.median is not None and not row.wrong
             and row.form == "vectorized" and (row.case == CURVE or not of_a_curve)]  # fmt: skip
    panels = [
        (by, label, of)
        for by, label, other in (("experts", "experts E", "tokens"), ("tokens", "tokens N", "experts"))
        if (of := _panel(shown, by, other))
    ]
    if not panels:
        return None
    with plot_style():
        first = shown[0]
        title = f"{device}, {first.precision}, D {first.width}"
        figure = headed_figure(TITLE, printable(title), [], 3.6 * len(panels) + 0.6, 3.4, NOTE)
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        names = list(dict.fromkeys(row.subject for row in shown))
        for axes, (by, label, of) in zip(every, panels, strict=True):
            other = f"N {of[0].tokens:,}" if by == "experts" else f"E {of[0].experts}"
            _draw(axes, of, names, lambda row, by=by: getattr(row, by), f"{label}  ({other})")
        every[0].set_ylabel("forward + backward (ms)")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3 * len(panels), len(labels)))
    table = [[row.subject, row.experts, row.tokens, 1e3 * (row.median or 0), _floor(row)] for row in shown]
    return Plot(NAME, figure, COLUMNS, table)


def _panel(rows: Sequence[SpeedRow], by: str, other: str) -> list[SpeedRow]:
    """Return the rows along ``by`` at the value of ``other`` that has most of its values, if it has two."""
    values = {(getattr(row, other), getattr(row, by)) for row in rows}
    if not values:
        return []
    kept, count = Counter(value for value, _ in values).most_common(1)[0]
    of = {(row.subject, getattr(row, by)): row for row in rows if getattr(row, other) == kept}
    return sorted(of.values(), key=lambda row: getattr(row, by)) if count > 1 else []


def _draw(
    axes: Axes, rows: list[SpeedRow], names: list[str], x: Callable[[SpeedRow], int], label: str
) -> None:
    for number, name in enumerate(names):
        own = [(x(row), 1e3 * (row.median or 0)) for row in rows if row.subject == name]
        draw_line(axes, own, number, name)
    floors = {x(row): _floor(row) for row in rows}
    axes.plot(
        list(floors),
        list(floors.values()),
        color="black",
        linewidth=2.4,
        linestyle="--",
        label="floor by bytes",
    )
    ticks_by_size(axes, [x(row) for row in rows], label)
    values = [1e3 * (row.median or 0) for row in rows] + list(floors.values())
    log_ticks(axes, 0.8 * min(values), 1.25 * max(values))


def draw_line(axes: Axes, points: Sequence[tuple[float, float]], number: int, name: str) -> None:
    """Draw the line of one coupler, the ``number``-th, through its points."""
    axes.plot(
        [x for x, _ in points], [y for _, y in points], marker=MARKERS[number % 10], markersize=4,
        color=LINE_COLOURS[number % 6], linestyle=LINE_STYLES[number // 6 % 4], label=name,
    )  # fmt: skip


def ticks_by_size(axes: Axes, sizes: Sequence[int], label: str) -> None:
    """Make the x axis logarithmic, with a tick at each size."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel(label)


def _floor(row: SpeedRow) -> float:
    return 1e3 * (row.bytes_floor_seconds or 0.0)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"
