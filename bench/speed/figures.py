"""Two plots: couplers alone by E and by N beside the floor, and whole steps by E. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.plots.style import (
    Look,
    Plot,
    headed_figure,
    log_ticks,
    plot_style,
    printable,
)
from bench.speed.record import CURVE, STEPS, Rows, SpeedRow

COST_NAME, COST_TITLE = "cost", "How long does a coupler alone take?"
COST_NOTE = (
    "Forward + backward, median step; couplers of one size alternate in one process. Floor: expert outputs "
    "and gradients read and written once, at the measured copy bandwidth."
)
COST_COLUMNS = ("subject", "experts", "tokens", "milliseconds", "bytes_floor_milliseconds")
STEPS_NAME, STEPS_TITLE = "steps", "What do more experts cost in a training step?"
STEPS_NOTE = (
    "Whole steps (forward, backward, clipping, update); couplers alternate in one process. Peak memory: "
    "tensors alive, model and optimizer included."
)
LAYERS = {"HNHN": "HGNN"}
"""The coupler of a subject that has the name of its hypergraph layer."""
STEPS_COLUMNS = ("model", "experts", "tokens", "tokens_per_second", "peak_mebibytes")
STEPS_PANELS: tuple[tuple[str, Callable[[SpeedRow], float | None]], ...] = (
    ("tokens per second", lambda row: len(row.seconds) * row.tokens / sum(row.seconds)),
    ("peak memory (MiB)", lambda row: None if row.peak_bytes is None else row.peak_bytes / 2**20),
)

# --- couplers alone --------------------------------------------------------------------------------


def cost_plot(rows: Rows, device: str) -> Plot | None:
    """Return the plot of the default forms, or None if nothing was timed at more than one size.

    Of a suite only its curve is shown. One panel is by E, at the number of tokens that most rows have; the
    other is by N, at such a number of experts.
    """
    of_a_curve = any(row.case == CURVE for row in rows)
    shown = [
        row
        for row in rows
        if row.floor_bytes is not None
        and row.median is not None
        and not row.wrong
        and row.form == "vectorized"
        and (row.case == CURVE or not of_a_curve)
    ]
    panels = [
        (by, label, of)
        for by, label, other in (("experts", "experts E", "tokens"), ("tokens", "tokens N", "experts"))
        if (of := _panel(shown, by, other))
    ]
    if not panels:
        return None
    with plot_style():
        first = shown[0]
        title = printable(f"{device}, {first.precision}, D {first.width}")
        figure = headed_figure(COST_TITLE, title, [], 3.6 * len(panels) + 0.6, 3.4, COST_NOTE)
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        names = list(dict.fromkeys(row.subject for row in shown))
        for axes, (by, label, of) in zip(every, panels, strict=True):
            other = f"N {of[0].tokens:,}" if by == "experts" else f"E {of[0].experts}"
            _draw_costs(axes, of, names, by, f"{label}  ({other})")
        every[0].set_ylabel("forward + backward (ms)")
        _legend_below(figure, most_columns=3 * len(panels))
    table = [[row.subject, row.experts, row.tokens, _milliseconds(row), _floor(row)] for row in shown]
    return Plot(COST_NAME, figure, COST_COLUMNS, table)


def _panel(rows: Rows, by: str, other: str) -> list[SpeedRow]:
    """Return the rows along ``by`` at the value of ``other`` with most values of ``by``, if it has two."""
    values = {(getattr(row, other), getattr(row, by)) for row in rows}
    if not values:
        return []
    kept, count = Counter(value for value, _ in values).most_common(1)[0]
    of = {(row.subject, getattr(row, by)): row for row in rows if getattr(row, other) == kept}
    return sorted(of.values(), key=lambda row: getattr(row, by)) if count > 1 else []


def _draw_costs(axes: Axes, rows: list[SpeedRow], names: list[str], by: str, label: str) -> None:
    for name in names:
        points = [(getattr(row, by), _milliseconds(row)) for row in rows if row.subject == name]
        _draw_line(axes, points, names, name)
    floors = {getattr(row, by): _floor(row) for row in rows}
    axes.plot(
        list(floors),
        list(floors.values()),
        color="black",
        linewidth=2.4,
        linestyle="--",
        label="floor by bytes",
    )
    _ticks_by_size(axes, list(floors), label)
    values = [*map(_milliseconds, rows), *floors.values()]
    log_ticks(axes, 0.8 * min(values), 1.25 * max(values))


def _milliseconds(row: SpeedRow) -> float:
    return 1e3 * (row.median or 0)


def _floor(row: SpeedRow) -> float:
    return 1e3 * (row.bytes_floor_seconds or 0.0)


# --- whole steps -----------------------------------------------------------------------------------


def steps_plot(rows: Rows, device: str) -> Plot | None:
    """Return the plot of what ``--whole-steps`` measured, or None if fewer than two E were timed.

    If several other sizes were timed, the plot shows the one with the most E.
    """
    shown = [row for row in rows if row.case == STEPS and row.seconds and not row.error and not row.wrong]
    by_size: dict[tuple[object, ...], list[SpeedRow]] = {}
    for row in shown:
        size = row.device, row.precision, row.batch, row.length, row.width, row.layers
        by_size.setdefault(size, []).append(row)
    of_one = max(by_size.values(), key=_number_of_experts, default=[])
    if _number_of_experts(of_one) < 2:
        return None
    names = list(dict.fromkeys(row.form for row in of_one))
    with plot_style():
        first = of_one[0]
        size = f"D {first.width}, B {first.batch}, L {first.length}, layers {first.layers}"
        title = printable(f"{device}, {first.precision}, {size}")
        figure = headed_figure(STEPS_TITLE, title, [], 7.8, 3.4, STEPS_NOTE)
        for axes, (label, value) in zip(figure.subplots(1, 2), STEPS_PANELS, strict=True):
            of_all = [(row.form, row.experts, value(row)) for row in of_one]
            found = [[(x, y) for form, x, y in of_all if form == name and y is not None] for name in names]
            for name, points in zip(names, found, strict=True):
                _draw_line(axes, sorted(points), names, name)
            _ticks_by_size(axes, [row.experts for row in of_one], "experts E")
            heights = [y for points in found for _, y in points]
            if heights:
                log_ticks(axes, 0.8 * min(heights), 1.25 * max(heights))
            axes.set_ylabel(label)
        _legend_below(figure, most_columns=6)
    table = [
        [row.form, row.experts, row.tokens, *(value(row) for _, value in STEPS_PANELS)] for row in of_one
    ]
    return Plot(STEPS_NAME, figure, STEPS_COLUMNS, table)


def _number_of_experts(rows: Rows) -> int:
    return len({row.experts for row in rows})


# --- both ------------------------------------------------------------------------------------------


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], name: str) -> None:
    """Draw the line of one of ``names`` with the look of its coupler, its first word."""
    couplers = [LAYERS.get(other, other.split()[0]) for other in names]
    place = names.index(name)
    look = Look.of(couplers[place], couplers[:place].count(couplers[place]))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, **look.of_line(), **look.of_marker(4.5), label=name)  # also without a point: its name


def _ticks_by_size(axes: Axes, sizes: Sequence[int], label: str) -> None:
    """Make the x axis logarithmic, with a tick at each size."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k")
    )
    axes.set_xlabel(label)


def _legend_below(figure: Figure, most_columns: int) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(most_columns, len(labels)))
