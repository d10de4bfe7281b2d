"""Perplexity with its interval, and the paired difference from the reference with the verdict in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.analysis.comparison import ComparisonRow, Difference
from bench.analysis.comparison_tables import simple_models
from bench.analysis.numbers import MINUS, number, perplexities
from bench.analysis.plot_style import BLUE, GREEN, GREY, VERMILLION, Plot
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.statistics import MINIMUM_EFFECT_NATS
from bench.analysis.study_plots.drawing import (
    Ends,
    Scale,
    intervals,
    scale_of,
    set_scale,
    stripes,
    usual_reach,
)
from bench.analysis.study_plots.frame import Frame

MOST_ROWS, FIRST, LAST = 80, 60, 18
BEYOND = 1e9  # a perplexity that no scale shows
LOOKS = {
    "better": (BLUE, "o", BLUE), "worse": (VERMILLION, "s", VERMILLION), "equivalent": (GREEN, "D", GREEN),
    "not resolved": (GREY, "o", "white"), "reference": ("black", "o", "black"), "": (GREY, "o", GREY),
}  # fmt: skip
"""Verdict → colour of the edge, shape, colour of the face."""
COLUMNS = (
    "configuration", "seed", "seeds", "perplexity", "perplexity_low_95", "perplexity_high_95", "loss_nats",
    "difference_nats", "difference_low_95_nats", "difference_high_95_nats", "seeds_paired", "p_holm",
    "verdict", "status",
)  # fmt: skip
NOTE = (
    "Left: exp of the mean loss over seeds, its 95 % t interval (none for one seed), and each seed as a "
    "faint dot. Right: difference of loss paired by seed, 95 % t interval; the verdict is by a sign-flip "
    "test after Holm."
)


def perplexity_plot(frame: Frame) -> Plot | None:
    """Return ``perplexity``: a row a configuration, the best first, failed ones last."""
    rows = _rows(frame)
    shown, left_out = _shown(frame, rows)
    step = 0.26 if len(shown) <= 30 else 0.2
    rest = f"{left_out} configurations between the best and the worst: table only." if left_out else ""
    figure = frame.figure("Perplexity on validation, and the paired difference from the reference",
                          step * len(shown) + 1.1, NOTE, rest)  # fmt: skip
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_perplexities(left, frame, shown)
    _draw_lines(left, frame)
    _draw_differences(right, frame, shown)
    small = 8 if step > 0.2 else 7
    left.set_yticks(range(len(shown)), [_row_name(frame, row) for row in shown], fontsize=small)
    left.set_ylim(len(shown) - 0.4, -0.6)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        stripes(axes, len(shown))
    return Plot("perplexity", figure, COLUMNS, _table(frame, rows))


def _rows(frame: Frame) -> list[ComparisonRow]:
    failed = [row for row in frame.comparison.rows if row.loss.mean is None]
    return [*frame.measured, *failed]


def _shown(frame: Frame, rows: list[ComparisonRow]) -> tuple[list[ComparisonRow], int]:
    """Return the rows that are drawn, and how many are not."""
    if len(rows) <= MOST_ROWS:
        return rows, 0
    reference = [row for row in rows[FIRST:-LAST] if row.configuration is frame.comparison.reference]
    shown = [*rows[:FIRST], *reference, *rows[-LAST:]]
    return shown, len(rows) - len(shown)


def _row_name(frame: Frame, row: ComparisonRow) -> str:
    return f"{frame.name(row.configuration)}  n {row.loss.n}"


def _kind(frame: Frame, row: ComparisonRow) -> str:
    if row.configuration is frame.comparison.reference:
        return "reference"
    return row.against.verdict.kind if row.against else ""


def _draw_perplexities(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    seeds, means, ends = [], [], []
    for place, row in enumerate(rows):
        if row.loss.mean is None:
            axes.text(0.01, place, f"no result: {row.configuration.statuses()}", va="center",
                      transform=axes.get_yaxis_transform(), fontsize=7, color=VERMILLION)  # fmt: skip
            continue
        seeds += [(exp_or_infinity(value), place + 0.22) for value in row.loss.values.values()]
        means.append((place, exp_or_infinity(row.loss.mean), row))
        ends.append(perplexities(row.loss.interval))
    known = [value for value in (*(value for value, _ in seeds), *(mean for _, mean, _ in means))
             if value < BEYOND] or [1.0]  # fmt: skip
    bounded = [both if both and both[1] < BEYOND else None for both in ends]
    low, high, log = scale_of(known, bounded, ratio=3)
    lines = [value for value in simple_models(frame.comparison.group).values() if _on_scale(value, low, high)]
    low, high = (
        min([low, *(value / 1.02 for value in lines)]),
        max([high, *(value * 1.02 for value in lines)]),
    )
    set_scale(axes, "x", Scale(low, high, log))
    axes.scatter(*np.array(seeds).T, s=9, color="#999999", linewidth=0, zorder=2)
    intervals(axes, [place for place, *_ in means], bounded, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [(place, mean, _kind(frame, row)) for place, mean, row in means])
    for place, mean, _ in means:
        if not low <= mean <= high:
            axes.text(0.99, place, f"{number(mean)} →", ha="right",
                      va="center", transform=axes.get_yaxis_transform(), fontsize=7)  # fmt: skip
    axes.set_xlabel("perplexity (less is better)")


def _on_scale(value: float, low: float, high: float) -> bool:
    return low - 0.3 * (high - low) <= value <= high + 0.3 * (high - low)


def _draw_marks(axes: Axes, marks: list[tuple[int, float, str]]) -> None:
    """Draw each mean in the colour and shape of its verdict."""
    for kind in {kind for *_, kind in marks}:
        colour, marker, face = LOOKS[kind]
        xs, ys = zip(*((value, place) for place, value, own in marks if own == kind), strict=True)
        axes.scatter(xs, ys, s=30, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.2, zorder=4)


def _draw_lines(axes: Axes, frame: Frame) -> None:
    """Mark the simple models above the panel: a line where it is on scale, else an arrow to where it lies."""
    axes.set_title("Perplexity", loc="left", fontweight="bold", pad=28)
    low, high = axes.get_xlim()
    for level, (name, value) in enumerate(simple_models(frame.comparison.group).items()):
        text, height = f"{name} {number(value, 1 if value < 1e3 else 0)}", 3 + 11 * level
        transform = axes.get_xaxis_transform()
        place, align = (high, "right") if value > high else (low, "left")
        if low <= value <= high:
            axes.axvline(value, color="black", linestyle=("--", ":")[level], linewidth=1.2, zorder=1)
            place, align = value, ("left" if value < (low + high) / 2 else "right")
        else:
            text = f"{text} →" if value > high else f"← {text}"
        axes.annotate(text, (place, 1), xycoords=transform, xytext=(0, height), textcoords="offset points",
                      ha=align, va="bottom", fontsize=8)  # fmt: skip


def _draw_differences(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    found = [(place, row.against) for place, row in enumerate(rows) if row.against is not None]
    low, high = _difference_range([against for _, against in found])
    axes.axvspan(-MINIMUM_EFFECT_NATS, MINIMUM_EFFECT_NATS, color="#dddddd", zorder=0.5, linewidth=0)
    axes.axvline(0, color="black", linewidth=1)
    set_scale(axes, "x", Scale(low, high))
    kinds = [(place, against.paired.mean, against.verdict.kind) for place, against in found]
    ends = [against.paired.interval for _, against in found]
    intervals(axes, [place for place, _ in found], ends, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [mark for mark in kinds if low <= mark[1] <= high])
    for place, mean, _ in kinds:
        if not low <= mean <= high:
            value = f"{mean:.3g}".replace("-", MINUS)
            text, at, align = (f"{value} →", 0.99, "right") if mean > high else (f"← {value}", 0.01, "left")
            axes.text(
                at, place, text, ha=align, va="center", transform=axes.get_yaxis_transform(), fontsize=7
            )
    _write_verdicts(axes, frame, rows)
    axes.set_title("Difference from the reference", loc="left", fontweight="bold", pad=28)
    band = f"grey band: ±{MINIMUM_EFFECT_NATS:g} nats, the minimum effect"
    axes.annotate(band, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
                  fontsize=8, va="bottom")  # fmt: skip
    axes.set_xlabel("nats a token (below 0: better)")


def _write_verdicts(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    """Write each verdict at the end of its row, as ticks of a second axis, for which room is made."""
    words = []
    for row in rows:
        text = "no seed in common" if row.loss.n else "not measured"
        if row.configuration is frame.comparison.reference:
            text = "reference"
        words.append(row.against.verdict.words() if row.against else text)
    beside = axes.twinx()
    beside.set_ylim(len(rows) - 0.4, -0.6)
    beside.set_yticks(range(len(rows)), words, fontsize=8 if len(rows) <= 30 else 7)
    beside.tick_params(axis="y", length=0)
    beside.grid(False)


def _difference_range(found: list[Difference]) -> Ends:
    """Return the range of differences: of most means and their intervals, and the minimum effect."""
    edge = 1.4 * MINIMUM_EFFECT_NATS
    values = [value for against in found
              for value in (against.paired.mean, *(against.paired.interval or ()))] or [0.0]  # fmt: skip
    reach = usual_reach([abs(value) for value in values], gap=10, least=edge)
    low, high = max(min(-edge, *values), -reach), min(max(edge, *values), reach)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _table(frame: Frame, rows: list[ComparisonRow]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for row in rows:
        label, against = row.configuration.label, row.against
        low, high = perplexities(row.loss.interval) or (None, None)
        mean = row.loss.mean
        paired = None if against is None else against.paired
        difference: list[Any] = [None] * 4 if paired is None else [
            paired.mean, *(paired.interval or (None, None)), paired.n]  # fmt: skip
        verdict = against.verdict.words() if against else _kind(frame, row) or None
        table.append([
            label, None, row.loss.n, None if mean is None else exp_or_infinity(mean), low, high, mean,
            *difference, against and against.p_adjusted, verdict, row.configuration.statuses(),
        ])  # fmt: skip
        for seed, loss in row.loss.values.items():
            own = against.by_seed.get(seed) if against else None
            table.append([label, seed, 1, exp_or_infinity(loss), None, None, loss, own, *[None] * 6])
    for name, value in simple_models(frame.comparison.group).items():
        table.append(
            [f"{name} (reference line)", None, None, value, None, None, math.log(value), *[None] * 7]
        )
    return table
