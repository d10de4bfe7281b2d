"""Hyperedge weights of a study: bars and trajectories by member names, with the agreement over seeds.

Letters: S seeds, M members (hyperedges), T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.analysis.comparison import Comparison
from bench.analysis.hyperedge_figures import (
    EXTREMES,
    LABEL_POINTS,
    MAX_LABELS,
    _label_ends,
    _named,
)  # fmt: skip
from bench.analysis.mixing_figure import mixing_plot
from bench.analysis.numbers import counted
from bench.analysis.plot_style import (
    BLUE,
    GREY,
    LINE_COLOURS,
    LINE_STYLES,
    ORANGE,
    Plot,
    plot_style,
    printable,
    shorten,
    step_axis,
)  # fmt: skip
from bench.analysis.study_plots.frame import Frame
from bench.analysis.weights import BY_NAME, WeightsReading, read_weights

MOST_FIGURES = 6  # configurations with a figure of their own
SEED_LINES = 600  # of more thin lines nothing can be seen: a grey band from the lowest to the highest
Readings = Sequence[WeightsReading]  # the layers of one configuration


def weights_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return what hypergraphs learned and how experts are mixed; a figure without data is left out.

    ``hyperedge_weights_1``, ``hyperedge_weights_over_steps_1``, …: one of each for every configuration with
    learned weights, numbered in the order in which the study began them; of more than ``MOST_FIGURES``
    those with the best losses, which each figure says. ``mixing``: all configurations.
    """
    frame = Frame(study_name, comparison)
    by_label: dict[str, list[WeightsReading]] = {}
    for reading in read_weights(comparison):
        by_label.setdefault(reading.configuration.label, []).append(reading)
    best = [row.configuration.label for row in frame.measured if row.configuration.label in by_label]
    drawn = [one.label for one in comparison.group.configurations if one.label in best[:MOST_FIGURES]]
    capped = "" if len(best) <= MOST_FIGURES else (
        f" Drawn: the {MOST_FIGURES} best of {len(best)} configurations with learned weights.")  # fmt: skip
    with plot_style():
        plots = [draw(frame, by_label[label], f"_{place}", BY_NAME + capped)
                 for place, label in enumerate(drawn, 1) for draw in (_bars, _over_steps)]  # fmt: skip
        plots.append(mixing_plot(frame))
    return [plot for plot in plots if plot is not None]


def _bars(frame: Frame, readings: Readings, suffix: str, note: str) -> Plot:
    """Return the mean over seeds as bars, from 1 where all start there, and each seed as a dot."""
    one, most = readings[0], max(len(reading.members) for reading in readings)
    base = 1.0 if all(reading.from_one for reading in readings) else 0.0
    subject = f"Hyperedge weights ({_over(one)}): {frame.name(one.configuration)}"
    note = "Bars: mean over seeds; dots: the seeds, each at the same place in every bar. " + note
    figure, panels = _panels(frame, subject, note, readings, 2.6, columns=2 if most <= 30 else 1)
    for axes, reading in zip(panels, readings, strict=True):
        _draw_bars(axes, reading, base)
    ends = [end for reading in readings for end in reading.range]
    low, high = min(base, *ends), max(base, *ends)
    margin = 0.08 * (high - low)
    panels[0].set_ylim(low - margin * (base > low or low < 0), high + margin)
    _label_left(panels, "weight (1 at the start)" if base else "weight")
    seeds = list(dict.fromkeys(seed for reading in readings for seed in reading.seeds))
    columns = ("configuration", "layer", "hyperedge", "mean", *(f"seed_{seed}" for seed in seeds))
    rows = []
    for reading in readings:
        for place, name in enumerate(reading.members):
            values = dict(zip(reading.seeds, reading.weights_SM[:, place].tolist(), strict=True))
            rows.append((one.configuration.label, reading.layer, name, float(reading.mean_M[place]),
                         *(values.get(seed, "") for seed in seeds)))  # fmt: skip
    return Plot(f"hyperedge_weights{suffix}", figure, columns, rows)


def _over_steps(frame: Frame, readings: Readings, suffix: str, note: str) -> Plot | None:
    """Return the mean over seeds as a named line a hyperedge, and each seed as a thin one."""
    readings = [reading for reading in readings if reading.trajectories is not None]
    if not readings:
        return None
    one, most = readings[0], max(len(reading.members) for reading in readings)
    labels = most if most <= MAX_LABELS else 2 * EXTREMES
    subject = f"Hyperedge weights over training ({_over(one)}): {frame.name(one.configuration)}"
    note = "Thick lines: mean over seeds; thin: each seed, or where those are too many their range. " + note
    height = max(2.9, labels * LABEL_POINTS / 72 + 1.0)
    figure, panels = _panels(frame, subject, note, readings, height, columns=2)
    rows = []
    for axes, reading in zip(panels, readings, strict=True):
        _draw_lines(axes, reading)
        found = reading.trajectories
        assert found is not None
        rows += [(one.configuration.label, reading.layer, seed, step, name, value)
                 for step, weights_SM in zip(found.steps_T.tolist(), found.weights_TSM.tolist(), strict=True)
                 for seed, weights_M in zip(found.seeds, weights_SM, strict=True)
                 for name, value in zip(reading.members, weights_M, strict=True)]  # fmt: skip
    _label_left(panels, "weight" if most <= MAX_LABELS else f"weight (named: {EXTREMES} highest and lowest)")
    figure.get_layout_engine().execute(figure)  # pyright: ignore[reportOptionalMemberAccess]
    # the height of the panels must be known to space the labels
    for axes, reading in zip(panels, readings, strict=True):
        _label_ends(axes, list(reading.members), _ends(reading))
    columns = ("configuration", "layer", "seed", "step", "hyperedge", "weight")
    return Plot(f"hyperedge_weights_over_steps{suffix}", figure, columns, rows)


def _over(reading: WeightsReading) -> str:
    return counted(len(reading.seeds), "seed")


def _panels(
    frame: Frame, subject: str, note: str, readings: Readings, height: float, columns: int
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel a layer; ``height`` is one panel's, in inches."""
    columns = min(columns, len(readings))
    rows = math.ceil(len(readings) / columns)
    figure = frame.figure(subject, height * rows, note)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(readings) :]:
        figure.delaxes(axes)
    panels = list(grid.flat[: len(readings)])
    for axes, reading in zip(panels, readings, strict=True):
        axes.set_title(f"layer {reading.layer}\n{reading.agreement_words()}", loc="left", fontsize=7.5)
    return figure, panels


def _label_left(panels: Sequence[Axes], text: str) -> None:
    for axes in panels:
        if axes.get_subplotspec().is_first_col():  # pyright: ignore[reportOptionalMemberAccess]
            axes.set_ylabel(text)


def _draw_bars(axes: Axes, reading: WeightsReading, base: float) -> None:
    mean_M, count = reading.mean_M, len(reading.members)
    positions_M = np.arange(count)
    below_M = mean_M < base
    bars = axes.bar(positions_M, mean_M - base, bottom=base, color=np.where(below_M, ORANGE, BLUE).tolist(),
                    edgecolor="black", linewidth=0.5 if count <= MAX_LABELS else 0, alpha=0.75)  # fmt: skip
    for bar, below in zip(bars, below_M, strict=True):
        bar.set_hatch("///" if below else "")
    seeds = len(reading.seeds)
    if seeds > 1:
        across_S = np.linspace(-0.28, 0.28, seeds)  # one seed stands at one place in every bar
        size = 3.2 if count <= 16 else 2.2 if count <= MAX_LABELS else 1.2
        axes.plot(np.add.outer(across_S, positions_M).ravel(), reading.weights_SM.ravel(), "o", color="white",
                  markeredgecolor="black", markersize=size, markeredgewidth=0.5, zorder=3)  # fmt: skip
    axes.axhline(base, color="black", linewidth=0.8)
    every = math.ceil(count / MAX_LABELS)
    names = [printable(shorten(name, 16)) for name in reading.members]
    turned = count * max(map(len, names)) > 60
    axes.set_xticks(positions_M[::every], names[::every], rotation=90 if turned else 0, fontsize=7)
    axes.set_xlim(-0.6, count - 0.4)
    axes.grid(False, axis="x")


def _draw_lines(axes: Axes, reading: WeightsReading) -> None:
    """Draw the mean lines first: ``_label_ends`` finds them by their place."""
    found = reading.trajectories
    assert found is not None
    mean_TM = found.weights_TSM.mean(axis=1)
    named = set(_named(mean_TM[-1]).tolist())
    looks: list[dict[str, Any]] = [
        {"color": LINE_COLOURS[place % len(LINE_COLOURS)], "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
        if place in named else {"color": "#999999", "linestyle": "-"}
        for place in range(len(reading.members))
    ]  # fmt: skip
    for place, look in enumerate(looks):
        axes.plot(
            found.steps_T, mean_TM[:, place], linewidth=1.6 if place in named else 0.5, zorder=3, **look
        )
    seeds = len(found.seeds)
    if seeds * len(reading.members) > SEED_LINES:
        ends: list[Callable[..., np.ndarray]] = [np.min, np.max]
        low_T, high_T = (end(found.weights_TSM, axis=(1, 2)) for end in ends)
        axes.fill_between(found.steps_T, low_T, high_T, color=GREY, alpha=0.15, linewidth=0)
    elif seeds > 1:
        for place, look in enumerate(looks):
            axes.plot(
                found.steps_T, found.weights_TSM[:, :, place], linewidth=0.5, alpha=0.45, zorder=2, **look
            )
    step_axis(axes, found.steps_T.tolist())


def _ends(reading: WeightsReading) -> np.ndarray:
    assert reading.trajectories is not None
    return reading.trajectories.weights_TSM[-1].mean(axis=0)
