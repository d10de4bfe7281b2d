"""Memory, throughput and step time against the number of experts: a line a coupler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.analysis.comparison import ComparisonRow
from bench.analysis.over_seeds import Interval, Summary
from bench.analysis.plot_style import VERMILLION, Plot, log_ticks
from bench.analysis.study_plots.drawing import intervals
from bench.analysis.study_plots.frame import (
    OTHERS,
    Frame,
    Legend,
    Look,
    best_and_reference,
    looks,
    short_names,
)
from bench.study.labels import Key, labels

QUANTITIES = ("peak_memory_mebibytes", "tokens_per_second", "step_milliseconds")
AXES = ("Peak memory (MiB)", "Tokens/s in training (more is better)", "Median training step (ms)")
CEILING = (True, False, True)
"""Whether running out of memory lies at the top."""
COLUMNS = (
    "configuration", "line", "num_experts", "seeds",
    *(f"{name}{end}" for name in QUANTITIES for end in ("", "_low_95", "_high_95")),
    "out_of_memory", "status",
)  # fmt: skip
MARK_ROOM, MOST_MARKS = 0.06, 10  # of the axis' height for each mark of a line that ran out of memory
NOTE = (
    "Means over the seeds that count, bars: 95 % t intervals (none for one seed). Both axes are logarithmic: "
    "a straight line is a power of the number of experts."
)


@dataclass(frozen=True)
class Line:
    """Configurations that differ in their number of experts only, by that number."""

    name: str
    rows: list[ComparisonRow]

    @property
    def best(self) -> float:
        """The lowest mean loss of its configurations in nats, infinity without any."""
        return min((row.loss.mean for row in self.rows if row.loss.mean is not None), default=float("inf"))


def experts_plot(frame: Frame) -> Plot | None:
    """Return ``experts``, or None where the number of experts does not vary or nothing was measured."""
    lines = lines_of(frame.comparison.rows)
    panels = [place for place in range(3) if any(
        _summary(row, place).n for line in lines for row in line.rows)]  # fmt: skip
    if len({experts(row) for line in lines for row in line.rows}) < 2 or not panels:
        return None
    reference = next(line.name for line in lines if any(
        row.configuration is frame.comparison.reference for row in line.rows))  # fmt: skip
    ranked = [line.name for line in sorted(lines, key=lambda line: line.best)]
    known = looks([line.name for line in lines], reference, ranked)
    names = short_names([line.name for line in lines])
    names[reference] += " (reference)"
    entries = [(names[name], known[name]) for name in ranked if name in known]
    grey = len(lines) - len(known)
    legend = Legend.of(entries, others=grey)
    about = f"In colour: {best_and_reference(known)}; grey: {grey} others."
    figure = frame.figure("What more experts cost", 3.3 + legend.height, NOTE, about if grey else "")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, place in zip(grid, panels, strict=True):
        _draw(axes, lines, known, place)
    legend.below(figure)
    return Plot("experts", figure, COLUMNS, _table(lines))


def lines_of(rows: Sequence[ComparisonRow]) -> list[Line]:
    """Return the rows as lines over the number of experts, those with one number too.

    A width that follows from a match does not part a line, unless it varies at one number of experts. Nor
    does the code of a coupler, or what the settings do not say, unless a line would have two rows at one.
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
    """Return the number of experts of a row."""
    return row.configuration.flags["num_experts"]


def ran_out(row: ComparisonRow) -> bool:
    """Whether no run of the row counts and at least one ran out of memory."""
    return row.loss.mean is None and any(run.status == "oom" for run in row.configuration.runs)


def _without(row: ComparisonRow, names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.configuration.flags.items() if name not in names}


def _summary(row: ComparisonRow, place: int) -> Summary:
    summary, scale = (
        (row.peak_memory_bytes, 1 / 2**20),
        (row.tokens_per_second, 1.0),
        (row.step_seconds, 1e3),
    )[place]
    return Summary({seed: value * scale for seed, value in summary.values.items()})


def _draw(axes: Axes, lines: list[Line], known: dict[str, Look], place: int) -> None:
    values: list[float] = []
    for line in lines:
        look = known.get(line.name)
        found = [(experts(row), summary) for row in line.rows if (summary := _summary(row, place)).n]
        xs, means = [x for x, _ in found], [summary.mean or 0.0 for _, summary in found]
        values += means
        if look is None:
            axes.plot(xs, means, color=OTHERS, linewidth=0.7, marker=".", markersize=3, zorder=1)
            continue
        ends: list[Interval | None] = [_positive(summary) for _, summary in found]
        intervals(axes, xs, ends, vertical=True, colors=look.colour, linewidths=1.2, zorder=2)
        axes.plot(xs, means, **look.of_line(), **look.of_marker())
    censored = _censored(lines)
    _scale(axes, lines, values, max(map(len, censored.values()), default=0), CEILING[place])
    axes.set_title(AXES[place], loc="left", fontweight="bold")
    _draw_censored(axes, censored, known, CEILING[place])


def _scale(axes: Axes, lines: list[Line], values: list[float], marks: int, ceiling: bool) -> None:
    """Scale both axes; ``marks`` at the same number of experts need room at the top or at the bottom."""
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
    """Return an interval that a logarithmic axis can show."""
    ends = summary.interval
    return None if ends is None else (max(ends[0], 1e-3 * (summary.mean or 1.0)), ends[1])


def _spaced(numbers: list[int]) -> list[int]:
    """Return the numbers whose ticks do not touch: each at least 1.2 times the one before."""
    found: list[int] = []
    for value in numbers:
        if not found or value >= 1.2 * found[-1]:
            found.append(value)
    return found


def _censored(lines: list[Line]) -> dict[int, list[Line]]:
    """Return number of experts → lines that ran out of memory there."""
    found: dict[int, list[Line]] = {}
    for line in lines:
        for row in line.rows:
            if ran_out(row):
                found.setdefault(experts(row), []).append(line)
    return found


def _draw_censored(
    axes: Axes, censored: dict[int, list[Line]], known: dict[str, Look], ceiling: bool
) -> None:
    """Mark at the edge, as its line but hollow, where each line ran out of memory."""
    transform = axes.get_xaxis_transform()
    for number, lines in censored.items():
        for level, line in enumerate(lines[:MOST_MARKS]):
            look = known.get(line.name, Look(OTHERS, "", "o"))
            height = MARK_ROOM * (level + 0.5)
            axes.plot(number, 1 - height if ceiling else height, marker=look.marker, markersize=5.5,
                      markerfacecolor="white", markeredgecolor=look.colour, markeredgewidth=1.4,
                      linestyle="", transform=transform, zorder=5)  # fmt: skip
        if len(lines) > MOST_MARKS:
            height = MARK_ROOM * (MOST_MARKS + 0.5)
            axes.text(number, 1 - height if ceiling else height, f"+{len(lines) - MOST_MARKS}", ha="center",
                      va="center", transform=transform, fontsize=7.5)  # fmt: skip
    if censored:
        first, height = min(censored), MARK_ROOM / 2
        axes.annotate("out of memory", (first, 1 - height if ceiling else height), xycoords=transform,
                      xytext=(-7, 0), textcoords="offset points", ha="right", va="center", fontsize=7.5,
                      color=VERMILLION)  # fmt: skip


def _table(lines: list[Line]) -> list[list[Any]]:
    table = []
    for line in lines:
        for row in line.rows:
            cells: list[Any] = []
            for place in range(3):
                summary = _summary(row, place)
                cells += [summary.mean, *(summary.interval or (None, None))]
            table.append([row.configuration.label, line.name, experts(row), row.loss.n, *cells, ran_out(row),
                          row.configuration.statuses()])  # fmt: skip
    return table
