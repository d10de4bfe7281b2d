"""The plots of one run: training, memory by part, and hyperedge weights at the end and over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.record import Record, is_measured
from bench.report.plots.style import (
    BLUE,
    ENDINGS,
    GREEN,
    LABEL_POINTS,
    LINE_COLOURS,
    LINE_STYLES,
    ORANGE,
    PURPLE,
    SKY,
    Plot,
    corpus_words,
    headed_figure,
    label_ends,
    lay_out,
    log_ticks,
    perplexity_axis,
    plot_style,
    printable,
    shorten,
    step_axis,
    warnings_of,
    write_plots,
)
from bench.report.quantities import digits_for, exp_or_infinity, number
from bench.study.labels import name_parts
from bench.study.run_files import Row, RunData, read_run

PARTS = {"model": BLUE, "gradients": ORANGE, "optimizer": GREEN, "activations": PURPLE}
"""The parts of the memory of a training step, with their colours."""
NAMES = ("training", "hyperedge_weights", "hyperedge_weights_over_steps", "memory")


def plot_run(folder: Path) -> list[Path]:
    """Draw the plots of the run in ``folder`` into ``folder/plots``; return the files that were written.

    A plot whose quantity is missing is left out, and its files from an earlier call are deleted.

    Raises:
        Refused: ``folder`` holds no record.json that can be read.
        OSError: the disk refuses; no half-written file stays.
    """
    run = read_run(folder)
    with plot_style():
        figures = [draw(run) for draw in (training_plot, weights_plot, trajectories_plot, memory_plot)]
        written = write_plots(folder / "plots", [plot for plot in figures if plot is not None])
    for name in NAMES:
        for ending in ENDINGS:
            path = folder / "plots" / f"{name}.{ending}"
            if path not in written:
                path.unlink(missing_ok=True)
    return written


def run_figure(record: Record, subject: str, width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches below a header of the run."""
    model = record.config.model
    parts = [corpus_words(record), *name_parts(record.config), f"E {model['num_experts']}"]
    parts += [f"seed {record.seed}", record.run_name or record.run_id]
    about = " · ".join(shorten(part) for part in parts if part)
    return headed_figure(subject, about, warnings_of(record), width, height)


def memory_plot(run: RunData) -> Plot | None:
    """Return ``memory``: the peak of a training step by part; None where it was not measured."""
    memory = run.record.memory
    if not is_measured(memory) or not is_measured(memory.by_part):
        return None
    parts = {part: float(memory.by_part.get(part, 0)) for part in PARTS}
    total = sum(parts.values())
    subject = f"A training step takes {number(total / 2**20)} MiB of memory at its peak"
    figure = run_figure(run.record, subject, 8, 1.5)
    axes = figure.subplots()
    axes.set_yticks([])
    axes.set_ylim(0.6, -0.6)
    draw_parts(axes, [parts])
    return Plot("memory", figure, ("part", "bytes"), [(part, int(value)) for part, value in parts.items()])


def draw_parts(axes: Axes, rows: Sequence[dict[str, float]]) -> None:
    """Draw memory by part as stacked bars, from top to bottom, with the total beside each bar."""
    totals = [sum(parts.values()) / 2**20 for parts in rows]
    left = np.zeros(len(rows))
    for part, colour in PARTS.items():
        sizes = np.array([parts[part] / 2**20 for parts in rows])
        if not sizes.any():
            continue
        label = part if len(rows) > 1 else f"{part} {number(float(sizes[0]))} MiB"
        axes.barh(range(len(rows)), sizes, left=left, height=0.7, color=colour, label=label)
        left = left + sizes
    for place, total in enumerate(totals):
        axes.annotate(number(total), (total, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=7.5)  # fmt: skip
    axes.set_xlim(0, 1.1 * max(totals))
    axes.grid(False, axis="y")
    axes.set_xlabel("MiB at the peak of a training step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(PARTS), borderaxespad=0.2)


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
    figure = run_figure(run.record, _result(run), 10, 6.6)
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


def _result(run: RunData) -> str:
    """Return what the training reached, as a title."""
    scored = run.record.split()
    if scored is None:
        return f"Training: {run.record.status} after {run.train[-1]['step']:,} steps"
    return f"Training reached perplexity {number(exp_or_infinity(scored.loss_nats))} on validation"


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
    figure = run_figure(run.record, f"Hyperedge weights {run.when()}", 10, 2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    values = [value for layer in weights.values() for value in layer.values()]
    moved = max(abs(value - 1) for value in values) > 1e-5
    base = 1.0 if moved and _start_at_one(run, list(weights)) else 0.0
    for axes, (layer, by_name) in zip(grid.flat, weights.items(), strict=False):
        values_M = np.array(list(by_name.values()))
        _draw_bars(axes, list(by_name), values_M, base)
        if len(by_name) <= 16:
            _write_values(axes, values_M, base)
        axes.set_title(f"layer {layer}", loc="left", fontweight="bold")
    _remove_unused(figure, grid, len(weights))
    low, high = min(base, *values), max(base, *values)
    grid[0, 0].set_ylim(low - 0.12 * (high - low) * (base > low or low < 0), high + 0.12 * (high - low))
    for axes in grid[:, 0]:
        axes.set_ylabel("weight (1 at the start)" if base else "weight")
    for axes in list(grid.flat[: len(weights)])[-columns:]:
        axes.set_xlabel("hyperedge (its experts)")
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
    figure = run_figure(run.record, "Hyperedge weights over training", 5 * columns, height * rows)
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
        ends_M = run.trace[f"layer_{layer}.hyperedge_weights"][-1].astype(float)
        names = [printable(shorten(name, 16)) for name in by_name]
        label_ends(axes, [(float(ends_M[n]), names[n], _line_look(n)["color"]) for n in _named_lines(ends_M)])
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


def _draw_lines(axes: Axes, steps: np.ndarray, values_TM: np.ndarray) -> None:
    named = _named_lines(values_TM[-1])
    for place in range(values_TM.shape[1]):
        look: dict[str, Any] = {"color": "#cccccc", "linewidth": 0.5, "zorder": 1}
        if place in named:
            look = {**_line_look(place), "linewidth": 1.2}
        axes.plot(steps, values_TM[:, place], **look)


def _line_look(place: int) -> dict[str, Any]:
    """Return colour and style of the line of the hyperedge at ``place``."""
    return {
        "color": LINE_COLOURS[place % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[place % len(LINE_STYLES)],
    }


def _remove_unused(figure: Figure, grid: Any, used: int) -> None:
    for axes in grid.flat[used:]:
        figure.delaxes(axes)


def _draw_bars(axes: Axes, names: Sequence[str], values_M: np.ndarray, base: float) -> None:
    """Draw a named bar for each hyperedge from ``base`` on; bars below it differ in colour and hatch."""
    count, places_M, below_M = len(values_M), np.arange(len(values_M)), values_M < base
    look = {"color": np.where(below_M, ORANGE, BLUE).tolist(), "edgecolor": "black"}
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
    digits = max(3, digits_for(smallest))
    for x, value in enumerate(values_M):
        down = value < base
        place = {"xytext": (0, -2 if down else 2), "va": "top" if down else "bottom"}
        axes.annotate(
            f"{value:.{digits}f}", (x, value), textcoords="offset points", ha="center", fontsize=6.5, **place
        )


def _named_lines(ends_M: np.ndarray) -> list[int]:
    """Return the places of the lines that have a name, sorted by the height of their ends."""
    order = np.argsort(ends_M, kind="stable")
    order = order[np.isfinite(ends_M[order])]
    if len(order) > MAX_LABELS:
        order = np.concatenate([order[:EXTREMES], order[-EXTREMES:]])
    return order.tolist()
