"""Hyperedge weights by member names: at the end as bars, and over steps as lines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from bench.analysis.plot_style import (
    BLUE,
    LINE_COLOURS,
    LINE_STYLES,
    ORANGE,
    Plot,
    new_figure,
    printable,
    shorten,
    step_axis,
)  # fmt: skip
from bench.study.run_files import RunData

Weights = dict[int, dict[str, float]]  # by layer and member names
MAX_LABELS = 60  # names below the bars, or at the ends of lines
EXTREMES = 10  # of more lines only so many, from above and from below, have a colour and a name
LABEL_POINTS = 8.5  # height of a line of text of 7 points


def weights_plot(run: RunData) -> Plot | None:
    """Return ``hyperedge_weights``: bars by layer and member names, or None without such weights.

    The weights are those of the state that is best on validation, which the run ends with. Bars
    stand on 1 where all weights start there and any of them moved, else on 0.
    """
    weights = _final_weights(run)
    if not weights:
        return None
    most = max(map(len, weights.values()))
    columns = min(len(weights), 3 if most <= 8 else 2 if most <= 16 else 1)
    rows = math.ceil(len(weights) / columns)
    figure = new_figure(run.record, f"Hyperedge weights {run.when()}", 10, 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    values = [value for layer in weights.values() for value in layer.values()]
    moved = max(abs(value - 1) for value in values) > 1e-5
    base = 1.0 if moved and _start_at_one(run, list(weights)) else 0.0
    for axes, (layer, by_name) in zip(grid.flat, weights.items(), strict=False):
        _draw_bars(axes, by_name, base)
        axes.set_title(f"layer {layer}", loc="left", fontweight="bold")
    _remove_unused(figure, grid, len(weights))
    low, high = min(base, *values), max(base, *values)
    grid[0, 0].set_ylim(low - 0.12 * (high - low) * (base > low or low < 0), high + 0.12 * (high - low))
    for axes in grid[:, 0]:
        axes.set_ylabel("weight (1 at the start)" if base else "weight")
    rows_out = [(layer, name, value) for layer, found in weights.items() for name, value in found.items()]
    return Plot("hyperedge_weights", figure, ("layer", "hyperedge", "weight"), rows_out)


def trajectories_plot(run: RunData) -> Plot | None:
    """Return ``hyperedge_weights_over_steps``, or None where there are not two samples or no names."""
    steps = run.trace.get("step", np.array([]))
    weights = {
        layer: by_name
        for layer, by_name in _final_weights(run).items()
        if f"layer_{layer}.hyperedge_weights" in run.trace
    }
    if len(steps) < 2 or not weights:
        return None
    columns = min(len(weights), 2)
    rows = math.ceil(len(weights) / columns)
    most = max(map(len, weights.values()))
    labels = most if most <= MAX_LABELS else 2 * EXTREMES
    height = max(2.8, labels * LABEL_POINTS / 72 + 0.9)
    figure = new_figure(run.record, "Hyperedge weights over training", 5 * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    table = []
    for axes, (layer, by_name) in zip(grid.flat, weights.items(), strict=False):
        values_TM = run.trace[f"layer_{layer}.hyperedge_weights"].astype(float)
        _draw_lines(axes, steps, values_TM)
        step_axis(axes, [int(step) for step in steps])
        axes.set_title(f"layer {layer}", loc="left", fontweight="bold")
        table += [(int(step), layer, name, float(value)) for step, row_M in zip(steps, values_TM, strict=True)
                  for name, value in zip(by_name, row_M, strict=True)]  # fmt: skip
    _remove_unused(figure, grid, len(weights))
    for axes in grid[:, 0]:
        axes.set_ylabel("weight" if most <= MAX_LABELS else f"weight (named: {EXTREMES} highest and lowest)")
    figure.get_layout_engine().execute(figure)  # pyright: ignore[reportOptionalMemberAccess]
    # the height of the panels must be known to space the labels
    for axes, (layer, by_name) in zip(grid.flat, weights.items(), strict=False):
        _label_ends(axes, list(by_name), run.trace[f"layer_{layer}.hyperedge_weights"][-1].astype(float))
    return Plot("hyperedge_weights_over_steps", figure, ("step", "layer", "hyperedge", "weight"), table)


def _final_weights(run: RunData) -> Weights:
    return {
        layer: parts["hyperedge_weights"]
        for layer, parts in run.parts("hyperedge_weights").items()
        if isinstance(parts.get("hyperedge_weights"), dict) and parts["hyperedge_weights"]
    }


def _start_at_one(run: RunData, layers: list[int]) -> bool:
    traces = [run.trace.get(f"layer_{layer}.hyperedge_weights") for layer in layers]
    return all(trace is not None and np.allclose(trace[0], 1, atol=1e-5) for trace in traces)


def _named(ends_M: np.ndarray) -> np.ndarray:
    """Return the positions of the lines to name, by the height of their ends."""
    order = np.argsort(ends_M, kind="stable")
    order = order[np.isfinite(ends_M[order])]
    if len(order) <= MAX_LABELS:
        return order
    return np.concatenate([order[:EXTREMES], order[-EXTREMES:]])


def _draw_lines(axes: Axes, steps: np.ndarray, values_TM: np.ndarray) -> None:
    named = set(_named(values_TM[-1]).tolist())
    for position in range(values_TM.shape[1]):
        look: dict[str, Any] = {"color": "#cccccc", "linewidth": 0.5, "zorder": 1}
        if position in named:
            look = {"color": LINE_COLOURS[position % len(LINE_COLOURS)], "linewidth": 1.2,
                    "linestyle": LINE_STYLES[position % len(LINE_STYLES)]}  # fmt: skip
        axes.plot(steps, values_TM[:, position], **look)


def _remove_unused(figure: Figure, grid: Any, used: int) -> None:
    for axes in grid.flat[used:]:
        figure.delaxes(axes)


def _draw_bars(axes: Axes, by_name: dict[str, float], base: float) -> None:
    values = np.array(list(by_name.values()))
    positions = np.arange(len(values))
    below = values < base
    bars = axes.bar(positions, values - base, bottom=base, color=np.where(below, ORANGE, BLUE).tolist(),
                    edgecolor="black", linewidth=0.5 if len(values) <= MAX_LABELS else 0)  # fmt: skip
    for bar, is_below in zip(bars, below, strict=True):
        bar.set_hatch("///" if is_below else "")
    axes.axhline(base, color="black", linewidth=0.8)
    every = math.ceil(len(values) / MAX_LABELS)
    names = [printable(shorten(name, 16)) for name in by_name]
    turned = len(names) * max(map(len, names)) > 60
    axes.set_xticks(positions[::every], names[::every], rotation=90 if turned else 0, fontsize=7)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(False, axis="x")
    if len(values) <= 16:
        smallest = max(float(np.ptp(np.append(values, base))), 1e-6)
        digits = min(6, max(3, 1 - math.floor(math.log10(smallest))))
        for x, value in enumerate(values):
            down = value < base
            place = {"xytext": (0, -2 if down else 2), "va": "top" if down else "bottom"}
            axes.annotate(f"{value:.{digits}f}", (x, value), textcoords="offset points", ha="center",
                          fontsize=6.5, **place)  # fmt: skip


def _label_ends(axes: Axes, names: list[str], ends_M: np.ndarray) -> None:
    """Write each name right of its line's end, moved apart where they would overlap."""
    order = _named(ends_M)
    if not len(order):
        return
    low, high = axes.get_ylim()
    figure = axes.figure
    height = axes.get_window_extent().height / figure.dpi * 72  # points
    places = spread((ends_M[order] - low) / (high - low), LABEL_POINTS / height)
    for position, place in zip(order, places, strict=True):
        end = (ends_M[position] - low) / (high - low)
        line = axes.lines[position]
        axes.plot([1.0, 1.05, 1.07], [end, place, place], transform=axes.transAxes, clip_on=False,
                  color=line.get_color(), linestyle="-", linewidth=0.7)  # fmt: skip
        axes.text(1.08, place, printable(shorten(names[position], 16)), transform=axes.transAxes,
                  va="center", fontsize=7)  # fmt: skip


def spread(wanted: np.ndarray, distance: float) -> np.ndarray:
    """Return places in [0, 1] at least ``distance`` apart, nearest to ``wanted`` (ascending).

    Least squares under the order: y_i − i·distance must not fall, which is isotonic regression.
    Where the places do not fit, they stand closer.
    """
    if len(wanted) > 1:
        distance = min(distance, 1 / (len(wanted) - 1))
    offsets = np.arange(len(wanted)) * distance
    return np.clip(isotonic_regression(wanted - offsets).x, 0, 1 - offsets[-1]) + offsets
