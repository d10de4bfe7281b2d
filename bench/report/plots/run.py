"""The plots of one run: training, hyperedge weights, adjacency and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.optimize import isotonic_regression

from bench.record import is_measured
from bench.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LINE_COLOURS,
    LINE_STYLES,
    ORANGE,
    SKY,
    Plot,
    log_ticks,
    new_figure,
    perplexity_axis,
    plot_style,
    printable,
    shorten,
    step_axis,
    write_plots,
)
from bench.report.quantities import exp_or_infinity, number
from bench.study.run_files import Row, RunData, read_run

PARTS = {
    "expert": ("experts", BLUE, ""),
    "coupler": ("couplers", ORANGE, "///"),
    "other": ("embeddings and norms", GREEN, "..."),
}
NAMES = ("training", "hyperedge_weights", "hyperedge_weights_over_steps", "adjacency", "parameters")
ENDINGS = ("svg", "png", "csv")


def plot_run(folder: Path) -> list[Path]:
    """Draw the plots of the run in ``folder`` into ``folder/plots``; return the files that were written.

    A plot whose quantity is missing is left out, and its files from an earlier call are deleted.

    Raises:
        Refused: ``folder`` holds no record.json that can be read.
        OSError: the disk refuses; no half-written file stays.
    """
    run = read_run(folder)
    with plot_style():
        figures = [
            draw(run)
            for draw in (training_plot, weights_plot, trajectories_plot, adjacency_plot, parameters_plot)
        ]
        written = write_plots(folder / "plots", [plot for plot in figures if plot is not None])
    for name in NAMES:
        for ending in ENDINGS:
            path = folder / "plots" / f"{name}.{ending}"
            if path not in written:
                path.unlink(missing_ok=True)
    return written


def parameters_plot(run: RunData) -> Plot | None:
    """Return ``parameters`` with a bar for each part; None where the model was not built."""
    counts = run.record.parameters
    if not is_measured(counts):
        return None
    figure = new_figure(run.record, f"Parameters by part: {counts.total:,} in all", 10, 1.7)
    axes = figure.subplots()
    by_part = {part: getattr(counts, part) for part in PARTS}
    for part, count in by_part.items():
        _, colour, hatch = PARTS[part]
        bar = axes.barh(PARTS[part][0], count, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5)
        share = 100 * count / counts.total
        axes.bar_label(bar, [f"{count:,} ({share:.1f} %)"], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("parameters")
    axes.set_xlim(0, 1.3 * max(by_part.values()))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(False, axis="y")
    return Plot("parameters", figure, ("part", "parameters"), list(by_part.items()))


FEW, MARKED = 12, 40
"""Up to so many steps, and so many evaluations, each has a marker."""
TRAINING_COLUMNS = (
    "step train_tokens train_loss_nats train_loss_smoothed_nats learning_rate gradient_norm "
    "validation_tokens validation_loss_nats validation_perplexity"
).split()


def training_plot(run: RunData) -> Plot | None:
    """Return ``training``: loss, evaluation, learning rate, gradient norm; None without a step."""
    if not run.train:
        return None
    figure = new_figure(run.record, "Training", 10, 6.6)
    (loss, evaluation), (rate, norm) = figure.subplots(2, 2)
    span = smoothing_span(len(run.train))
    smoothed = smooth([row["loss"] for row in run.train], span)
    _draw_loss(loss, run.train, smoothed, span)
    _draw_evaluation(evaluation, run)
    _draw_learning_rate(rate, run.train)
    _draw_gradient_norm(norm, run.train, run.record.config.training["max_grad_norm"])
    steps = [row["step"] for row in (*run.train, *run.validation)]
    for axes in (loss, evaluation, rate, norm):
        step_axis(axes, steps, margin=0.02)
    return Plot("training", figure, TRAINING_COLUMNS, _table(run, smoothed))


def smoothing_span(steps: int) -> int:
    """Return the span of the smoothing: a tenth of the steps, from 2 to 100."""
    return min(100, max(2, steps // 10))


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving average with α = 2 / (span + 1).

    The weights are normalised to 1 at each step, so the curve starts at the first value, and the first value
    does not count more than the others.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _table(run: RunData, smoothed: list[float]) -> list[list[Any]]:
    train = {row["step"]: (row, value) for row, value in zip(run.train, smoothed, strict=True)}
    evaluated = {row["step"]: row for row in run.validation}
    rows = []
    for step in sorted(train | evaluated):
        cells: list[Any] = [step, *[None] * 8]
        if step in train:
            row, value = train[step]
            cells[1:6] = row["tokens"], row["loss"], value, row["learning_rate"], row["gradient_norm"]
        if step in evaluated:
            loss = _loss(evaluated[step])
            cells[6:] = evaluated[step]["tokens"], loss, exp_or_infinity(loss)
        rows.append(cells)
    return rows


def _loss(row: Row) -> float:
    return row["nll_sum"] / row["tokens"]


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", pad=20, fontweight="bold")
    axes.set_ylabel(unit)


def _legend(axes: Axes) -> None:
    tight = {"borderaxespad": 0.2, "borderpad": 0, "columnspacing": 1.2, "handlelength": 2.4}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, **tight)


def _line(
    axes: Axes,
    rows: list[Row],
    values: Sequence[float],
    label: str,
    colour: str,
    width: float = 1.5,
    most: int = FEW,
) -> None:
    """Draw a value of each row by its step, with a marker each if there are at most ``most``."""
    steps, marker = [row["step"] for row in rows], "o" if len(values) <= most else ""
    axes.plot(steps, values, color=colour, lw=width, marker=marker, ms=3, label=label)


def _draw_loss(axes: Axes, train: list[Row], smoothed: list[float], span: int) -> None:
    _line(axes, train, [row["loss"] for row in train], "each batch", SKY, 0.9)
    _line(axes, train, smoothed, f"exponential average, span {span} steps", BLUE, 2)
    _panel(axes, "Training loss", "loss (nats per token)")
    _legend(axes)


def _draw_evaluation(axes: Axes, run: RunData) -> None:
    """Draw the loss, with a second, logarithmic axis for the perplexity = exp(loss)."""
    _panel(axes, "Perplexity on validation", "loss (nats per token)")
    if not run.validation:
        axes.text(0.5, 0.5, "no evaluation was reached", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    losses = [_loss(row) for row in run.validation]
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"best {number(exp_or_infinity(losses[best]))} at step {run.validation[best]['step']:,}"
    _line(axes, run.validation, losses, label, BLUE, most=MARKED)
    lines = _reference_losses(run)
    for (name, loss), style in zip(lines.items(), ("--", ":"), strict=False):
        label = f"{name} {number(exp_or_infinity(loss))}"
        axes.axhline(loss, color="black", ls=style, lw=1.2, label=label)
    _legend(axes)
    known = [*losses, *lines.values()]
    margin = max(0.06 * (max(known) - min(known)), 0.01)
    axes.set_ylim(min(known) - margin, max(known) + margin)
    perplexity_axis(axes)


def _reference_losses(run: RunData) -> dict[str, float]:
    """Return the losses of simple models, if the final evaluation scored the same tokens as the others."""
    scored = run.record.split()
    if scored is None or any(row["tokens"] != scored.tokens for row in run.validation):
        return {}
    sums = {"unigram": scored.unigram_nll_sum, "trigram": scored.kneser_ney_trigram_nll_sum}
    return {name: nll / scored.tokens for name, nll in sums.items() if nll is not None}


def _draw_learning_rate(axes: Axes, train: list[Row]) -> None:
    rates = [row["learning_rate"] for row in train]
    _line(axes, train, rates, f"AdamW, highest {max(rates):.3g}", BLUE)
    axes.set_ylim(0, 1.06 * (max(rates) or 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _panel(axes, "Learning rate", "learning rate")
    _legend(axes)


def _draw_gradient_norm(axes: Axes, train: list[Row], threshold: float) -> None:
    norms = [row["gradient_norm"] for row in train]
    _line(axes, train, norms, "before clipping", ORANGE, 1)
    positive = [norm for norm in norms if 0 < norm < math.inf]
    largest = max(positive, default=threshold)
    if threshold <= 5 * largest:
        axes.axhline(threshold, color="black", ls="--", lw=1.2, label=f"clip at {threshold:g}")
        positive.append(threshold)
    else:
        axes.plot([], [], color="black", ls="--", label=f"clip at {threshold:g}, above the axis")
    if positive and max(positive) > 20 * min(positive):
        log_ticks(axes, min(positive) / 1.2, max(positive) * 1.2)
    else:
        axes.set_ylim(0, 1.06 * max(positive, default=1.0))
    _panel(axes, "Gradient norm", "Euclidean norm")
    _legend(axes)


Weights = dict[int, dict[str, float]]
"""The weights by layer and by hyperedge."""
MAX_LABELS = 60
"""The most names below bars, or at the ends of lines."""
EXTREMES = 10
"""Of more lines, the number of highest and of lowest lines that have a colour and a name."""
LABEL_POINTS = 8.5
"""The height of a line of text of 7 points."""


def weights_plot(run: RunData) -> Plot | None:
    """Return ``hyperedge_weights``: bars by layer and hyperedge; None without such weights.

    The weights are those of the checkpoint that is best on validation. The bars start at 1 if all weights
    started at 1 and a weight moved, else at 0.
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
        values_M = np.array(list(by_name.values()))
        draw_bars(axes, list(by_name), values_M, base)
        if len(by_name) <= 16:
            _write_values(axes, values_M, base)
        axes.set_title(f"layer {layer}", loc="left", fontweight="bold")
    _remove_unused(figure, grid, len(weights))
    low, high = min(base, *values), max(base, *values)
    grid[0, 0].set_ylim(low - 0.12 * (high - low) * (base > low or low < 0), high + 0.12 * (high - low))
    for axes in grid[:, 0]:
        axes.set_ylabel("weight (1 at the start)" if base else "weight")
    rows_out = [(layer, name, value) for layer, found in weights.items() for name, value in found.items()]
    return Plot("hyperedge_weights", figure, ("layer", "hyperedge", "weight"), rows_out)


def trajectories_plot(run: RunData) -> Plot | None:
    """Return ``hyperedge_weights_over_steps``; None with fewer than two samples or without names."""
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
        table += [
            (int(step), layer, name, float(value))
            for step, row_M in zip(steps, values_TM, strict=True)
            for name, value in zip(by_name, row_M, strict=True)
        ]
    _remove_unused(figure, grid, len(weights))
    for axes in grid[:, 0]:
        axes.set_ylabel("weight" if most <= MAX_LABELS else f"weight (named: {EXTREMES} highest and lowest)")
    lay_out(figure)  # the labels need the height of the panels
    for axes, (layer, by_name) in zip(grid.flat, weights.items(), strict=False):
        label_ends(axes, list(by_name), run.trace[f"layer_{layer}.hyperedge_weights"][-1].astype(float))
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


def lay_out(figure: Figure) -> None:
    """Place the panels of a figure now."""
    figure.get_layout_engine().execute(figure)  # pyright: ignore[reportOptionalMemberAccess]


def _draw_lines(axes: Axes, steps: np.ndarray, values_TM: np.ndarray) -> None:
    named = named_lines(values_TM[-1])
    for place in range(values_TM.shape[1]):
        look: dict[str, Any] = {"color": "#cccccc", "linewidth": 0.5, "zorder": 1}
        if place in named:
            look = {**line_look(place), "linewidth": 1.2}
        axes.plot(steps, values_TM[:, place], **look)


def line_look(place: int) -> dict[str, Any]:
    """Return colour and style of the line of the hyperedge at ``place``."""
    return {
        "color": LINE_COLOURS[place % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[place % len(LINE_STYLES)],
    }


def _remove_unused(figure: Figure, grid: Any, used: int) -> None:
    for axes in grid.flat[used:]:
        figure.delaxes(axes)


def draw_bars(axes: Axes, names: Sequence[str], values_M: np.ndarray, base: float, **settings: Any) -> None:
    """Draw a named bar for each hyperedge from ``base`` on; bars below it differ in colour and hatch."""
    count, places_M, below_M = len(values_M), np.arange(len(values_M)), values_M < base
    look = {"color": np.where(below_M, ORANGE, BLUE).tolist(), "edgecolor": "black", **settings}
    width = 0.5 if count <= MAX_LABELS else 0
    bars = axes.bar(places_M, values_M - base, bottom=base, linewidth=width, **look)
    for bar, below in zip(bars, below_M, strict=True):
        bar.set_hatch("///" if below else "")
    axes.axhline(base, color="black", lw=0.8)
    every = math.ceil(count / MAX_LABELS)
    short = [printable(shorten(name, 16)) for name in names]
    turned = count * max(map(len, short)) > 60
    axes.set_xticks(places_M[::every], short[::every], rotation=90 if turned else 0, fontsize=7)
    axes.set_xlim(-0.6, count - 0.4)
    axes.grid(False, axis="x")


def _write_values(axes: Axes, values_M: np.ndarray, base: float) -> None:
    smallest = max(float(np.ptp(np.append(values_M, base))), 1e-6)
    digits = min(6, max(3, 1 - math.floor(math.log10(smallest))))
    for x, value in enumerate(values_M):
        down = value < base
        place = {"xytext": (0, -2 if down else 2), "va": "top" if down else "bottom"}
        axes.annotate(
            f"{value:.{digits}f}", (x, value), textcoords="offset points", ha="center", fontsize=6.5, **place
        )


def named_lines(ends_M: np.ndarray) -> list[int]:
    """Return the places of the lines that have a name, sorted by the height of their ends."""
    order = np.argsort(ends_M, kind="stable")
    order = order[np.isfinite(ends_M[order])]
    if len(order) > MAX_LABELS:
        order = np.concatenate([order[:EXTREMES], order[-EXTREMES:]])
    return order.tolist()


def label_ends(axes: Axes, names: Sequence[str], ends_M: np.ndarray) -> None:
    """Write each name beside the end of its line, moved apart where the names would overlap.

    The first lines of ``axes`` are those of the hyperedges, in their order.
    """
    order = named_lines(ends_M)
    if not order:
        return
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    places = spread((ends_M[order] - low) / (high - low), LABEL_POINTS / points)
    for line, place in zip(order, places, strict=True):
        end = (ends_M[line] - low) / (high - low)
        look = {"color": axes.lines[line].get_color(), "ls": "-", "lw": 0.7, "clip_on": False}
        axes.plot([1.0, 1.05, 1.07], [end, place, place], transform=axes.transAxes, **look)
        name = printable(shorten(names[line], 16))
        axes.text(1.08, place, name, transform=axes.transAxes, va="center", fontsize=7)


def spread(wanted: np.ndarray, distance: float) -> np.ndarray:
    """Return places in [0, 1], at least ``distance`` apart and nearest to ``wanted`` (ascending).

    This is a least-squares fit that keeps the order: y_i − i·distance must not fall, which is an isotonic
    regression. If the places do not fit into [0, 1], they stand closer.
    """
    if len(wanted) > 1:
        distance = min(distance, 1 / (len(wanted) - 1))
    offsets = np.arange(len(wanted)) * distance
    return np.clip(isotonic_regression(wanted - offsets).x, 0, 1 - offsets[-1]) + offsets


E_WITH_VALUES = 8
"""Up to so many experts, each cell of a heat map shows its number."""


def adjacency_plot(run: RunData) -> Plot | None:
    """Return ``adjacency``: a heat map for each layer and graph layer; None where the coupler has no graph.

    Row i listens to column j. If no expert listens to itself, the diagonal is empty.
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
    table = [
        (layer, name, *cell, float(value))
        for (layer, name), matrix in maps.items()
        for cell, value in np.ndenumerate(matrix)
    ]
    return Plot("adjacency", figure, ("layer", "graph_layer", "listens", "speaks", "adjacency"), table)


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.eye(*matrix.shape, dtype=bool), np.nan, matrix)


def _shared_scale(matrices: list[np.ndarray]) -> Normalize:
    """Return one colour scale for all maps, at least 0.02 wide, so that noise does not look large."""
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.0, 0.02 - (high - low)) / 2
    return Normalize(low - margin, high + margin)


def _draw_heat_map(axes: Axes, matrix: np.ndarray, norm: Normalize) -> None:
    image = axes.imshow(matrix, cmap="cividis", norm=norm)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(min(len(matrix), 9), integer=True))
    if len(matrix) <= E_WITH_VALUES:
        write_cells(axes, image, matrix, matrix)


def write_cells(axes: Axes, image: AxesImage, colours: np.ndarray, values: np.ndarray) -> None:
    """Write the values into the cells of a heat map, in black or white by the colour of the cell."""
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(column, row, "–", ha="center", va="center", color=GREY, fontsize=7)
            continue
        red, green, blue, _ = image.cmap(image.norm(colours[row, column]))
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=6.5, color=colour)
