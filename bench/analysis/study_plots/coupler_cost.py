"""What a coupler adds to a training step, beside what its FLOPs would take at the model's own rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.analysis.comparison import Comparison, ComparisonRow
from bench.analysis.marginal import CostOverMean
from bench.analysis.numbers import MINUS, number, span
from bench.analysis.over_seeds import Summary
from bench.analysis.plot_style import BLUE, VERMILLION, Plot
from bench.analysis.study_plots.drawing import Scale, intervals, set_scale, stripes, value_range
from bench.analysis.study_plots.frame import Frame, Legend
from bench.record import is_measured

MOST_ROWS = 80
COLUMNS = (
    "configuration", "mean_coupler_configuration", "seeds_paired", "added_step_milliseconds",
    "added_step_low_95_milliseconds", "added_step_high_95_milliseconds", "floor_milliseconds",
    "added_training_flops_per_token", "mean_coupler_flops_per_second",
)  # fmt: skip
NOTE = (
    "Measured: median training step less that of the same model with the mean coupler, paired by seed, with "
    "the 95 % t interval (none for one seed); of separate runs, unless the configuration is marked as timed "
    "in turn. Floor: added training FLOPs a token × tokens a step ÷ the FLOP rate that the mean coupler's "
    "model itself reached in training."
)
MEASURED = "measured: step less the mean coupler's, 95 % t interval over seeds"
FLOOR = "floor: if the coupler's FLOPs ran at the mean-coupler model's own rate"


@dataclass(frozen=True)
class Added:
    """What one configuration adds to a step of its mean coupler."""

    row: ComparisonRow
    cost: CostOverMean
    milliseconds: Summary
    floor: float | None
    """Milliseconds."""
    rate: float | None
    """FLOPs a second that the model with the mean coupler reached in training."""


def coupler_cost_plot(frame: Frame) -> Plot | None:
    """Return ``coupler_cost``, or None where no step was timed beside a mean coupler's."""
    added = [one for row in frame.measured if (one := added_cost(row, frame.comparison)) is not None]
    added.sort(key=lambda one: one.milliseconds.mean or 0.0)
    if not added:
        return None
    shown = added if len(added) <= MOST_ROWS else [*added[: MOST_ROWS // 2], *added[-MOST_ROWS // 2 :]]
    left_out = len(added) - len(shown)
    rest = f"{left_out} configurations between the cheapest and the dearest: table only." if left_out else ""
    step = 0.28 if len(shown) <= 30 else 0.2
    figure = frame.figure("What a coupler adds to a training step", step * len(shown) + 1.0, NOTE, rest)
    axes = figure.subplots()
    _draw(axes, frame, shown, 8 if step > 0.2 else 7)
    Legend([
        Line2D([], [], color="black", linewidth=1.6, marker="o", markerfacecolor=BLUE, label=MEASURED),
        Line2D([], [], color=VERMILLION, linestyle="", marker="|", markersize=11, markeredgewidth=2.4,
               label=FLOOR),
    ]).below(figure)  # fmt: skip
    return Plot("coupler_cost", figure, COLUMNS, [_cells(one) for one in added])


def added_cost(row: ComparisonRow, comparison: Comparison) -> Added | None:
    """Return what a row's coupler adds to a step, None where no seed was timed beside its mean coupler."""
    if row.cost is None:
        return None
    if not row.cost.added_seconds.n:
        return None
    mean = next((one for one in comparison.rows if one.configuration is row.cost.mean), None)
    floor, rate = (None, None) if mean is None else _floor(row.cost, mean)
    added = Summary({seed: 1e3 * value for seed, value in row.cost.added_seconds.values.items()})
    return Added(row, row.cost, added, floor, rate)


def _floor(cost: CostOverMean, mean: ComparisonRow) -> tuple[float | None, float | None]:
    """Return in milliseconds added FLOPs × tokens a step ÷ rate, and the rate: FLOPs × tokens ÷ step."""
    step, flops, tokens = mean.step_seconds.mean, mean.flops_per_token, tokens_a_step(mean)
    if step is None or not flops or tokens is None or cost.flops_per_token is None:
        return None, None
    rate = flops * tokens / step
    return 1e3 * cost.flops_per_token * tokens / rate, rate


def tokens_a_step(row: ComparisonRow) -> float | None:
    """Return the tokens of the median timed step of a configuration's first run that was timed."""
    for run in row.configuration.counted.values():
        if is_measured(run.record.speed):
            tokens = run.record.speed.step_tokens
            return sorted(tokens)[len(tokens) // 2]
    return None


def _draw(axes: Axes, frame: Frame, shown: list[Added], size: int) -> None:
    means = [one.milliseconds.mean or 0.0 for one in shown]
    ends = [one.milliseconds.interval for one in shown]
    floors = [(place, one.floor) for place, one in enumerate(shown) if one.floor is not None]
    known = [0.0, *means, *(floor for _, floor in floors)]
    set_scale(axes, "x", Scale(*value_range(known, ends)))
    axes.axvline(0, color="black", linewidth=1)
    intervals(axes, range(len(shown)), ends, colors="black", linewidths=1.6, zorder=3)
    axes.scatter(means, range(len(shown)), s=30, color=BLUE, edgecolor="black", linewidth=0.6, zorder=4)
    if floors:
        places, values = zip(*floors, strict=True)
        axes.scatter(values, places, marker="|", s=120, color=VERMILLION, linewidth=2.4, zorder=3.5)
    axes.set_yticks(range(len(shown)), [_name(frame, one) for one in shown], fontsize=size)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    stripes(axes, len(shown))
    axes.set_xlabel("added to the median training step (ms)")
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.set_yticks(range(len(shown)), [_words(one) for one in shown], fontsize=size - 0.5)
    beside.tick_params(axis="y", length=0)
    beside.grid(False)


def _name(frame: Frame, one: Added) -> str:
    turn = ", in turn" if one.cost.in_turn else ""
    return f"{frame.names[one.row.configuration.label]}  n {one.milliseconds.n}{turn}"


def _words(one: Added) -> str:
    ends = span(one.milliseconds.interval, 1)
    text = f"{number(one.milliseconds.mean, 1)} ms{f' {ends}' if ends else ''}"
    return text if one.floor is None else f"{text} · floor {one.floor:,.3g} ms".replace("-", MINUS)


def _cells(one: Added) -> list[Any]:
    found = one.milliseconds
    return [one.row.configuration.label, one.cost.over, found.n, found.mean,
            *(found.interval or (None, None)), one.floor, one.cost.flops_per_token, one.rate]  # fmt: skip
