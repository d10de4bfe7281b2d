"""Quality against a swept parameter: ``perplexity_by_FLAG``, with a line for each coupler."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.record import exp_or_infinity
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.plots.frame import (
    BEST,
    MAX_LOOKS,
    SIDE_BY_SIDE,
    Ends,
    Frame,
    intervals,
    mean_and_ends,
    note_below,
    scale_of,
    set_scale,
    shifted,
)
from bench.report.plots.style import (
    LIGHT,
    VERMILLION,
    Look,
    Plot,
    label_ends,
    lay_out,
    plain,
    printable,
    shorten,
)
from bench.report.quantities import (
    PEAK_MEMORY,
    TOKENS_PER_SECOND,
    TRAINING_FLOPS,
    Quantity,
    counted,
    perplexities,
)
from bench.report.statistics import Summary
from bench.study.labels import DERIVED, Key, labels

BEYOND = 1e9
"""A perplexity that no scale shows."""
SIDEWAYS, MOST_SIDEWAYS = 5.0, 20.0
"""Points between neighbouring lines, so that equal values do not cover each other, and of all lines."""
COSTS = (PEAK_MEMORY, TOKENS_PER_SECOND)
"""What a value of the parameter costs, drawn beside the perplexity where the model changes with it."""
Flags = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """Configurations that differ only in one number, sorted by it; there may be a single one."""

    name: str
    values: list[float]
    rows: list[ComparisonRow]

    @property
    def best(self) -> int | None:
        """The place of its lowest mean loss; None without a loss."""
        known = [(row.loss.mean, place) for place, row in enumerate(self.rows) if row.loss.mean is not None]
        return min(known)[1] if known else None

    @property
    def lowest(self) -> float:
        """Its lowest mean loss in nats; infinity without a loss."""
        return float("inf") if self.best is None else self.rows[self.best].loss.mean or 0.0


def swept_plots(frame: Frame) -> list[Plot]:
    """Return a plot for each number that varies while all other flags are equal."""
    found = [swept_plot(frame, flag) for flag in _swept(frame.comparison.rows)]
    return [plot for plot in found if plot is not None]


def _swept(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return the flags and coupler options with several numbers, except for those that follow from others."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in flags_of(row).items():
            if type(value) in (int, float) and name not in DERIVED:
                values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1]


def flags_of(row: ComparisonRow) -> Flags:
    """Return the flags of a configuration, with each of the coupler's options as a flag of its own."""
    flags = dict(row.configuration.flags)
    for option in flags.pop("coupler_option", ()):
        name, _, text = option.partition("=")
        flags[name] = _number(text)
    return flags


def _number(text: str) -> float | str:
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return text


def lines_of(rows: Sequence[ComparisonRow], flag: str) -> list[Line]:
    """Return the rows as lines over ``flag``.

    Rows of one line have equal flags, except for ``flag``. Their widths may differ if they follow from a
    match, and so may their hashes. If a line then had two rows with the same number, the width, the code and
    the configuration separate the lines, in this order.
    """
    rows = [row for row in rows if type(flags_of(row).get(flag)) in (int, float)]
    matched, alone = {flag, *DERIVED}, {flag}
    found: dict[Key, list[ComparisonRow]] = {}
    for apart, known in ((matched, 0), (alone, 0), (alone, 1), (alone, 2)):  # by ever more of the key
        found = {}
        for row in rows:
            configuration, code = row.configuration.key
            text = json.dumps(_without(row, apart), sort_keys=True, default=str)
            own = configuration if known > 1 else hashlib.sha256(text.encode()).hexdigest()
            found.setdefault((own, code if known else None), []).append(row)
        if all(len({flags_of(row)[flag] for row in group}) == len(group) for group in found.values()):
            break
    groups = [sorted(group, key=lambda row: flags_of(row)[flag]) for group in found.values()]
    names = labels([_without(group[0], apart) for group in groups], list(found))
    return [
        Line(printable(shorten(name.rpartition("/")[2], 40)), [flags_of(row)[flag] for row in group], group)
        for name, group in zip(names, groups, strict=True)
    ]


def _without(row: ComparisonRow, names: set[str]) -> Flags:
    flags = {name: value for name, value in row.configuration.flags.items() if name not in names}
    options = flags.get("coupler_option", ())
    return flags | {"coupler_option": [one for one in options if one.partition("=")[0] not in names]}


def swept_plot(frame: Frame, flag: str) -> Plot | None:
    """Return ``perplexity_by_FLAG``; None where no coupler has a loss at two values of the flag."""
    lines = [line for line in lines_of(frame.comparison.rows, flag) if len(line.rows) > 1]
    if not any(sum(row.loss.n > 0 for row in line.rows) > 1 for line in lines):
        return None
    lines.sort(key=lambda line: line.lowest)
    looks = _looks(lines)
    at_edge = [line.name for line in lines if line.best in (0, len(line.rows) - 1) and line.name in looks]
    edge = f"The lowest mean is at an end of the range for {', '.join(at_edge)}." if at_edge else ""
    costs = [found for found in COSTS if any(row.means[found].n for line in lines for row in line.rows)]
    panels: list[Quantity | None] = [None, *(costs if _model_changes(lines) else ())]
    subject = _answer(frame.comparison, flag, lines)
    figure = frame.figure(subject, 3.8, edge, width=10.0 if len(panels) > 1 else 7.5)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, quantity in zip(grid, panels, strict=True):
        _draw(axes, lines, looks, quantity)
        _number_axis(axes, flag, sorted({value for line in lines for value in line.values}))
    _name_failed(grid[0], lines, looks)
    lay_out(figure)
    ends = [
        (_height(line, panels[-1]), line.name, looks[line.name].colour)
        for line in lines
        if line.name in looks
    ]
    label_ends(grid[-1], ends)
    columns = ["configuration", "line", flag, "seeds", *_columns("perplexity"), *_columns(PEAK_MEMORY.name)]
    columns += [*_columns(TOKENS_PER_SECOND.name), "status"]
    return Plot(f"perplexity_by_{flag}", figure, columns, [row for line in lines for row in _cells(line)])


def _answer(comparison: Comparison, flag: str, lines: list[Line]) -> str:
    """Return the value of the flag that is significantly better than all others, or that there is none."""
    better = {(one.candidate.label, one.reference.label) for one in comparison.pairs
              if one.verdict.kind == "better"}  # fmt: skip
    better |= {(one.reference.label, one.candidate.label) for one in comparison.pairs
               if one.verdict.kind == "worse"}  # fmt: skip
    at: dict[float, list[str]] = {}
    for line in lines:
        best, *others = sorted(line.rows, key=lambda row: (row.loss.mean is None, row.loss.mean))
        rivals = [row for row in others if row.loss.mean is not None]
        if rivals and all((best.configuration.label, row.configuration.label) in better for row in rivals):
            at.setdefault(line.values[line.rows.index(best)], []).append(line.name)
    if not at:
        return f"No {flag} is significantly better than every other value"
    found = ", ".join(f"{plain(x)} ({', '.join(names)})" for x, names in at.items())
    told = [name for names in at.values() for name in names]
    rest = [line.name for line in lines if line.name not in told]
    subject = f"Lowest perplexity at {flag} {found}"
    if rest:
        subject += f"; not resolved for {', '.join(rest) if len(rest) < 4 else counted(len(rest), 'line')}"
    return subject if len(subject) < 160 else f"Which {flag} gives the lowest perplexity?"


def _looks(lines: list[Line]) -> dict[str, Look]:
    """Return the looks of the best lines by name; the other lines are grey."""
    variants, found = Counter[str](), {}
    for line in lines if len(lines) <= MAX_LOOKS else lines[:BEST]:
        coupler = line.rows[0].configuration.coupler
        found[line.name] = Look.of(coupler, variants[coupler])
        variants[coupler] += 1
    return found


def _model_changes(lines: list[Line]) -> bool:
    """Return whether FLOPs or memory change along a line by more than 2%."""
    for line in lines:
        flops = [row.model[TRAINING_FLOPS] for row in line.rows]
        for values in (flops, [row.means[PEAK_MEMORY].mean for row in line.rows]):
            known = [value for value in values if value]
            if known and max(known) > 1.02 * min(known):
                return True
    return False


def _points(line: Line, quantity: Quantity | None) -> list[tuple[float, float, Ends | None]]:
    """Return value, mean and interval of the perplexity, or of another quantity in the unit of its axis."""
    found = []
    for value, row in zip(line.values, line.rows, strict=True):
        if quantity is not None:
            summary = Summary(
                {seed: one * quantity.scale for seed, one in row.means[quantity].values.items()}
            )
            if summary.mean is not None:
                found.append((value, summary.mean, summary.interval))
        elif row.loss.mean is not None and exp_or_infinity(row.loss.mean) < BEYOND:
            found.append((value, exp_or_infinity(row.loss.mean), perplexities(row.loss.interval)))
    return found


def _height(line: Line, quantity: Quantity | None) -> float:
    points = _points(line, quantity)
    return points[-1][1] if points else float("nan")


def _draw(axes: Axes, lines: list[Line], looks: dict[str, Look], quantity: Quantity | None) -> None:
    points = {line.name: _points(line, quantity) for line in lines}
    every = [point for some in points.values() for point in some]
    if every:
        ratio = 3 if quantity is None else 8
        set_scale(axes, "y", scale_of([y for _, y, _ in every], [ends for *_, ends in every], ratio))
    apart = min(SIDEWAYS, MOST_SIDEWAYS / max(1, len(looks)))
    for place, line in enumerate(lines):
        shift = apart * (place - (len(looks) - 1) / 2)
        xs, ys, ends = zip(*points[line.name], strict=True) if points[line.name] else ((), (), ())
        look = looks.get(line.name)
        if look is None:
            axes.plot(xs, ys, color=LIGHT, lw=0.7, marker=".", ms=3, zorder=1)
            continue
        bars = {"colors": look.colour, "linewidths": 1.0, "alpha": 0.6, "zorder": 2}
        intervals(axes, xs, ends, vertical=True, shift=shift, **bars)
        axes.plot(xs, ys, transform=shifted(axes, shift), **look.of_line(), **look.of_marker(5.5), zorder=3)
    if len(looks) > 1:
        note_below(axes, SIDE_BY_SIDE)
    axes.set_ylabel("perplexity per token (lower is better)" if quantity is None else quantity.axis_label)


def _number_axis(axes: Axes, flag: str, values: list[float]) -> None:
    """Label the x axis with the values that were swept; logarithmic if they span a factor of 4."""
    log = values[0] > 0 and values[-1] >= 4 * values[0]
    if log:
        axes.set_xscale("log")
        stretch = (values[-1] / values[0]) ** 0.05
        axes.set_xlim(values[0] / stretch, values[-1] * stretch)
    else:
        margin = 0.05 * (values[-1] - values[0])
        axes.set_xlim(values[0] - margin, values[-1] + margin)
    ticks, low, high = [], *axes.get_xlim()
    for value in values:  # ticks must not touch
        apart = 0.08 * (high - low) if not log else 0
        if not ticks or (value >= 1.25 * ticks[-1] if log else value - ticks[-1] >= apart):
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.set_xlabel(flag)


def _name_failed(axes: Axes, lines: list[Line], looks: dict[str, Look]) -> None:
    """Mark and name at the upper edge the configurations of which no run counts."""
    failed = [
        (value, line, row) for line in lines for value, row in zip(line.values, line.rows, strict=True)
        if row.loss.mean is None
    ]  # fmt: skip
    transform, low_high = axes.get_xaxis_transform(), axes.get_xlim()
    for place, (value, line, row) in enumerate(failed[:8]):
        height, look = 0.97 - 0.055 * place, looks.get(line.name)
        colour = look.colour if look else VERMILLION
        axes.plot(value, height, "x", ms=7, mew=2, color=colour, transform=transform, zorder=5)
        right = axes.transAxes.inverted().transform(axes.transData.transform((value, 1)))[0] > 0.5
        text = f"{shorten(line.name, 24)}: {row.configuration.statuses()}"
        axes.annotate(text, (value, height), xycoords=transform, xytext=(-7 if right else 7, 0),
                      textcoords="offset points", ha="right" if right else "left", va="center", fontsize=7,
                      color=colour, zorder=5)  # fmt: skip
    if failed:
        room = 0.06 * (min(len(failed), 8) + 1)
        low, high = axes.get_ylim()
        if axes.get_yscale() == "log":
            axes.set_ylim(low, high * (high / low) ** (room / (1 - room)))
        else:
            axes.set_ylim(low, high + (high - low) * room / (1 - room))
        axes.set_xlim(low_high)


def _columns(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low_95", f"{name}_high_95"


def _cells(line: Line) -> list[list[Any]]:
    cells = []
    for value, row in zip(line.values, line.rows, strict=True):
        mean = None if row.loss.mean is None else exp_or_infinity(row.loss.mean)
        quality = [mean, *(perplexities(row.loss.interval) or (None, None))]
        costs = mean_and_ends(*(row.means[quantity] for quantity in COSTS))
        head = [row.configuration.label, line.name, value, row.loss.n]
        cells.append([*head, *quality, *costs, row.configuration.statuses()])
    return cells
