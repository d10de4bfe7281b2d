"""Loss curves of a study: training, validation, and the paired difference from the reference."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.analysis.plot_style import Plot, log_ticks
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.study_plots.curves import Curve
from bench.analysis.study_plots.drawing import cell, draw_curves, finish_steps
from bench.analysis.study_plots.frame import LEGEND_ROW, Frame
from bench.analysis.training_figure import MAX_NATS

Curves = dict[str, Curve]
COLUMNS = (
    "configuration", "step", "seeds", "train_loss_smoothed_nats",
    "train_loss_smoothed_standard_deviation_nats", "validation_loss_nats",
    "validation_loss_standard_deviation_nats", "validation_perplexity", "difference_from_reference_nats",
    "difference_from_reference_standard_deviation_nats",
)  # fmt: skip
TITLES = {
    "training": ("Training loss, smoothed", "loss (nats a token)"),
    "validation": ("Validation loss", "loss (nats a token)"),
    "difference": (
        "Difference from the reference, by seed",
        "validation loss less the reference's (nats)",
    ),
}
NOTE = "Lines: mean over the seeds that count. Bands: ± 1 standard deviation over seeds (none for one seed)."


def loss_curves_plot(frame: Frame) -> Plot | None:
    """Return ``loss_curves``, or None where no run that counts has a history."""
    training, validation = frame.training_losses, frame.validation_losses
    if not training and not validation:
        return None
    difference = _differences(frame, validation)
    panels = [("training", training), ("validation", validation), ("difference", difference)]
    panels = [(name, curves) for name, curves in panels if curves]
    legend = frame.legend()
    figure, axes = _panels(frame, len(panels), (len(legend.handles) + 1) * LEGEND_ROW)
    for place, (name, curves) in zip(axes, panels, strict=False):
        draw_curves(place, curves, frame.looks)
        _finish(place, name, curves, frame.names[frame.comparison.reference.label])
    axes[-1].axis("off")
    axes[-1].legend(handles=legend.handles, loc="upper left", bbox_to_anchor=(0, 1), handlelength=3.6,
                    title="best validation loss first", alignment="left")  # fmt: skip
    return Plot("loss_curves", figure, COLUMNS, _table(frame, training, validation, difference))


def _differences(frame: Frame, validation: Curves) -> Curves:
    reference = frame.comparison.reference.label
    if reference not in validation:
        return {}
    found = {label: curve.less(validation[reference]) for label, curve in validation.items()
             if label != reference}  # fmt: skip
    return {label: curve for label, curve in found.items() if curve is not None}


def _panels(frame: Frame, count: int, legend: float) -> tuple[Figure, list[Axes]]:
    """Return the figure and its panels, two a row, the last one for the legend."""
    rows = -(-(count + 1) // 2)
    heights = [3.0] * rows
    if count % 2 == 0:
        heights[-1] = legend  # alone in its row
    figure = frame.figure("Loss over training", sum(heights), NOTE, frame.about_looks())
    grid = figure.subplots(rows, 2, squeeze=False, height_ratios=heights)
    for axes in grid.flat[count + 1 :]:
        figure.delaxes(axes)
    return figure, list(grid.flat[: count + 1])


def _finish(axes: Axes, name: str, curves: Curves, reference: str) -> None:
    title, unit = TITLES[name]
    finish_steps(axes, title, unit, curves)
    low, high = axes.get_ylim()
    if name == "difference":
        axes.set_ylim(min(low, -0.002), max(high, 0.002))
        axes.axhline(0, color="black", linewidth=1.2)
        axes.set_xlabel(f"step · below 0: better than {reference}")
    if name == "validation" and high <= MAX_NATS:
        twin = axes.twinx()
        log_ticks(twin, math.exp(low), math.exp(high))
        twin.set_ylabel("perplexity = exp(loss)")
        twin.grid(False)
        twin.spines["right"].set_visible(True)


def _table(frame: Frame, training: Curves, validation: Curves, difference: Curves) -> list[list[Any]]:
    rows = []
    for found in frame.measured:
        label = found.configuration.label
        parts = [_by_step(curves.get(label)) for curves in (training, validation, difference)]
        for step in sorted(set().union(*parts)):
            (n, *loss), (m, *score), (_, *less) = (part.get(step, (0, None, None)) for part in parts)
            perplexity = None if score[0] is None else exp_or_infinity(score[0])
            rows.append([label, step, n or m, *loss, *score, perplexity, *less])
    return rows


def _by_step(curve: Curve | None) -> dict[int, tuple[int, float | None, float | None]]:
    if curve is None:
        return {}
    deviation_T = curve.deviation_T
    deviations = [None] * len(curve.steps_T) if deviation_T is None else deviation_T.tolist()
    return {step: (len(curve.seeds), cell(mean), cell(deviation)) for step, mean, deviation in
            zip(curve.steps_T.tolist(), curve.mean_T.tolist(), deviations, strict=True)}  # fmt: skip
