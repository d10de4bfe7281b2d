"""Plots of the cost of couplers over a study.

``pareto``: the paired difference of perplexity against memory, step time and parameters. ``coupler_cost``:
the time that a coupler adds to a training step, beside that of its FLOPs. ``memory``: peak memory by part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.record import exp_or_infinity, is_measured, number
from bench.report.comparison import Comparison, ComparisonRow, CostOverMean
from bench.report.plots.frame import (
    Frame,
    Scale,
    intervals,
    mean_and_ends,
    name_rows,
    scale_of,
    set_scale,
    shifted,
    shifts_apart,
    value_range,
    write_beside,
)
from bench.report.plots.run import PARTS, draw_parts
from bench.report.plots.style import GREY, LIGHT, Look, Plot
from bench.report.quantities import (
    PARAMETERS,
    PEAK_MEMORY,
    STEP_SECONDS,
    TRAINING_FLOPS,
    Interval,
    Quantity,
    span,
)
from bench.report.statistics import Summary

PARETO_COLUMNS = (
    "configuration seeds difference_percent difference_low_95_percent difference_high_95_percent "
    "peak_memory_mebibytes step_time_percent step_time_low_95_percent step_time_high_95_percent parameters "
    "on_memory_front on_step_time_front on_parameters_front status"
).split()
MARK_POINTS = 7.0
MEMORY, STEP_TIME, SIZE = "peak memory (MiB)", "step time over the baseline (%)", "parameters (millions)"


@dataclass(frozen=True)
class Point:
    """A configuration in one panel: its cost and its quality, with intervals if there are several seeds."""

    label: str
    x: float
    y: float
    x_ends: Interval | None = None
    y_ends: Interval | None = None


def pareto_plot(frame: Frame) -> Plot | None:
    """Return ``pareto`` with a panel for each cost that differs; None where none differs by 2%.

    Quality is the perplexity over the baseline's in percent. Quality and step time are paired by seed.
    """
    quality = {row.configuration.label: _quality(row, frame) for row in frame.measured}
    costs = {
        MEMORY: {row.configuration.label: _mean(row, PEAK_MEMORY) for row in frame.measured},
        STEP_TIME: {row.configuration.label: _step_time(row, frame) for row in frame.measured},
        SIZE: {row.configuration.label: _mean(row, PARAMETERS) for row in frame.measured},
    }
    panels = {name: points for name, cost in costs.items() if (points := _points(quality, cost, name))}
    if not panels:
        return None
    subject = f"What does a lower perplexity than {frame.baseline} cost?"
    note = (
        "Lower left is better. Dashed: no other configuration is better in both. Bars: 95% intervals, paired."
    )
    figure = frame.figure(subject, 4.2, note, frame.about_looks())
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    every = [point for points in panels.values() for point in points]
    y_scale = Scale(*value_range([0.0, *(one.y for one in every)], [one.y_ends for one in every]))
    fronts = {name: front(points) for name, points in panels.items()}
    for axes, (name, points) in zip(grid, panels.items(), strict=True):
        set_scale(axes, "y", y_scale)
        _draw_points(axes, frame, points)
        _draw_front(axes, fronts[name])
        axes.set_xlabel(name)
    grid[0].set_ylabel("perplexity over the baseline (%)")
    _key(grid[-1], frame)
    return Plot("pareto", figure, PARETO_COLUMNS, _pareto_table(frame, quality, costs, fronts))


def _percent(log_ratio: float) -> float:
    return 100 * (exp_or_infinity(log_ratio) - 1)


Reading = tuple[float, Interval | None]


def _of_log_ratios(found: Summary) -> Reading | None:
    """Return the mean ratio less 1 in percent, with its interval."""
    if found.mean is None:
        return None
    ends = found.interval
    return _percent(found.mean), None if ends is None else (_percent(ends[0]), _percent(ends[1]))


def _quality(row: ComparisonRow, frame: Frame) -> Reading | None:
    if row.configuration is frame.comparison.reference:
        return 0.0, None
    reading = None if row.against is None else _of_log_ratios(Summary(row.against.by_seed))
    return reading if reading and math.isfinite(reading[0]) else None


def _step_time(row: ComparisonRow, frame: Frame) -> Reading | None:
    """Return the step time over the baseline's: timed beside it in one process, else paired by seed."""
    reference = frame.comparison.reference
    if row.configuration is reference:
        return 0.0, None
    if row.cost is not None and row.cost.in_turn and reference.coupler == "mean":
        return _of_log_ratios(row.cost.log_step_time_ratio)
    beside = next(one for one in frame.comparison.rows if one.configuration is reference)
    ours, theirs = row.means[STEP_SECONDS].values, beside.means[STEP_SECONDS].values
    return _of_log_ratios(
        Summary({s: math.log(ours[s] / theirs[s]) for s in sorted(ours.keys() & theirs.keys())})
    )


def _mean(row: ComparisonRow, quantity: Quantity) -> Reading | None:
    value = row.model[quantity] if quantity.of_model else row.means[quantity].mean
    return None if value is None else (value * quantity.scale, None)


def _points(quality: dict[str, Reading | None], cost: dict[str, Reading | None], name: str) -> list[Point]:
    """Return the configurations with both readings; none where all costs are within 2%."""
    found = [
        Point(label, x[0], y[0], x[1], y[1])
        for label, y in quality.items()
        if y is not None and (x := cost[label]) is not None
    ]
    least, most = min((one.x for one in found), default=0.0), max((one.x for one in found), default=0.0)
    differs = most > 1.02 * least
    if name == STEP_TIME:  # the time of a single run says nothing
        differs = most - least > 1 and any(one.x_ends for one in found)
    return found if len(found) > 1 and differs else []


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both quantities, the cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


def _draw_points(axes: Axes, frame: Frame, points: list[Point]) -> None:
    set_scale(axes, "x", scale_of([one.x for one in points], [one.x_ends for one in points], ratio=8))
    axes.axhline(0, color="black", lw=0.8, zorder=1)
    coloured = [one for one in points if one.label in frame.looks]
    for one in points:
        if one not in coloured:
            axes.plot(one.x, one.y, ".", ms=4, color=LIGHT, zorder=1)
    shifts = shifts_apart(axes, [(one.x, one.y) for one in coloured], MARK_POINTS)
    for one, shift in zip(coloured, shifts, strict=True):
        look = frame.looks[one.label]
        bars = {"colors": look.colour, "linewidths": 1.0, "zorder": 3, "alpha": 0.7, "shift": shift}
        intervals(axes, [one.y], [one.x_ends], **bars)
        intervals(axes, [one.x], [one.y_ends], vertical=True, **bars)
        axes.plot(
            one.x, one.y, ls="", transform=shifted(axes, shift), **look.of_marker(MARK_POINTS), zorder=4
        )


def _draw_front(axes: Axes, points: list[Point]) -> None:
    """Draw the best perplexity for each cost as dashed steps."""
    places = [point.x for point in points] + [axes.get_xlim()[1]]
    heights = [point.y for point in points] + [points[-1].y]
    axes.step(places, heights, where="post", color=GREY, lw=1, ls="--", zorder=1.5)


def _key(axes: Axes, frame: Frame) -> None:
    """Name the looks beside the last panel, the best configuration first."""
    shown = [row.configuration for row in frame.measured if row.configuration.label in frame.looks]
    handles = [
        Line2D([], [], ls="", label=frame.name(one), **frame.looks[one.label].of_marker()) for one in shown
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0, fontsize=7.5)


def _pareto_table(
    frame: Frame,
    quality: dict[str, Reading | None],
    costs: dict[str, dict[str, Reading | None]],
    fronts: dict[str, list[Point]],
) -> list[list[Any]]:
    on_front = {name: {point.label for point in points} for name, points in fronts.items()}
    rows = []
    for row in frame.measured:
        label = row.configuration.label
        better, time = (one or (None, None) for one in (quality[label], costs[STEP_TIME][label]))
        cells = [*(better[:1]), *(better[1] or (None, None)), (costs[MEMORY][label] or (None,))[0]]
        cells += [time[0], *(time[1] or (None, None)), row.model[PARAMETERS]]
        ends = [label in on_front.get(name, ()) for name in costs]
        rows.append([label, row.loss.n, *cells, *ends, row.configuration.statuses()])
    return rows


MOST_ROWS = 80
ADDED_COLUMNS = (
    "configuration mean_coupler_configuration seeds_paired added_step_milliseconds "
    "added_step_low_95_milliseconds added_step_high_95_milliseconds floor_milliseconds "
    "added_training_flops_per_token mean_coupler_flops_per_second"
).split()
ADDED_NOTE = (
    "Marks: median step minus the step with the mean coupler, 95% interval. Grey: the added FLOPs at the "
    "rate of the model with the mean coupler."
)


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
    """Return ``coupler_cost``; None where no step was timed beside a mean coupler's, or one seed."""
    found = [added_cost(row, frame.comparison) for row in frame.measured]
    added = [one for one in found if one and (one.milliseconds.n > 1 or one.cost.in_turn)]
    added.sort(key=lambda one: one.milliseconds.mean or 0.0)
    if not added:
        return None
    shown = added if len(added) <= MOST_ROWS else [*added[: MOST_ROWS // 2], *added[-MOST_ROWS // 2 :]]
    left_out = len(added) - len(shown)
    rest = f"{left_out} configurations between the cheapest and the dearest: table only." if left_out else ""
    turns = {one.cost.in_turn for one in added}
    how = "Both timed alternating in one process." if turns == {True} else "Timed in separate runs."
    how = how if len(turns) == 1 else "* timed in separate runs."
    size = 8 if len(shown) <= 30 else 7
    height = (0.28 if size == 8 else 0.2) * len(shown) + 0.7
    figure = frame.figure(
        "How much time does a coupler add to a training step?", height, ADDED_NOTE, how, rest
    )
    axes = figure.subplots()
    names = [frame.names[one.row.configuration.label] for one in shown]
    stars = [" *" * (len(turns) > 1 and not one.cost.in_turn) for one in shown]
    name_rows(axes, [f"{name}{star}" for name, star in zip(names, stars, strict=True)], size)
    _draw_added(axes, shown, size)
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


def _draw_added(axes: Axes, shown: list[Added], size: float) -> None:
    means = [one.milliseconds.mean or 0.0 for one in shown]
    ends = [one.milliseconds.interval for one in shown]
    floors = [(place, one.floor) for place, one in enumerate(shown) if one.floor is not None]
    known = [0.0, *means, *(floor for _, floor in floors)]
    set_scale(axes, "x", Scale(*value_range(known, ends)))
    axes.axvline(0, color="black", lw=1)
    intervals(axes, range(len(shown)), ends, colors="black", linewidths=1.6, zorder=3)
    if floors:
        places, values = zip(*floors, strict=True)
        axes.scatter(values, places, marker="|", s=120, color=GREY, linewidth=2.4, zorder=3.5)
    for place, one in enumerate(shown):
        look = Look.of(one.row.configuration.coupler)
        axes.plot(one.milliseconds.mean or 0.0, place, ls="", **look.of_marker(), zorder=4)
    axes.set_xlabel("added to the median training step (ms)")
    write_beside(axes, [_words(one) for one in shown], size - 0.5)


def _words(one: Added) -> str:
    ends = span(one.milliseconds.interval, 1)
    text = f"{number(one.milliseconds.mean, 1)} ms{f' {ends}' if ends else ''}"
    return text if one.floor is None else f"{text}; by FLOPs {number(one.floor, 1)} ms"


def _cells(one: Added) -> list[Any]:
    label, found, cost = one.row.configuration.label, one.milliseconds, one.cost
    return [label, cost.over, found.n, *mean_and_ends(found), one.floor, cost.flops_per_token, one.rate]


MEMORY_COLUMNS = ("configuration", "seeds", *(f"{part}_mebibytes" for part in PARTS), "total_mebibytes")


def memory_plot(frame: Frame) -> Plot | None:
    """Return ``memory``, the peak by part; None where it was not measured or differs by less than 1%."""
    found = [(row, parts) for row in frame.measured if (parts := _by_part(row))]
    totals = [sum(parts.values()) for _, parts in found]
    if len(found) < 2 or max(totals) <= 1.01 * min(totals):
        return None
    found = sorted(found, key=lambda one: sum(one[1].values()))[:MOST_ROWS]
    size = 8 if len(found) <= 30 else 7
    height = (0.28 if size == 8 else 0.2) * len(found) + 1.0
    figure = frame.figure("How much memory does a training step take, by part?", height)
    axes = figure.subplots()
    name_rows(axes, [frame.name(row.configuration) for row, _ in found], size)
    draw_parts(axes, [parts for _, parts in found])
    table = [
        [
            row.configuration.label,
            row.loss.n,
            *(parts[part] / 2**20 for part in PARTS),
            sum(parts.values()) / 2**20,
        ]
        for row, parts in found
    ]
    return Plot("memory", figure, MEMORY_COLUMNS, table)


def _by_part(row: ComparisonRow) -> dict[str, float]:
    """Return bytes at the peak by part, the mean over seeds; empty where a run did not measure them."""
    memories = [run.record.memory for run in row.configuration.counted.values()]
    parts = [one.by_part for one in memories if is_measured(one) and is_measured(one.by_part)]
    if not parts or len(parts) < len(memories):
        return {}
    return {part: float(np.mean([one.get(part, 0) for one in parts])) for part in PARTS}
