"""Who listens to whom: the couplers' adjacency as heat maps."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from bench.analysis.plot_style import GREY, Plot, new_figure, printable, shorten
from bench.study.run_files import RunData

E_WITH_VALUES = 8  # up to so many experts each cell shows its number


def adjacency_plot(run: RunData) -> Plot | None:
    """Return ``adjacency``: a heat map a layer and graph layer, or None where the coupler has no graph.

    Row i listens to column j. Where no expert hears itself, the diagonal is left empty.
    """
    maps = {
        (layer, name): np.array(value, dtype=float)
        for layer, parts in run.parts("adjacency").items()
        for name, value in parts.items()
    }
    maps = {key: value for key, value in maps.items() if value.ndim == 2 and len(value) > 1}
    if not maps:
        return None
    names = sorted({name for _, name in maps})
    layers = sorted({layer for layer, _ in maps})
    experts = max(map(len, maps.values()))
    side = max(2.0, 0.36 * experts + 0.6) if experts <= E_WITH_VALUES else 2.6
    width = max(5.0, side * len(names) + 1.0)
    figure = new_figure(run.record, f"Adjacency {run.when()}", width, (side + 0.25) * len(layers))
    grid = figure.subplots(len(layers), len(names), squeeze=False)
    no_self = all(not np.diagonal(value).any() for value in maps.values())
    drawn = {key: _without_diagonal(value) if no_self else value for key, value in maps.items()}
    norm = _shared_scale(list(drawn.values()))
    for row, layer in enumerate(layers):
        for column, name in enumerate(names):
            if (layer, name) not in drawn:
                grid[row, column].remove()
                continue
            _draw_heat_map(grid[row, column], drawn[layer, name], norm)
            own = name.removeprefix("adjacency").removeprefix("_")
            title = f"layer {layer}" + (f" · graph layer {own}" if own else "")
            grid[row, column].set_title(printable(shorten(title, 40)), loc="left", fontsize=8)
            grid[row, column].set_xlabel("speaks (expert)" if row == len(layers) - 1 else "")
            grid[row, column].set_ylabel("listens (expert)" if column == 0 else "")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    figure.colorbar(images[0], ax=figure.axes, label="adjacency", shrink=min(1.0, 2.5 / len(layers)))
    table = [(layer, name, i, j, float(value[i, j])) for (layer, name), value in maps.items()
             for i in range(value.shape[0]) for j in range(value.shape[1])]  # fmt: skip
    return Plot("adjacency", figure, ("layer", "graph_layer", "listens", "speaks", "adjacency"), table)


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.eye(*matrix.shape, dtype=bool), np.nan, matrix)


def _shared_scale(matrices: list[np.ndarray]) -> Normalize:
    """Return one colour scale for all maps, at least 0.02 wide so that noise looks like noise."""
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.0, 0.02 - (high - low)) / 2
    return Normalize(low - margin, high + margin)


def _draw_heat_map(axes: Axes, matrix: np.ndarray, norm: Normalize) -> None:
    image = axes.imshow(matrix, cmap="cividis", norm=norm)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(min(len(matrix), 9), integer=True))
    if len(matrix) > E_WITH_VALUES:
        return
    for (i, j), value in np.ndenumerate(matrix):
        if np.isnan(value):
            axes.text(j, i, "–", ha="center", va="center", color=GREY, fontsize=7)
        else:
            red, green, blue, _ = image.cmap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=6.5,
                      color="white" if dark else "black")  # fmt: skip
