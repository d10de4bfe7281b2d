"""Plots of what hypergraphs learned in a study: hyperedge weights, and the experts' shares in the output.

Letters: S seeds, M members (hyperedges), T steps, L layers, E experts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.report.comparison import Comparison
from bench.report.plots.frame import WIDTH, Frame
from bench.report.plots.run import (
    EXTREMES,
    LABEL_POINTS,
    MAX_LABELS,
    draw_bars,
    label_ends,
    lay_out,
    line_look,
    named_lines,
    write_cells,
)
from bench.report.plots.style import GREY, Plot, plot_style, step_axis
from bench.report.quantities import counted
from bench.report.weights import BY_NAME, MixingReading, WeightsReading, read_mixing, read_weights

MOST_FIGURES = 6
"""The most configurations with a figure of their own."""
SEED_LINES = 600
"""The most lines of seeds in a panel; more are a grey band from the lowest to the highest."""
Readings = Sequence[WeightsReading]
"""The layers of one configuration."""


def weights_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return the plots of hyperedge weights and of the mixing; a plot without data is left out.

    Every configuration with learned weights has ``hyperedge_weights_1`` and
    ``hyperedge_weights_over_steps_1``, with a number in the order in which the study began them. Of more than
    ``MOST_FIGURES`` configurations, those with the best losses are drawn, and each figure says so. ``mixing``
    shows all configurations.
    """
    frame = Frame(study_name, comparison)
    by_label: dict[str, list[WeightsReading]] = {}
    for reading in read_weights(comparison):
        by_label.setdefault(reading.configuration.label, []).append(reading)
    best = [row.configuration.label for row in frame.measured if row.configuration.label in by_label]
    drawn = [one.label for one in comparison.group.configurations if one.label in best[:MOST_FIGURES]]
    capped = (
        ""
        if len(best) <= MOST_FIGURES
        else (f" Drawn: the {MOST_FIGURES} best of {len(best)} configurations with learned weights.")
    )
    with plot_style():
        plots = [
            draw(frame, by_label[label], f"_{place}", BY_NAME + capped)
            for place, label in enumerate(drawn, 1)
            for draw in (_bars, _over_steps)
        ]
        plots.append(mixing_plot(frame))
    return [plot for plot in plots if plot is not None]


def _bars(frame: Frame, readings: Readings, suffix: str, note: str) -> Plot:
    """Return the mean over seeds as bars, which start at 1 if all weights did, and each seed as a dot."""
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
            by_seed = [values.get(seed, "") for seed in seeds]
            label, mean = one.configuration.label, float(reading.mean_M[place])
            rows.append((label, reading.layer, name, mean, *by_seed))
    return Plot(f"hyperedge_weights{suffix}", figure, columns, rows)


def _over_steps(frame: Frame, readings: Readings, suffix: str, note: str) -> Plot | None:
    """Return the mean over seeds as a named line for each hyperedge, and each seed as a thin line."""
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
        rows += [
            (one.configuration.label, reading.layer, seed, step, name, value)
            for step, weights_SM in zip(found.steps_T.tolist(), found.weights_TSM.tolist(), strict=True)
            for seed, weights_M in zip(found.seeds, weights_SM, strict=True)
            for name, value in zip(reading.members, weights_M, strict=True)
        ]
    _label_left(panels, "weight" if most <= MAX_LABELS else f"weight (named: {EXTREMES} highest and lowest)")
    lay_out(figure)  # the labels need the height of the panels
    for axes, reading in zip(panels, readings, strict=True):
        label_ends(axes, reading.members, _ends(reading))
    columns = ("configuration", "layer", "seed", "step", "hyperedge", "weight")
    return Plot(f"hyperedge_weights_over_steps{suffix}", figure, columns, rows)


def _over(reading: WeightsReading) -> str:
    return counted(len(reading.seeds), "seed")


def _panels(
    frame: Frame, subject: str, note: str, readings: Readings, height: float, columns: int
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel for each layer, ``height`` inches high."""
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
    draw_bars(axes, reading.members, reading.mean_M, base, alpha=0.75)
    count, seeds = len(reading.members), len(reading.seeds)
    if seeds > 1:
        across_S = np.linspace(-0.28, 0.28, seeds)  # a seed has the same place in every bar
        places_SM = np.add.outer(across_S, np.arange(count))
        size = 3.2 if count <= 16 else 2.2 if count <= MAX_LABELS else 1.2
        look = {"color": "white", "ms": size, "mec": "black", "mew": 0.5, "zorder": 3}
        axes.plot(places_SM.ravel(), reading.weights_SM.ravel(), "o", **look)


def _draw_lines(axes: Axes, reading: WeightsReading) -> None:
    """Draw the mean lines first, as ``label_ends`` needs them."""
    found = reading.trajectories
    assert found is not None
    mean_TM = found.weights_TSM.mean(axis=1)
    named = named_lines(mean_TM[-1])
    looks: list[dict[str, Any]] = [
        line_look(place) if place in named else {"color": "#999999", "linestyle": "-"}
        for place in range(len(reading.members))
    ]
    for place, look in enumerate(looks):
        axes.plot(found.steps_T, mean_TM[:, place], lw=1.6 if place in named else 0.5, zorder=3, **look)
    seeds = len(found.seeds)
    if seeds * len(reading.members) > SEED_LINES:
        ends: list[Callable[..., np.ndarray]] = [np.min, np.max]
        low_T, high_T = (end(found.weights_TSM, axis=(1, 2)) for end in ends)
        axes.fill_between(found.steps_T, low_T, high_T, color=GREY, alpha=0.15, linewidth=0)
    elif seeds > 1:
        for place, look in enumerate(looks):
            axes.plot(found.steps_T, found.weights_TSM[:, :, place], lw=0.5, alpha=0.45, zorder=2, **look)
    step_axis(axes, found.steps_T.tolist())


def _ends(reading: WeightsReading) -> np.ndarray:
    assert reading.trajectories is not None
    return reading.trajectories.weights_TSM[-1].mean(axis=0)


MOST_MAPS = 24
E_WITH_VALUES, L_WITH_VALUES = 16, 24
"""Up to so many experts and layers, each cell shows its number."""
LEAST_RANGE = 0.02
"""The least range of the colours around 1, so that noise is not shown as a difference."""
CELL_WIDTH, CELL_HEIGHT, LETTER = 0.44, 0.26, 0.07
"""Sizes in inches."""
MIXING_NOTE = (
    "Mean over seeds of ‖∂y/∂x_e‖, normalised over the experts and averaged over tokens; "
    "the colour is the share times the number of experts E, 1 where all count alike. Seeds differ in which "
    "expert is which, so the mean over them flattens what each run prefers; the table has the deviation."
)


def mixing_plot(frame: Frame) -> Plot | None:
    """Return ``mixing``: a heat map for each configuration, with layers as rows and experts as columns.

    None where no run recorded the shares. Of more than ``MOST_MAPS`` configurations the reference and the
    best are drawn, and the figure says so. The csv has all, with the standard deviation over seeds.
    """
    readings = read_mixing(frame.comparison)
    if not readings:
        return None
    drawn, note = readings[:MOST_MAPS], MIXING_NOTE
    if len(readings) > MOST_MAPS:
        note += f" Drawn: the reference and the best, {MOST_MAPS} of {len(readings)} configurations."
    layers, experts = (max(reading.mean_LE.shape[axis] for reading in drawn) for axis in (0, 1))
    width = min(WIDTH, CELL_WIDTH * min(experts, E_WITH_VALUES) + 0.7)
    columns = max(1, min(4, len(drawn), int((WIDTH - 0.9) / max(width, 2.2))))
    rows = math.ceil(len(drawn) / columns)
    height = min(CELL_HEIGHT * layers, 4.0) + 0.85
    figure = frame.figure("Effective mixing: the share of each expert in the output", height * rows, note)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        figure.delaxes(axes)
    norm = _scale(drawn)
    letters = int((WIDTH - 0.9) / columns / LETTER)
    for place, (axes, reading) in enumerate(zip(grid.flat, drawn, strict=False)):
        _draw_map(axes, reading, norm)
        seeds = counted(len(reading.seeds), "seed")
        title = textwrap.fill(f"{frame.name(reading.configuration)} ({seeds})", max(12, letters))
        axes.set_title(title, loc="left", fontsize=8)
        axes.set_xlabel("expert" if place + columns >= len(drawn) else "")
        axes.set_ylabel("layer" if place % columns == 0 else "")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    figure.colorbar(images[0], ax=figure.axes, label="share × E", fraction=0.04, aspect=30, pad=0.02)
    table = ("configuration", "layer", "expert", "share", "standard_deviation", "seeds")
    return Plot("mixing", figure, table, [row for reading in readings for row in _rows(reading)])


def _rows(reading: MixingReading) -> list[tuple]:
    mean_LE, deviation_LE, rows = reading.mean_LE, reading.deviation_LE, []
    for (place, expert), mean in np.ndenumerate(mean_LE):
        deviation = "" if deviation_LE is None else float(deviation_LE[place, expert])
        label, layer = reading.configuration.label, reading.layers[place]
        rows.append((label, layer, expert, float(mean), deviation, len(reading.seeds)))
    return rows


def _scale(readings: list[MixingReading]) -> Normalize:
    """Return one colour scale for all maps, with 1 in the middle."""
    largest = max(float(np.abs(reading.ratio_LE - 1).max()) for reading in readings)
    reach = max(LEAST_RANGE, largest)
    return TwoSlopeNorm(vcenter=1, vmin=max(0.0, 1 - reach), vmax=1 + reach)


def _draw_map(axes: Axes, reading: MixingReading, norm: Normalize) -> None:
    image = axes.imshow(reading.ratio_LE, cmap="cividis", norm=norm, aspect="auto")
    axes.grid(False)
    layers, experts = reading.mean_LE.shape
    axes.xaxis.set_major_locator(MaxNLocator(min(experts, 16), integer=True))
    axes.set_yticks(range(layers), [str(layer) for layer in reading.layers])
    if layers > L_WITH_VALUES:
        axes.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    elif experts <= E_WITH_VALUES:
        write_cells(axes, image, reading.ratio_LE, reading.mean_LE)
