"""Plots of the cost of couplers over a study.

``pareto``: perplexity against memory, throughput and parameters, with the Pareto front. ``coupler_cost``: the
time that a coupler adds to a training step, beside a floor by its FLOPs. ``experts``: memory, throughput and
step time against the number of experts, with a line for each coupler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.record import MINUS, exp_or_infinity, is_measured, number
from bench.report.comparison import Comparison, ComparisonRow, CostOverMean
from bench.report.plots.frame import (
    OTHERS,
    Frame,
    Legend,
    Look,
    Scale,
    beside,
    best_and_reference,
    hollow,
    intervals,
    looks,
    mean_and_ends,
    name_rows,
    scale_of,
    set_scale,
    short_names,
    value_range,
    write_beside,
)
from bench.report.plots.style import BLUE, GREY, VERMILLION, Plot, log_ticks, shorten
from bench.report.quantities import (
    PARAMETERS,
    PEAK_MEMORY,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINING_FLOPS,
    Interval,
    Quantity,
    perplexities,
    span,
)
from bench.report.statistics import Summary
from bench.study.labels import Key, labels

BEYOND = 1e9
"""A perplexity that no scale shows."""
MOST_CENSORED, ROW = 5, 0.065
"""Names of configurations out of memory in a panel, and the height of each as a share of the panel's."""
PARETO_COLUMNS = (
    "configuration seeds perplexity perplexity_low_95 perplexity_high_95 peak_memory_mebibytes "
    "peak_memory_low_95_mebibytes peak_memory_high_95_mebibytes tokens_per_second "
    "tokens_per_second_low_95 tokens_per_second_high_95 parameters on_memory_front on_throughput_front "
    "on_parameters_front out_of_memory status"
).split()
PARETO_NOTE = (
    "Each point is the mean over seeds, its bars the 95% t intervals of both (none for one seed). Grey "
    "steps and rings: the Pareto front of the means, whose order within the bars is not certain."
)


COSTS = {"memory": PEAK_MEMORY, "throughput": TOKENS_PER_SECOND, "parameters": PARAMETERS}
"""What perplexity is drawn against, by the title of the panel."""


def on_axis(row: ComparisonRow, quantity: Quantity) -> Summary:
    """Return a quantity of a configuration in the unit of its axis."""
    if quantity.of_model:
        value = row.model[quantity]
        return Summary({} if value is None else {0: value * quantity.scale})
    return Summary({seed: value * quantity.scale for seed, value in row.means[quantity].values.items()})


@dataclass(frozen=True)
class Point:
    """A configuration in one panel: its means, with intervals if there are several seeds."""

    label: str
    x: float
    y: float
    x_ends: Interval | None
    y_ends: Interval | None


def pareto_plot(frame: Frame) -> Plot | None:
    """Return ``pareto`` with a panel for each quantity that was measured; None without any."""
    panels = {name: points for name, quantity in COSTS.items() if (points := _points(frame, quantity))}
    if not panels:
        return None
    legend = frame.legend(lines=False)
    beyond = [frame.names[row.configuration.label] for row in frame.measured if _perplexity(row) >= BEYOND]
    lost = f"Not drawn, of a perplexity above {BEYOND:,.0f}: {', '.join(beyond[:3])}" if beyond else ""
    lost += f" and {len(beyond) - 3} more." if len(beyond) > 3 else "." if lost else ""
    figure = frame.figure(
        "Perplexity against what it costs", 3.5 + legend.height, PARETO_NOTE, frame.about_looks(), lost
    )
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    fronts = {name: front(points, COSTS[name].better == "higher") for name, points in panels.items()}
    for axes, (name, points) in zip(grid, panels.items(), strict=True):
        _draw_points(axes, frame, name, points)
    _scale_perplexity(
        grid[0], [point for points in panels.values() for point in points], len(out_of_memory(frame))
    )
    for axes, name in zip(grid, panels, strict=True):
        _draw_front(axes, fronts[name], COSTS[name].better == "higher")
        _name_censored(axes, frame, COSTS[name])
    grid[0].set_ylabel("perplexity = exp(mean loss); lower is better")
    legend.below(figure)
    return Plot("pareto", figure, PARETO_COLUMNS, _pareto_table(frame, fronts))


def front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """Return the points that no other point beats in both quantities, the cheapest first."""
    sign = -1 if more_is_better else 1
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (sign * point.x, point.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def out_of_memory(frame: Frame) -> list[ComparisonRow]:
    """Return the configurations that ran out of memory and have no run that counts."""
    return [row for row in frame.comparison.rows if row.out_of_memory]


def _points(frame: Frame, quantity: Quantity) -> list[Point]:
    found = []
    for row in frame.measured:
        label, x, y = row.configuration.label, on_axis(row, quantity), _perplexity(row)
        if x.mean is not None and y < BEYOND:
            found.append(Point(label, x.mean, y, x.interval, perplexities(row.loss.interval)))
    return found


def _perplexity(row: ComparisonRow) -> float:
    return exp_or_infinity(row.loss.mean) if row.loss.mean is not None else float("inf")


def _draw_points(axes: Axes, frame: Frame, name: str, points: list[Point]) -> None:
    quantity = COSTS[name]
    others = [point for point in points if point.label not in frame.looks]
    if others:
        xs, ys = _coordinates(others)
        _draw_bars(axes, others, colors=OTHERS, linewidths=0.6, zorder=1)
        axes.scatter(xs, ys, s=9, color=OTHERS, linewidth=0, zorder=1)
    for point in points:
        look = frame.looks.get(point.label)
        if look is not None:
            _draw_bars(axes, [point], colors=look.colour, linewidths=1.2, zorder=3)
            axes.plot(point.x, point.y, **look.of_marker(), zorder=4)
    axes.set_xlabel(quantity.axis_label)
    axes.set_title(f"against {name}", loc="left", fontweight="bold")
    beyond = [on_axis(row, quantity).mean for row in out_of_memory(frame)] if quantity.of_model else []
    xs = [*(point.x for point in points), *(value for value in beyond if value is not None)]
    set_scale(axes, "x", scale_of(xs, [point.x_ends for point in points], ratio=8))


def _coordinates(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.y for point in points]


def _draw_bars(axes: Axes, points: list[Point], **settings: Any) -> None:
    xs, ys = _coordinates(points)
    intervals(axes, ys, [point.x_ends for point in points], **settings)
    intervals(axes, xs, [point.y_ends for point in points], vertical=True, **settings)


def _scale_perplexity(axes: Axes, points: list[Point], censored: int) -> None:
    """Set the common scale, with room at the top for the marks of configurations out of memory."""
    low, high, log = scale_of([point.y for point in points], [point.y_ends for point in points], ratio=3)
    room = ROW * (min(censored, MOST_CENSORED + 1) + 1.5) if censored else 0.0
    part = room / (1 - room)
    top = high * (high / low) ** part if log else high + (high - low) * part
    set_scale(axes, "y", Scale(low, top, log))


def _draw_front(axes: Axes, points: list[Point], more_is_better: bool) -> None:
    """Draw the front as steps, the best perplexity for each cost, with a ring around each of its points."""
    edge = axes.get_xlim()[0 if more_is_better else 1]
    xs, ys = [points[0].x], [axes.get_ylim()[1]]
    for place, point in enumerate(points):
        following = points[place + 1].x if place + 1 < len(points) else edge
        xs += [point.x, following]
        ys += [point.y, point.y]
    axes.plot(xs, ys, color=GREY, lw=1, ls="--", zorder=1.5)
    rings = {"facecolor": "none", "edgecolor": "black", "linewidth": 0.9}
    axes.scatter(*_coordinates(points), s=110, **rings, zorder=5)


def _name_censored(axes: Axes, frame: Frame, quantity: Quantity) -> None:
    """Mark and name the configurations out of memory, hollow, below the panel's upper edge."""
    rows = out_of_memory(frame)
    if not rows:
        return
    left = quantity.better == "higher"
    marker = "^" if quantity.of_model else "<" if left else ">"
    outer, side = (0.03, "left") if left else (0.97, "right")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style: dict[str, Any] = {"fontsize": 7, "color": VERMILLION, "va": "center", "zorder": 6, "bbox": box}
    axes.text(outer, 1 - 0.6 * ROW, "out of memory:", transform=axes.transAxes, ha=side, **style)
    for place, row in enumerate(rows[:MOST_CENSORED]):
        at, height = _place(axes, quantity, row, outer), 1 - ROW * (place + 1.6)
        hollow(axes, at, height, marker, VERMILLION, axes.transAxes)
        name = shorten(frame.names[row.configuration.label], 26)
        beside(axes, name, (at, height), 7 if left or at < 0.5 else -7, "axes fraction", **style)
    if len(rows) > MOST_CENSORED:
        text, height = f"and {len(rows) - MOST_CENSORED} more", 1 - ROW * (MOST_CENSORED + 1.6)
        axes.text(outer, height, text, transform=axes.transAxes, ha=side, **style)


def _place(axes: Axes, quantity: Quantity, row: ComparisonRow, outer: float) -> float:
    """Return where a mark stands, as a share of the width: at its number of parameters, else outermost."""
    known = on_axis(row, quantity).mean if quantity.of_model else None
    if known is None:
        return outer
    at = axes.transAxes.inverted().transform(axes.transData.transform((known, axes.get_ylim()[0])))
    return float(at[0])


def _pareto_table(frame: Frame, fronts: dict[str, list[Point]]) -> list[list[Any]]:
    on_front = {name: {point.label for point in points} for name, points in fronts.items()}
    rows = []
    for row in frame.ranked:
        label, loss = row.configuration.label, row.loss
        perplexity = None if loss.mean is None else exp_or_infinity(loss.mean)
        means = [on_axis(row, quantity) for quantity in (PEAK_MEMORY, TOKENS_PER_SECOND)]
        quality = [perplexity, *(perplexities(loss.interval) or (None, None))]
        ends = [label in on_front.get(name, ()) for name in COSTS]
        ends += [row.out_of_memory, row.configuration.statuses()]
        rows.append([label, loss.n, *quality, *mean_and_ends(*means), row.model[PARAMETERS], *ends])
    return rows


MOST_ROWS = 80
ADDED_COLUMNS = (
    "configuration mean_coupler_configuration seeds_paired added_step_milliseconds "
    "added_step_low_95_milliseconds added_step_high_95_milliseconds floor_milliseconds "
    "added_training_flops_per_token mean_coupler_flops_per_second"
).split()
ADDED_NOTE = (
    "Measured: median training step less that of the same model with the mean coupler, paired by seed, with "
    "the 95% t interval (none for one seed); of separate runs, unless the configuration is marked as timed "
    "in turn. Floor: added training FLOPs per token × tokens per step ÷ the FLOP rate that the mean "
    "coupler's model itself reached in training."
)
MEASURED = "measured: step less the mean coupler's, 95% t interval over seeds"
FLOOR = "floor: if the coupler's FLOPs ran at the mean-coupler model's own rate"


@dataclass(frozen=True)
class Added:
    """The time that a configuration adds to a step of its mean coupler."""

    row: ComparisonRow
    cost: CostOverMean
    milliseconds: Summary
    floor: float | None
    """In milliseconds."""
    rate: float | None
    """FLOPs per second that the model with the mean coupler reached in training."""


def coupler_cost_plot(frame: Frame) -> Plot | None:
    """Return ``coupler_cost``; None where no step was timed beside a mean coupler's."""
    added = [one for row in frame.measured if (one := added_cost(row, frame.comparison)) is not None]
    added.sort(key=lambda one: one.milliseconds.mean or 0.0)
    if not added:
        return None
    shown = added if len(added) <= MOST_ROWS else [*added[: MOST_ROWS // 2], *added[-MOST_ROWS // 2 :]]
    left_out = len(added) - len(shown)
    rest = f"{left_out} configurations between the cheapest and the dearest: table only." if left_out else ""
    step = 0.28 if len(shown) <= 30 else 0.2
    figure = frame.figure("What a coupler adds to a training step", step * len(shown) + 1.0, ADDED_NOTE, rest)
    axes = figure.subplots()
    _draw_added(axes, frame, shown, 8 if step > 0.2 else 7)
    measured, floor = (
        {"color": "black", "linewidth": 1.6, "marker": "o", "markerfacecolor": BLUE},
        {"color": VERMILLION, "linestyle": "", "marker": "|", "markersize": 11, "markeredgewidth": 2.4},
    )
    handles = [Line2D([], [], label=MEASURED, **measured), Line2D([], [], label=FLOOR, **floor)]
    Legend(handles).below(figure)
    return Plot("coupler_cost", figure, ADDED_COLUMNS, [_cells(one) for one in added])


def added_cost(row: ComparisonRow, comparison: Comparison) -> Added | None:
    """Return the time that a coupler adds to a step; None where no seed was timed beside its mean coupler."""
    if row.cost is None or not row.cost.added_seconds.n:
        return None
    mean = next((one for one in comparison.rows if one.configuration is row.cost.mean), None)
    floor, rate = (None, None) if mean is None else _floor(row.cost, mean)
    added = Summary({seed: 1e3 * value for seed, value in row.cost.added_seconds.values.items()})
    return Added(row, row.cost, added, floor, rate)


def _floor(cost: CostOverMean, mean: ComparisonRow) -> tuple[float | None, float | None]:
    """Return added FLOPs × tokens per step ÷ rate, in milliseconds, and the rate: FLOPs × tokens ÷ step."""
    step, flops = mean.means[STEP_SECONDS].mean, mean.model[TRAINING_FLOPS]
    tokens = tokens_a_step(mean)
    if step is None or not flops or tokens is None or cost.flops_per_token is None:
        return None, None
    rate = flops * tokens / step
    return 1e3 * cost.flops_per_token * tokens / rate, rate


def tokens_a_step(row: ComparisonRow) -> float | None:
    """Return the tokens of the median timed step of the first run that was timed."""
    for run in row.configuration.counted.values():
        if is_measured(run.record.speed):
            tokens = run.record.speed.step_tokens
            return sorted(tokens)[len(tokens) // 2]
    return None


def _draw_added(axes: Axes, frame: Frame, shown: list[Added], size: int) -> None:
    means = [one.milliseconds.mean or 0.0 for one in shown]
    ends = [one.milliseconds.interval for one in shown]
    floors = [(place, one.floor) for place, one in enumerate(shown) if one.floor is not None]
    known = [0.0, *means, *(floor for _, floor in floors)]
    set_scale(axes, "x", Scale(*value_range(known, ends)))
    axes.axvline(0, color="black", lw=1)
    intervals(axes, range(len(shown)), ends, colors="black", linewidths=1.6, zorder=3)
    axes.scatter(means, range(len(shown)), s=30, color=BLUE, edgecolor="black", linewidth=0.6, zorder=4)
    if floors:
        places, values = zip(*floors, strict=True)
        axes.scatter(values, places, marker="|", s=120, color=VERMILLION, linewidth=2.4, zorder=3.5)
    name_rows(axes, [_name(frame, one) for one in shown], size)
    axes.set_xlabel("added to the median training step (ms)")
    write_beside(axes, [_words(one) for one in shown], size - 0.5)


def _name(frame: Frame, one: Added) -> str:
    turn = ", in turn" if one.cost.in_turn else ""
    return f"{frame.names[one.row.configuration.label]}  n {one.milliseconds.n}{turn}"


def _words(one: Added) -> str:
    ends = span(one.milliseconds.interval, 1)
    text = f"{number(one.milliseconds.mean, 1)} ms{f' {ends}' if ends else ''}"
    return text if one.floor is None else f"{text} · floor {one.floor:,.3g} ms".replace("-", MINUS)


def _cells(one: Added) -> list[Any]:
    label, found, cost = one.row.configuration.label, one.milliseconds, one.cost
    return [label, cost.over, found.n, *mean_and_ends(found), one.floor, cost.flops_per_token, one.rate]


BY_EXPERTS = {
    "peak_memory_mebibytes": PEAK_MEMORY,
    "tokens_per_second": TOKENS_PER_SECOND,
    "step_milliseconds": STEP_SECONDS,
}
"""The quantities that are drawn against the number of experts, by their columns."""
EXPERTS_COLUMNS = ["configuration", "line", "num_experts", "seeds"]
EXPERTS_COLUMNS += [f"{name}{end}" for name in BY_EXPERTS for end in ("", "_low_95", "_high_95")]
EXPERTS_COLUMNS += ["out_of_memory", "status"]
MARK_ROOM, MOST_MARKS = 0.06, 10
"""The share of the axis' height for each mark of a line that ran out of memory, and the most marks."""
EXPERTS_NOTE = (
    "Means over the seeds that count, bars: 95% t intervals (none for one seed). Both axes are logarithmic: "
    "a straight line is a power of the number of experts."
)


@dataclass(frozen=True)
class Line:
    """Configurations that differ only in their number of experts, sorted by it."""

    name: str
    rows: list[ComparisonRow]

    @property
    def best(self) -> float:
        """The lowest mean loss of its configurations in nats; infinity without a loss."""
        return min((row.loss.mean for row in self.rows if row.loss.mean is not None), default=float("inf"))


def experts_plot(frame: Frame) -> Plot | None:
    """Return ``experts``; None where the number of experts does not vary or nothing was measured."""
    lines = lines_of(frame.comparison.rows)
    rows = [row for line in lines for row in line.rows]
    panels = [found for found in BY_EXPERTS.values() if any(row.means[found].n for row in rows)]
    if len({experts(row) for row in rows}) < 2 or not panels:
        return None
    chosen = frame.comparison.reference
    reference = next(line.name for line in lines for row in line.rows if row.configuration is chosen)
    ranked = [line.name for line in sorted(lines, key=lambda line: line.best)]
    known = looks([line.name for line in lines], reference, ranked)
    names = short_names([line.name for line in lines])
    names[reference] += " (reference)"
    entries = [(names[name], known[name]) for name in ranked if name in known]
    grey = len(lines) - len(known)
    legend = Legend.of(entries, others=grey)
    about = f"In colour: {best_and_reference(known)}; grey: {grey} others."
    figure = frame.figure("What more experts cost", 3.3 + legend.height, EXPERTS_NOTE, about if grey else "")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, quantity in zip(grid, panels, strict=True):
        _draw_lines(axes, lines, known, quantity)
    legend.below(figure)
    return Plot("experts", figure, EXPERTS_COLUMNS, _experts_table(lines))


def lines_of(rows: Sequence[ComparisonRow]) -> list[Line]:
    """Return the rows as lines over the number of experts; a line may have a single row.

    Rows of one line have equal flags, except for the number of experts. Their widths may differ if they
    follow from a match, and so may their hashes. If a line then had two rows with the same number of experts,
    the width, the code and the configuration separate the lines, in this order.
    """
    matched, number = {"num_experts", "ffn_dim"}, {"num_experts"}
    found: dict[Key, list[ComparisonRow]] = {}
    for apart, known in ((matched, 0), (number, 0), (number, 1), (number, 2)):  # by ever more of the key
        found = {}
        for row in rows:
            configuration, code = row.configuration.key
            text = json.dumps(_without(row, apart), sort_keys=True, default=str)
            own = configuration if known > 1 else hashlib.sha256(text.encode()).hexdigest()
            found.setdefault((own, code if known else None), []).append(row)
        if all(len({experts(row) for row in group}) == len(group) for group in found.values()):
            break
    groups = [sorted(group, key=experts) for group in found.values()]
    names = labels([_without(group[0], apart) for group in groups], list(found))
    return [Line(name, group) for name, group in zip(names, groups, strict=True)]


def experts(row: ComparisonRow) -> int:
    """Return the number of experts of a configuration."""
    return row.configuration.flags["num_experts"]


def _without(row: ComparisonRow, names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.configuration.flags.items() if name not in names}


def _draw_lines(axes: Axes, lines: list[Line], known: dict[str, Look], quantity: Quantity) -> None:
    values: list[float] = []
    for line in lines:
        look = known.get(line.name)
        found = [(experts(row), summary) for row in line.rows if (summary := on_axis(row, quantity)).n]
        xs, means = [x for x, _ in found], [summary.mean or 0.0 for _, summary in found]
        values += means
        if look is None:
            axes.plot(xs, means, color=OTHERS, lw=0.7, marker=".", ms=3, zorder=1)
            continue
        ends: list[Interval | None] = [_positive(summary) for _, summary in found]
        intervals(axes, xs, ends, vertical=True, colors=look.colour, linewidths=1.2, zorder=2)
        axes.plot(xs, means, **look.of_line(), **look.of_marker())
    censored, ceiling = _censored(lines), quantity.better == "lower"
    _scale(axes, lines, values, max(map(len, censored.values()), default=0), ceiling)
    better = "" if ceiling else " (higher is better)"
    axes.set_title(quantity.axis[:1].upper() + quantity.axis[1:] + better, loc="left", fontweight="bold")
    _mark_censored(axes, censored, known, ceiling)


def _scale(axes: Axes, lines: list[Line], values: list[float], marks: int, ceiling: bool) -> None:
    """Scale both axes, with room for ``marks`` at one number of experts, at the top or at the bottom."""
    numbers = sorted({experts(row) for line in lines for row in line.rows})
    log_ticks(axes, numbers[0] / 1.15, numbers[-1] * 1.15, "x")
    axes.xaxis.set_major_locator(FixedLocator(_spaced(numbers)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("number of experts")
    low, high = min(values) / 1.1, max(values) * 1.1
    room = MARK_ROOM * min(marks, MOST_MARKS + 1) + 0.02 * (marks > 0)
    stretch = (high / low) ** (room / (1 - room))
    log_ticks(axes, low if ceiling else low / stretch, high * stretch if ceiling else high)


def _positive(summary: Summary) -> Interval | None:
    """Return the interval, cut so that a logarithmic axis can show it."""
    ends = summary.interval
    return None if ends is None else (max(ends[0], 1e-3 * (summary.mean or 1.0)), ends[1])


def _spaced(numbers: list[int]) -> list[int]:
    """Return numbers whose ticks do not touch: each at least 1.2 times the number before."""
    found: list[int] = []
    for value in numbers:
        if not found or value >= 1.2 * found[-1]:
            found.append(value)
    return found


def _censored(lines: list[Line]) -> dict[int, list[Line]]:
    """Return the lines that ran out of memory, by number of experts."""
    found: dict[int, list[Line]] = {}
    for line in lines:
        for row in line.rows:
            if row.out_of_memory:
                found.setdefault(experts(row), []).append(line)
    return found


def _mark_censored(
    axes: Axes, censored: dict[int, list[Line]], known: dict[str, Look], ceiling: bool
) -> None:
    """Mark at the edge where each line ran out of memory, with the marker of the line but hollow."""
    transform = axes.get_xaxis_transform()

    def height(level: float) -> float:
        return 1 - MARK_ROOM * level if ceiling else MARK_ROOM * level

    for count, lines in censored.items():
        for level, line in enumerate(lines[:MOST_MARKS]):
            look = known.get(line.name, Look(OTHERS, "", "o"))
            hollow(axes, count, height(level + 0.5), look.marker, look.colour, transform)
        if len(lines) > MOST_MARKS:
            text, at = f"+{len(lines) - MOST_MARKS}", height(MOST_MARKS + 0.5)
            axes.text(count, at, text, ha="center", va="center", transform=transform, fontsize=7.5)
    if censored:
        at = (min(censored), height(0.5))
        beside(axes, "out of memory", at, -7, transform, va="center", fontsize=7.5, color=VERMILLION)


def _experts_table(lines: list[Line]) -> list[list[Any]]:
    table = []
    for name, row in ((line.name, row) for line in lines for row in line.rows):
        cells = mean_and_ends(*(on_axis(row, quantity) for quantity in BY_EXPERTS.values()))
        head = [row.configuration.label, name, experts(row), row.loss.n]
        table.append([*head, *cells, row.out_of_memory, row.configuration.statuses()])
    return table
