"""What a better perplexity costs: against memory, throughput and parameters, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from bench.analysis.comparison import ComparisonRow
from bench.analysis.numbers import perplexities
from bench.analysis.over_seeds import Interval, Summary
from bench.analysis.plot_style import GREY, VERMILLION, Plot, shorten
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.study_plots.drawing import Scale, intervals, scale_of, set_scale
from bench.analysis.study_plots.frame import OTHERS, Frame

MIB = 2**20
BEYOND = 1e9  # a perplexity that no scale shows
MOST_CENSORED, ROW = 5, 0.065  # names a panel, more are counted; the height of each, of the panel's
COLUMNS = (
    "configuration", "seeds", "perplexity", "perplexity_low_95", "perplexity_high_95",
    "peak_memory_mebibytes", "peak_memory_low_95_mebibytes", "peak_memory_high_95_mebibytes",
    "tokens_per_second", "tokens_per_second_low_95", "tokens_per_second_high_95", "parameters",
    "on_memory_front", "on_throughput_front", "on_parameters_front", "out_of_memory", "status",
)  # fmt: skip
NOTE = (
    "Each point is the mean over seeds, its bars the 95 % t intervals of both (none for one seed). Grey "
    "steps and rings: the Pareto front of the means, whose order within the bars is not certain."
)


@dataclass(frozen=True)
class Quantity:
    """What perplexity is drawn against."""

    name: str
    axis: str
    summary: Callable[[ComparisonRow], Summary]
    more_is_better: bool = False
    edge: str = "right"
    """Where a run that ran out of memory lies."""


def _memory(row: ComparisonRow) -> Summary:
    return Summary({seed: value / MIB for seed, value in row.peak_memory_bytes.values.items()})


def _parameters(row: ComparisonRow) -> Summary:
    return Summary({} if row.parameters is None else {0: row.parameters / 1e6})


QUANTITIES = (
    Quantity("memory", "peak memory (MiB); less is better", _memory),
    Quantity("throughput", "tokens/s in training; more is better", lambda row: row.tokens_per_second,
             more_is_better=True, edge="left"),
    Quantity("parameters", "parameters (millions); fewer is better", _parameters, edge="top"),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A configuration in one panel: means, and their intervals where there are several seeds."""

    label: str
    x: float
    y: float
    x_ends: Interval | None
    y_ends: Interval | None


def pareto_plot(frame: Frame) -> Plot | None:
    """Return ``pareto``: a panel a quantity that was measured, or None without any."""
    panels = [(quantity, _points(frame, quantity)) for quantity in QUANTITIES]
    panels = [(quantity, points) for quantity, points in panels if points]
    if not panels:
        return None
    legend = frame.legend(lines=False)
    beyond = [frame.names[row.configuration.label] for row in frame.measured if _perplexity(row) >= BEYOND]
    lost = f"Not drawn, of a perplexity above {BEYOND:,.0f}: {', '.join(beyond[:3])}" if beyond else ""
    lost += f" and {len(beyond) - 3} more." if len(beyond) > 3 else "." if lost else ""
    figure = frame.figure("Perplexity against what it costs", 3.5 + legend.height, NOTE,
                          frame.about_looks(), lost)  # fmt: skip
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    fronts = {}
    for axes, (quantity, points) in zip(grid, panels, strict=True):
        fronts[quantity.name] = {point.label for point in front(points, quantity.more_is_better)}
        _draw(axes, frame, quantity, points)
    _scale_perplexity(grid[0], [point for _, points in panels for point in points], len(out_of_memory(frame)))
    for axes, (quantity, points) in zip(grid, panels, strict=True):
        _draw_front(axes, front(points, quantity.more_is_better), quantity.more_is_better)
        _draw_censored(axes, frame, quantity)
    grid[0].set_ylabel("perplexity = exp(mean loss); less is better")
    legend.below(figure)
    return Plot("pareto", figure, COLUMNS, _table(frame, fronts))


def front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """Return the points that no other one beats in both, from the cheapest on."""
    sign = -1 if more_is_better else 1
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (sign * point.x, point.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def out_of_memory(frame: Frame) -> list[ComparisonRow]:
    """Return the configurations of which no run counts and at least one ran out of memory."""
    return [row for row in frame.comparison.rows if row.loss.mean is None
            and any(run.status == "oom" for run in row.configuration.runs)]  # fmt: skip


def _points(frame: Frame, quantity: Quantity) -> list[Point]:
    found = []
    for row in frame.measured:
        summary = quantity.summary(row)
        if summary.mean is not None and _perplexity(row) < BEYOND:
            found.append(Point(row.configuration.label, summary.mean, _perplexity(row), summary.interval,
                               perplexities(row.loss.interval)))  # fmt: skip
    return found


def _perplexity(row: ComparisonRow) -> float:
    return exp_or_infinity(row.loss.mean) if row.loss.mean is not None else float("inf")


def _draw(axes: Axes, frame: Frame, quantity: Quantity, points: list[Point]) -> None:
    others = [point for point in points if point.label not in frame.looks]
    if others:
        _draw_bars(axes, others, colors=OTHERS, linewidths=0.6, zorder=1)
        axes.scatter([point.x for point in others], [point.y for point in others], s=9, color=OTHERS,
                     linewidth=0, zorder=1)  # fmt: skip
    for point in points:
        look = frame.looks.get(point.label)
        if look is not None:
            _draw_bars(axes, [point], colors=look.colour, linewidths=1.2, zorder=3)
            axes.plot(point.x, point.y, **look.of_marker(), zorder=4)
    axes.set_xlabel(quantity.axis)
    axes.set_title(f"against {quantity.name}", loc="left", fontweight="bold")
    beyond = [quantity.summary(row).mean for row in out_of_memory(frame)] if quantity.edge == "top" else []
    xs = [*(point.x for point in points), *(value for value in beyond if value is not None)]
    set_scale(axes, "x", scale_of(xs, [point.x_ends for point in points], ratio=8))


def _draw_bars(axes: Axes, points: list[Point], **settings: Any) -> None:
    intervals(axes, [point.y for point in points], [point.x_ends for point in points], **settings)
    ends = [point.y_ends for point in points]
    intervals(axes, [point.x for point in points], ends, vertical=True, **settings)


def _scale_perplexity(axes: Axes, points: list[Point], censored: int) -> None:
    """Set the common scale, with room above for the marks of what ran out of memory."""
    low, high, log = scale_of([point.y for point in points], [point.y_ends for point in points], ratio=3)
    room = ROW * (min(censored, MOST_CENSORED + 1) + 1.5) if censored else 0.0
    part = room / (1 - room)
    top = high * (high / low) ** part if log else high + (high - low) * part
    set_scale(axes, "y", Scale(low, top, log))


def _draw_front(axes: Axes, points: list[Point], more_is_better: bool) -> None:
    """Draw the front as steps: what can be had for each cost; a ring round each of its points."""
    edge = axes.get_xlim()[0 if more_is_better else 1]
    xs, ys = [points[0].x], [axes.get_ylim()[1]]
    for place, point in enumerate(points):
        following = points[place + 1].x if place + 1 < len(points) else edge
        xs += [point.x, following]
        ys += [point.y, point.y]
    axes.plot(xs, ys, color=GREY, linewidth=1, linestyle="--", zorder=1.5)
    axes.scatter([point.x for point in points], [point.y for point in points], s=110, facecolor="none",
                 edgecolor="black", linewidth=0.9, zorder=5)  # fmt: skip


def _draw_censored(axes: Axes, frame: Frame, quantity: Quantity) -> None:
    """Mark and name below the panel's upper edge, hollow, what ran out of memory."""
    rows = out_of_memory(frame)
    if not rows:
        return
    left = quantity.edge == "left"
    outer, side = (0.03, "left") if left else (0.97, "right")
    style: dict[str, Any] = {"fontsize": 7, "color": VERMILLION, "va": "center", "zorder": 6,
                             "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6}}  # fmt: skip
    axes.text(outer, 1 - 0.6 * ROW, "out of memory:", transform=axes.transAxes, ha=side, **style)
    for place, row in enumerate(rows[:MOST_CENSORED]):
        at, height = _place(axes, quantity, row, outer), 1 - ROW * (place + 1.6)
        to_right = left or at < 0.5
        axes.plot(at, height, marker={"right": ">", "left": "<", "top": "^"}[quantity.edge], markersize=6,
                  markerfacecolor="white", markeredgecolor=VERMILLION, transform=axes.transAxes,
                  linestyle="", zorder=6)  # fmt: skip
        name = shorten(frame.names[row.configuration.label], 26)
        axes.annotate(name, (at, height), xycoords="axes fraction", xytext=(7 if to_right else -7, 0),
                      textcoords="offset points", ha="left" if to_right else "right", **style)  # fmt: skip
    if len(rows) > MOST_CENSORED:
        text, height = f"and {len(rows) - MOST_CENSORED} more", 1 - ROW * (MOST_CENSORED + 1.6)
        axes.text(outer, height, text, transform=axes.transAxes, ha=side, **style)


def _place(axes: Axes, quantity: Quantity, row: ComparisonRow, outer: float) -> float:
    """Return where a mark stands, as a share of the width: at its own parameters, else outermost."""
    known = quantity.summary(row).mean if quantity.edge == "top" else None
    if known is None:
        return outer
    at = axes.transAxes.inverted().transform(axes.transData.transform((known, axes.get_ylim()[0])))
    return float(at[0])


def _table(frame: Frame, fronts: dict[str, set[str]]) -> list[list[Any]]:
    censored = {row.configuration.label for row in out_of_memory(frame)}
    rows = []
    failed = [row for row in frame.comparison.rows if row.loss.mean is None]
    for row in (*frame.measured, *failed):
        label, loss, memory, speed = row.configuration.label, row.loss, _memory(row), row.tokens_per_second
        rows.append([
            label, loss.n, None if loss.mean is None else exp_or_infinity(loss.mean),
            *(perplexities(loss.interval) or (None, None)), memory.mean, *(memory.interval or (None, None)),
            speed.mean, *(speed.interval or (None, None)), row.parameters,
            *(label in fronts.get(quantity.name, ()) for quantity in QUANTITIES), label in censored,
            row.configuration.statuses(),
        ])  # fmt: skip
    return rows
