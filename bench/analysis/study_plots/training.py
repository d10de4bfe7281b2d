"""The 2 × 2 figure of a training, over a study: a line a configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench.analysis.plot_style import Plot, log_ticks, plain, round_ticks
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.study_plots.curves import Curve, training_curve
from bench.analysis.study_plots.drawing import cell, draw_curves, finish_steps
from bench.analysis.study_plots.frame import Frame
from bench.analysis.training_figure import MAX_NATS

COLUMNS = (
    "configuration", "step", "seeds", "train_loss_smoothed_nats", "validation_loss_nats",
    "validation_perplexity", "learning_rate", "gradient_norm_smoothed",
)  # fmt: skip
NOTE = (
    "Lines: mean over the seeds that count; perplexity is exp of the mean loss. The gradient norm is "
    "before clipping. Bands over seeds are in loss_curves."
)


def training_plot(frame: Frame) -> Plot | None:
    """Return ``training``, or None where no run that counts recorded a step."""
    losses, validation = frame.training_losses, frame.validation_losses
    if not losses:
        return None
    rates, norms = (_of_steps(frame, key) for key in ("learning_rate", "gradient_norm"))
    norms = {label: curve.smoothed().thinned() for label, curve in norms.items()}
    rates = {label: curve.thinned() for label, curve in rates.items()}
    legend = frame.legend()
    figure = frame.figure("Training", 5.6 + legend.height, NOTE, frame.about_looks())
    (loss, evaluation), (rate, norm) = figure.subplots(2, 2)
    _draw(loss, frame, losses, "Training loss, smoothed", "loss (nats a token)")
    _draw_perplexity(evaluation, frame, validation)
    _draw(rate, frame, rates, "Learning rate", "learning rate", gap=math.inf)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _draw(norm, frame, norms, "Gradient norm, smoothed", "Euclidean norm")
    _scale_of_norms(norm, norms)
    legend.below(figure)
    return Plot("training", figure, COLUMNS, _table(frame, losses, validation, rates, norms))


def _of_steps(frame: Frame, key: str) -> dict[str, Curve]:
    curves = {row.configuration.label: training_curve(row.configuration, key) for row in frame.measured}
    return {label: curve for label, curve in curves.items() if curve is not None}


def _draw(axes: Axes, frame: Frame, curves: dict[str, Curve], title: str, unit: str, gap: float = 10) -> None:
    draw_curves(axes, curves, frame.looks, bands=False)
    finish_steps(axes, title, unit, curves, gap)


def _draw_perplexity(axes: Axes, frame: Frame, curves: dict[str, Curve]) -> None:
    """Draw exp of the mean loss on a logarithmic axis."""
    title = "Perplexity on validation"
    if not curves:
        axes.set_title(title, loc="left", fontweight="bold")
        axes.text(0.5, 0.5, "no evaluation was recorded", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    _draw(axes, frame, curves, title, "perplexity = exp(loss)")
    low, high = axes.get_ylim()
    if high > MAX_NATS:
        axes.set_ylabel("loss (nats a token)")
        return
    ticks = round_ticks(math.exp(low), math.exp(high))
    axes.set_yticks([math.log(tick) for tick in ticks], [plain(tick) for tick in ticks])


def _scale_of_norms(axes: Axes, curves: dict[str, Curve]) -> None:
    values = np.concatenate([curve.mean_T for curve in curves.values()])
    known = values[np.isfinite(values) & (values > 0)]
    if len(known) and known.max() > 20 * known.min():
        log_ticks(axes, known.min() / 1.2, known.max() * 1.2)
    else:
        axes.set_ylim(bottom=0)


def _table(frame: Frame, *curves: dict[str, Curve]) -> list[list[Any]]:
    rows = []
    for found in frame.measured:
        label = found.configuration.label
        own = [by_label.get(label) for by_label in curves]
        parts = [curve.means() if curve else {} for curve in own]
        seeds = max((len(curve.seeds) for curve in own if curve), default=0)
        for step in sorted(set().union(*parts)):
            loss, score, rate, norm = (cell(part.get(step)) for part in parts)
            perplexity = None if score is None else exp_or_infinity(score)
            rows.append([label, step, seeds, loss, score, perplexity, rate, norm])
    return rows
