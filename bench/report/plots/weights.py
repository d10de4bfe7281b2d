"""What couplers learned, by seed: hyperedge weights, and the share of each expert in the output.

Both are heat maps of seeds by members, so that agreement of the seeds shows as columns. Letters: S seeds,
M members (hyperedges or experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm

from bench.record import MINUS
from bench.report.plots.frame import Frame
from bench.report.plots.style import Plot
from bench.report.quantities import counted, p_value
from bench.report.weights import WeightsReading, read_mixing, read_weights
from bench.study.runs import Configuration

MOST_MAPS = 24
MOST_NAMES, MOST_VALUES, WIDE = 40, 120, 12
"""The most names below a map, and the most cells and columns of a map that shows its values."""
LEAST_RANGE = 0.03
"""Shares whose root mean square distance from the middle is less than this show no difference."""
WEIGHTS_NOTE = (
    "Columns of one colour: the seeds agree. τ: mean Kendall rank correlation of two seeds. Experts of "
    "different seeds start from different random numbers."
)


@dataclass(frozen=True)
class Map:
    """One heat map: the values of a layer of a configuration."""

    configuration: Configuration
    layer: int
    members: Sequence[str]
    seeds: Sequence[int]
    values_SM: np.ndarray
    words: str = ""


def weights_plot(frame: Frame) -> Plot | None:
    """Return ``hyperedge_weights``, the learned weights by seed; None where no weight was learned."""
    readings = read_weights(frame.comparison)
    maps = [
        Map(one.configuration, one.layer, one.members, one.seeds, one.weights_SM, _words(one))
        for one in readings
    ]
    agreeing = sum(one.agreement is not None and one.agreement.reproducible for one in readings)
    several = any(len(one.seeds) > 1 for one in readings)
    subject = (
        "Do the seeds agree on which hyperedges matter?" if several else "Hyperedge weights after training"
    )
    if maps and all(one.agreement for one in readings):
        subject = f"The seeds agree on which hyperedges matter in {agreeing} of {counted(len(maps), 'layer')}"
    middle = 1.0 if all(one.from_one for one in readings) else None
    unit = "weight" if middle is None else "weight (1 at the start)"
    return _maps_plot(
        frame, "hyperedge_weights", maps, (subject, WEIGHTS_NOTE * several), ("hyperedge", unit), middle
    )


def _words(reading: WeightsReading) -> str:
    """Return the agreement of the seeds, short enough for the title of a map."""
    found = reading.agreement
    return "" if found is None else f"τ {found.tau:+z.2f}, p {p_value(found.p)}".replace("-", MINUS)


def mixing_plot(frame: Frame) -> Plot | None:
    """Return ``mixing``, the share of each expert in the output; None where all shares are 1/E."""
    maps = []
    for one in read_mixing(frame.comparison):
        experts = one.shares_SLE.shape[2]
        members = [str(expert) for expert in range(experts)]
        maps += [
            Map(one.configuration, layer, members, one.seeds, one.shares_SLE[:, place] * experts)
            for place, layer in enumerate(one.layers)
            if np.sqrt(np.mean((one.shares_SLE * experts - 1) ** 2)) > LEAST_RANGE
        ]
    subject = "Which experts does a coupler prefer?"
    note = "Share of the output by gradient, times the number of experts: 1 where all experts count equally."
    return _maps_plot(frame, "mixing", maps, (subject, note), ("expert", "share × E"), 1.0)


def _maps_plot(
    frame: Frame, name: str, maps: list[Map], texts: tuple[str, str], units: tuple[str, str],
    middle: float | None,
) -> Plot | None:  # fmt: skip
    """Return a plot with a map for each layer of the best configurations, with one scale for all."""
    if not maps:
        return None
    drawn, layers = maps[:MOST_MAPS], len({one.layer for one in maps})
    columns = 2 * layers if layers < 3 else min(layers, 6)
    columns = min(columns, len(drawn), 4 if max(len(one.members) for one in drawn) <= 8 else 2)
    left_out = (
        f"Drawn: {MOST_MAPS} of {len(maps)} maps, the best configurations." if len(maps) > MOST_MAPS else ""
    )
    rows = -(-len(drawn) // columns)
    most = max(len(one.seeds) for one in drawn)
    height = (min(max(0.2 * most, 1.1 if rows == 1 else 0.2), 2.4) + 0.85) * rows
    figure = frame.figure(texts[0], height, texts[1], left_out)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        figure.delaxes(axes)
    norm = _scale(drawn, middle)
    for place, (axes, one) in enumerate(zip(grid.flat, drawn, strict=False)):
        _draw_map(axes, one, norm, "cividis" if middle is None else "PuOr_r")
        title = f"{frame.names[one.configuration.label]}, layer {one.layer}"
        axes.set_title("\n".join(filter(None, (title, one.words))), loc="left", fontsize=7.5)
        axes.set_ylabel("seed" if place % columns == 0 else "")
        axes.set_xlabel(units[0] if place + columns >= len(drawn) else "")
    panels = list(grid.flat[: len(drawn)])
    figure.colorbar(panels[0].images[0], ax=panels, label=units[1], aspect=30, pad=0.02, fraction=0.04)
    table: list[list[Any]] = [
        [one.configuration.label, one.layer, seed, member, float(one.values_SM[y, x])]
        for one in maps
        for y, seed in enumerate(one.seeds)
        for x, member in enumerate(one.members)
    ]
    return Plot(name, figure, ("configuration", "layer", "seed", units[0], units[1].split(" (")[0]), table)


def _scale(maps: Sequence[Map], middle: float | None) -> Normalize:
    """Return one colour scale for all maps, with ``middle`` in its middle, and not finer than noise."""
    values = np.concatenate([one.values_SM.ravel() for one in maps])
    low, high = float(values.min()), float(values.max())
    if middle is None:
        return Normalize(low, max(high, low + LEAST_RANGE))
    reach = max(LEAST_RANGE, middle - low, high - middle)
    return TwoSlopeNorm(middle, middle - reach, middle + reach)


def _draw_map(axes: Axes, one: Map, norm: Normalize, colours: str) -> None:
    image = axes.imshow(one.values_SM, cmap=colours, norm=norm, aspect="auto")
    axes.grid(False)
    every = -(-len(one.members) // MOST_NAMES)
    names = list(one.members)[::every]
    turned = sum(map(len, names)) > 45
    axes.set_xticks(range(0, len(one.members), every), names, rotation=90 if turned else 0, fontsize=6.5)
    step = -(-len(one.seeds) // 12)
    axes.set_yticks(range(0, len(one.seeds), step), [str(seed) for seed in one.seeds[::step]], fontsize=6.5)
    if one.values_SM.size > MOST_VALUES or len(one.members) > WIDE:
        return
    for (row, column), value in np.ndenumerate(one.values_SM):
        red, green, blue, _ = image.cmap(image.norm(value))
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5.5, color=colour)
