"""Heat maps on one scale, one for each configuration and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from bench.record import MINUS
from bench.report.plots.frame import Frame

MOST_MAPS = 24
MOST_NAMES, MOST_VALUES, WIDE = 40, 120, 12
"""The most names below a map, and the most cells and columns of a map that shows its values."""
LEAST_RANGE = 0.03
"""A smaller range of values shows no difference."""


@dataclass(frozen=True)
class Map:
    """One heat map; a cell that is NaN stays empty."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray


@dataclass(frozen=True)
class Texts:
    """What a figure of maps says."""

    subject: str
    note: str
    row: str
    column: str
    unit: str


def maps_figure(frame: Frame, maps: Sequence[Map], texts: Texts, norm: Normalize, columns: int) -> Figure:
    """Return a figure with the first ``MOST_MAPS`` maps on one scale, at most ``columns`` in a row."""
    drawn = maps[:MOST_MAPS]
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    more = len(maps) > MOST_MAPS
    left_out = f"Drawn: {MOST_MAPS} of {len(maps)} maps, the best configurations." if more else ""
    most = max(len(one.rows) for one in drawn)
    height = (min(max(0.2 * most, 1.1 if rows == 1 else 0.2), 2.4) + 0.85) * rows
    figure = frame.figure(texts.subject, height, texts.note, left_out)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        figure.delaxes(axes)
    for place, (axes, one) in enumerate(zip(grid.flat, drawn, strict=False)):
        _draw_map(axes, one, norm)
        axes.set_title(one.title, loc="left", fontsize=7.5)
        axes.set_ylabel(texts.row if place % columns == 0 else "")
        axes.set_xlabel(texts.column if place + columns >= len(drawn) else "")
    panels = list(grid.flat[: len(drawn)])
    figure.colorbar(panels[0].images[0], ax=panels, label=texts.unit, aspect=30, pad=0.02, fraction=0.04)
    return figure


def scale_of_maps(maps: Sequence[Map], middle: float | None) -> Normalize:
    """Return one colour scale for the drawn maps, with ``middle`` in its middle, and not finer than noise."""
    values = np.concatenate([one.values.ravel() for one in maps[:MOST_MAPS]])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if middle is None:
        return Normalize(low, max(high, low + LEAST_RANGE))
    reach = max(LEAST_RANGE, middle - low, high - middle)
    return TwoSlopeNorm(middle, middle - reach, middle + reach)


def two_digits(value: float) -> str:
    """Return a number of a map with two decimals."""
    return f"{value:z.2f}".replace("-", MINUS)


def _draw_map(axes: Axes, one: Map, norm: Normalize) -> None:
    colours = "PuOr_r" if isinstance(norm, TwoSlopeNorm) else "cividis"
    image = axes.imshow(one.values, cmap=colours, norm=norm, aspect="auto")
    axes.grid(False)
    every = -(-len(one.columns) // MOST_NAMES)
    names = list(one.columns)[::every]
    turned = sum(map(len, names)) > 45
    axes.set_xticks(range(0, len(one.columns), every), names, rotation=90 if turned else 0, fontsize=6.5)
    step = -(-len(one.rows) // 12)
    axes.set_yticks(range(0, len(one.rows), step), list(one.rows)[::step], fontsize=6.5)
    if one.values.size > MOST_VALUES or len(one.columns) > WIDE:
        return
    for (row, column), value in np.ndenumerate(one.values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, two_digits(value), ha="center", va="center", fontsize=5.5, color=colour)
