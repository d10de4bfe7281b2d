"""How much each expert moves each layer's output, as heat maps. Letters: L layers, E experts."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from bench.analysis.numbers import counted
from bench.analysis.plot_style import Plot
from bench.analysis.study_plots.frame import WIDTH, Frame
from bench.analysis.weights import MixingReading, read_mixing

MOST_MAPS = 24
E_WITH_VALUES, L_WITH_VALUES = 16, 24  # up to so many experts and layers each cell shows its number
LEAST_RANGE = 0.02  # of the colours about 1, so that noise looks like noise
CELL_WIDTH, CELL_HEIGHT, LETTER = 0.44, 0.26, 0.07  # inches
NOTE = (
    "Mean over seeds of ‖∂y/∂x_e‖, normalised over the experts and averaged over tokens; "
    "the colour is the share times the number of experts E, 1 where all count alike. Seeds differ in which "
    "expert is which, so the mean over them flattens what each run prefers; the table has the deviation."
)


def mixing_plot(frame: Frame) -> Plot | None:
    """Return ``mixing``: rows are layers, columns experts; or None where nothing recorded it.

    Of more than ``MOST_MAPS`` configurations the reference and the best are drawn, which the figure says;
    the table has all, with the standard deviation over seeds.
    """
    readings = read_mixing(frame.comparison)
    if not readings:
        return None
    drawn, note = readings[:MOST_MAPS], NOTE
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
        _draw(axes, reading, norm)
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
    deviation_LE = reading.deviation_LE
    return [(reading.configuration.label, layer, expert, float(reading.mean_LE[place, expert]),
             "" if deviation_LE is None else float(deviation_LE[place, expert]), len(reading.seeds))
            for place, layer in enumerate(reading.layers)
            for expert in range(reading.mean_LE.shape[1])]  # fmt: skip


def _scale(readings: list[MixingReading]) -> Normalize:
    """Return one colour scale for all maps, with 1 in its middle."""
    largest = max(float(np.abs(reading.ratio_LE - 1).max()) for reading in readings)
    reach = max(LEAST_RANGE, largest)
    return TwoSlopeNorm(vcenter=1, vmin=max(0.0, 1 - reach), vmax=1 + reach)


def _draw(axes: Axes, reading: MixingReading, norm: Normalize) -> None:
    ratio_LE, mean_LE = reading.ratio_LE, reading.mean_LE
    image = axes.imshow(ratio_LE, cmap="cividis", norm=norm, aspect="auto")
    axes.grid(False)
    layers, experts = mean_LE.shape
    axes.xaxis.set_major_locator(MaxNLocator(min(experts, 16), integer=True))
    axes.set_yticks(range(layers), [str(layer) for layer in reading.layers])
    if layers > L_WITH_VALUES:
        axes.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    if experts > E_WITH_VALUES or layers > L_WITH_VALUES:
        return
    for (layer, expert), ratio in np.ndenumerate(ratio_LE):
        red, green, blue, _ = image.cmap(norm(ratio))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(expert, layer, f"{mean_LE[layer, expert]:.3f}", ha="center", va="center", fontsize=6.5,
                  color="white" if dark else "black")  # fmt: skip
