"""The 2 × 2 figure of a training: loss, evaluation, learning rate, gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench.analysis.numbers import number
from bench.analysis.plot_style import BLUE, ORANGE, SKY, Plot, log_ticks, new_figure, step_axis
from bench.analysis.quantities import exp_or_infinity
from bench.study.run_files import Row, RunData

FEW, MARKED = 12, 40  # so few steps, and so few evaluations, are marked one by one
MAX_NATS = 25  # beyond it perplexity has no readable scale
COLUMNS = (
    "step", "train_tokens", "train_loss_nats", "train_loss_smoothed_nats", "learning_rate", "gradient_norm",
    "validation_tokens", "validation_loss_nats", "validation_perplexity",
)  # fmt: skip


def training_plot(run: RunData) -> Plot | None:
    """Return the figure ``training``, or None where no step was recorded."""
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
    return Plot("training", figure, COLUMNS, _table(run, smoothed))


def smoothing_span(steps: int) -> int:
    """Return the span of the smoothing: a tenth of the steps, from 2 to 100."""
    return min(100, max(2, steps // 10))


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving average with α = 2 / (span + 1).

    The weights of the values so far are normalised to 1, so the first value does not count more
    than the others and the curve starts where the data start.
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
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, borderpad=0,
                columnspacing=1.2, handlelength=2.4)  # fmt: skip


def _marker(values: Sequence[Any], most: int = FEW) -> str:
    return "o" if len(values) <= most else ""


def _draw_loss(axes: Axes, train: list[Row], smoothed: list[float], span: int) -> None:
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
    marker = _marker(steps)
    axes.plot(steps, losses, color=SKY, linewidth=0.9, marker=marker, markersize=3, label="each batch")
    axes.plot(steps, smoothed, color=BLUE, linewidth=2, marker=marker, markersize=3,
              label=f"exponential average, span {span} steps")  # fmt: skip
    _panel(axes, "Training loss", "loss (nats a token)")
    _legend(axes)


def _draw_evaluation(axes: Axes, run: RunData) -> None:
    """Draw one curve with two scales: perplexity = exp(loss), so the right axis is logarithmic."""
    _panel(axes, "Perplexity on validation", "loss (nats a token)")
    if not run.validation:
        axes.text(0.5, 0.5, "no evaluation was reached", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    losses = [_loss(row) for row in run.validation]
    best = min(range(len(losses)), key=losses.__getitem__)
    label = f"best {number(exp_or_infinity(losses[best]))} at step {run.validation[best]['step']:,}"
    steps, marker = [row["step"] for row in run.validation], _marker(losses, MARKED)
    axes.plot(steps, losses, color=BLUE, marker=marker, markersize=4, label=label)
    lines = _reference_losses(run)
    for (name, loss), style in zip(lines.items(), ("--", ":"), strict=False):
        label = f"{name} {number(exp_or_infinity(loss))}"
        axes.axhline(loss, color="black", linestyle=style, linewidth=1.2, label=label)
    _legend(axes)
    known = [*losses, *lines.values()]
    margin = max(0.06 * (max(known) - min(known)), 0.01)
    low, high = min(known) - margin, max(known) + margin
    axes.set_ylim(low, high)
    if high > MAX_NATS:
        return
    twin = axes.twinx()
    log_ticks(twin, math.exp(low), math.exp(high))
    twin.set_ylabel("perplexity = exp(loss)")
    twin.grid(False)
    twin.spines["right"].set_visible(True)


def _reference_losses(run: RunData) -> dict[str, float]:
    """Return the losses of simple models, where the record scores the tokens that the evaluations did."""
    scored = run.record.split()
    if scored is None or any(row["tokens"] != scored.tokens for row in run.validation):
        return {}
    sums = {"unigram": scored.unigram_nll_sum, "trigram": scored.kneser_ney_trigram_nll_sum}
    return {name: nll / scored.tokens for name, nll in sums.items() if nll is not None}


def _draw_learning_rate(axes: Axes, train: list[Row]) -> None:
    rates = [row["learning_rate"] for row in train]
    axes.plot([row["step"] for row in train], rates, color=BLUE, marker=_marker(rates), markersize=3,
              label=f"AdamW, highest {max(rates):.3g}")  # fmt: skip
    axes.set_ylim(0, 1.06 * (max(rates) or 1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _panel(axes, "Learning rate", "learning rate")
    _legend(axes)


def _draw_gradient_norm(axes: Axes, train: list[Row], threshold: float) -> None:
    norms = [row["gradient_norm"] for row in train]
    axes.plot([row["step"] for row in train], norms, color=ORANGE, linewidth=1, marker=_marker(norms),
              markersize=3, label="before clipping")  # fmt: skip
    positive = [norm for norm in norms if 0 < norm < math.inf]
    largest = max(positive, default=threshold)
    if threshold <= 5 * largest:
        axes.axhline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"clip at {threshold:g}")
        positive.append(threshold)
    else:
        axes.plot([], [], color="black", linestyle="--", label=f"clip at {threshold:g}, above the axis")
    if positive and max(positive) > 20 * min(positive):
        log_ticks(axes, min(positive) / 1.2, max(positive) * 1.2)
    else:
        axes.set_ylim(0, 1.06 * max(positive, default=1.0))
    _panel(axes, "Gradient norm", "Euclidean norm")
    _legend(axes)
