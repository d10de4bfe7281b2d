"""Marks and scales that several figures need: intervals, bands, ranges that outliers do not spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.analysis.numbers import MINUS, counted
from bench.analysis.plot_style import log_ticks, plain, step_axis
from bench.analysis.study_plots.curves import Curve
from bench.analysis.study_plots.frame import OTHERS, Look

Ends = tuple[float, float]
FEW = 12  # so few points are marked one by one


class Scale(NamedTuple):
    """The ends of an axis, and whether it is logarithmic."""

    low: float
    high: float
    log: bool = False


def intervals(axes: Axes, places: Sequence[float], ends: Sequence[Ends | None], vertical: bool = False,
              **settings) -> None:  # fmt: skip
    """Draw an interval at each place: a horizontal line, or a vertical one. None is no interval."""
    segments = [[(place, end) if vertical else (end, place) for end in both]
                for place, both in zip(places, ends, strict=True) if both is not None]  # fmt: skip
    if segments:
        axes.add_collection(LineCollection(segments, **settings), autolim=False)


def stripes(axes: Axes, rows: int) -> None:
    """Shade every second row, so that an eye keeps to its own; one artist, since many are slow."""
    bands = [[(0, place - 0.5), (1, place - 0.5), (1, place + 0.5), (0, place + 0.5)]
             for place in range(1, rows, 2)]  # fmt: skip
    transform = axes.get_yaxis_transform()
    axes.add_collection(PolyCollection(bands, facecolor="#f5f5f5", transform=transform, zorder=0),
                        autolim=False)  # fmt: skip


def draw_curves(axes: Axes, curves: dict[str, Curve], looks: dict[str, Look], bands: bool = True) -> None:
    """Draw the mean over seeds of each curve and, for those with a look, a band of ± 1 standard deviation."""
    grey = [np.column_stack([curve.steps_T, curve.mean_T]) for label, curve in curves.items()
            if label not in looks]  # fmt: skip
    if grey:
        axes.add_collection(LineCollection(grey, colors=OTHERS, linewidths=0.7, zorder=1), autolim=False)
    for number, (label, look) in enumerate(looks.items()):
        curve = curves.get(label)
        if curve is None:
            continue
        deviation_T, steps = curve.deviation_T, len(curve.steps_T)
        if bands and deviation_T is not None:
            axes.fill_between(curve.steps_T, curve.mean_T - deviation_T, curve.mean_T + deviation_T,
                              color=look.colour, alpha=0.13, linewidth=0)  # fmt: skip
        every = 1 if steps <= FEW else (number * steps // 40 % max(1, steps // 4), max(1, steps // 4))
        axes.plot(curve.steps_T, curve.mean_T, markevery=every, **look.of_line(), **look.of_marker())


def finish_steps(axes: Axes, title: str, unit: str, curves: dict[str, Curve], gap: float = 10) -> None:
    """Label a panel of curves and give it a range that shows them, whatever a few values or lines do."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    step_axis(axes, [int(curve.steps_T[-1]) for curve in curves.values()], margin=0.02)
    low, high = curves_range(list(curves.values()), gap)
    axes.set_ylim(low, high)
    above = sum(not (curve.mean_T <= high).any() for curve in curves.values())
    if above:
        axes.set_title(f"{counted(above, 'line')} above ↑", loc="right", fontsize=8)


def curves_range(curves: Sequence[Curve], gap: float = 10) -> Ends:
    """Return the range of the curves and their bands, without lines that lie far above most others.

    Far is ``gap`` times as far from the lowest value as those below them.
    """
    ends = [found for curve in curves if (found := _extent(curve)) is not None]
    if not ends:
        return 0.0, 1.0
    low = min(bottom for bottom, _ in ends)
    high = low + usual_reach([top - low for _, top in ends], gap, least=1e-2 * abs(low))
    margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
    return low - margin, high + margin


def _extent(curve: Curve) -> Ends | None:
    """Return the range of a curve and its band, but for a few steps that lie far above the others."""
    half_T = 0.0 if curve.deviation_T is None else curve.deviation_T
    values = np.concatenate([curve.mean_T - half_T, curve.mean_T + half_T])
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high, most = float(known.min()), float(known.max()), float(np.quantile(known, 0.98))
    return low, low + 1.3 * (most - low) if high - low > 10 * (most - low) > 0 else high


def usual_reach(distances: Sequence[float], gap: float, least: float = 0.0) -> float:
    """Return the largest of ``distances`` that no gap parts from their median: a factor of ``gap``."""
    ordered = sorted(distances)
    middle = (len(ordered) - 1) // 2
    reach = max(least, ordered[middle])
    for distance in ordered[middle:]:
        if distance > gap * reach > 0:
            break
        reach = max(reach, distance)
    return reach


def value_range(values: Sequence[float], ends: Sequence[Ends | None]) -> Ends:
    """Return the range of an axis of values with intervals, which are cut where they are far wider."""
    low, high = min(values), max(values)
    least = (0.02 if low == high else 0.002) * abs(high) or 1.0  # a finer scale would show noise
    spread = max(high - low, least)
    known = [both for both in ends if both is not None]
    widest = max((b - a for a, b in known), default=0.0)
    reach = 2 * spread if len(values) > 2 else max(2 * spread, widest)
    bottom = max(low - reach, min([low, *(a for a, _ in known)]))
    top = min(high + reach, max([high, *(b for _, b in known)]))
    margin = max(0.06 * (top - bottom), (least - (top - bottom)) / 2)
    return bottom - margin, top + margin


def scale_of(values: Sequence[float], ends: Sequence[Ends | None], ratio: float) -> Scale:
    """Return the scale of values with intervals: logarithmic where the values span more than ``ratio``."""
    smallest, largest = min(values), max(values)
    if smallest > 0 and largest / smallest > ratio:
        return Scale(smallest / 1.25, largest * 1.25, log=True)
    return Scale(*value_range(values, ends))


def set_scale(axes: Axes, axis: Literal["x", "y"], scale: Scale) -> None:
    """Scale an axis, with round ticks in plain numbers."""
    if scale.log:
        log_ticks(axes, scale.low, scale.high, axis)
        return
    (axes.set_xlim if axis == "x" else axes.set_ylim)(scale.low, scale.high)
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(MaxNLocator(5 if axis == "x" else 6, steps=[1, 2, 2.5, 5, 10]))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: plain(value).replace("-", MINUS)))


def cell(value: float | None) -> float | None:
    """Return a number for a table, None for what is no number."""
    return None if value is None or math.isnan(value) else float(value)
