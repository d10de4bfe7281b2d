"""The plots of a study: loss curves, perplexity, training, and those of ``cost``.

Each configuration is drawn as the mean over its seeds, with its spread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.record import MINUS
from bench.report.comparison import Comparison, ComparisonRow, Difference, simple_models
from bench.report.plots.cost import BEYOND, coupler_cost_plot, experts_plot, pareto_plot
from bench.report.plots.frame import (
    LEGEND_ROW,
    Curve,
    Ends,
    Frame,
    Scale,
    cell,
    draw_curves,
    finish_steps,
    intervals,
    name_rows,
    plain_rows,
    scale_of,
    set_scale,
    training_curve,
    usual_reach,
    write_above,
    write_beside,
    write_in_row,
)
from bench.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    MAX_NATS,
    VERMILLION,
    Plot,
    log_ticks,
    perplexity_axis,
    plain,
    plot_style,
    round_ticks,
)
from bench.report.quantities import exp_or_infinity, number, perplexities
from bench.report.statistics import MINIMUM_EFFECT_NATS

NAMES = ("loss_curves", "perplexity", "pareto", "experts", "coupler_cost", "training")
"""The names of all plots that ``study_plots`` can draw."""


def study_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return the plots of a comparison, in the order of ``NAMES``.

    A plot whose quantities were not measured is left out; without a run that counts there is no plot.
    """
    frame = Frame(study_name, comparison)
    if not frame.measured:
        return []
    with plot_style():
        drawn = (
            loss_curves_plot,
            perplexity_plot,
            pareto_plot,
            experts_plot,
            coupler_cost_plot,
            training_plot,
        )
        plots = [draw(frame) for draw in drawn]
    return [plot for plot in plots if plot is not None]


Curves = dict[str, Curve]
LOSS_CURVES_COLUMNS = (
    "configuration step seeds train_loss_smoothed_nats train_loss_smoothed_standard_deviation_nats "
    "validation_loss_nats validation_loss_standard_deviation_nats validation_perplexity "
    "difference_from_reference_nats difference_from_reference_standard_deviation_nats"
).split()
TITLES = {
    "training": ("Training loss, smoothed", "loss (nats per token)"),
    "validation": ("Validation loss", "loss (nats per token)"),
    "difference": ("Difference from the reference, by seed", "validation loss less the reference's (nats)"),
}
LOSS_CURVES_NOTE = (
    "Lines: mean over the seeds that count. Bands: ± 1 standard deviation over seeds (none for one seed)."
)


def loss_curves_plot(frame: Frame) -> Plot | None:
    """Return ``loss_curves``: training, validation, difference from the reference; None without a history."""
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
    look = {"handlelength": 3.6, "title": "best validation loss first", "alignment": "left"}
    axes[-1].legend(handles=legend.handles, loc="upper left", bbox_to_anchor=(0, 1), **look)
    rows = _loss_curves_table(frame, training, validation, difference)
    return Plot("loss_curves", figure, LOSS_CURVES_COLUMNS, rows)


def _differences(frame: Frame, validation: Curves) -> Curves:
    reference = frame.comparison.reference.label
    if reference not in validation:
        return {}
    others = {label: curve for label, curve in validation.items() if label != reference}
    found = {label: curve.less(validation[reference]) for label, curve in others.items()}
    return {label: curve for label, curve in found.items() if curve is not None}


def _panels(frame: Frame, count: int, legend: float) -> tuple[Figure, list[Axes]]:
    """Return the figure and its panels, two per row; the last panel is for the legend."""
    rows = -(-(count + 1) // 2)
    heights = [3.0] * rows
    if count % 2 == 0:
        heights[-1] = legend  # alone in its row
    figure = frame.figure("Loss over training", sum(heights), LOSS_CURVES_NOTE, frame.about_looks())
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
        axes.axhline(0, color="black", lw=1.2)
        axes.set_xlabel(f"step · below 0: better than {reference}")
    if name == "validation":
        perplexity_axis(axes)


def _loss_curves_table(
    frame: Frame, training: Curves, validation: Curves, difference: Curves
) -> list[list[Any]]:
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
    both = zip(map(cell, curve.mean_T.tolist()), map(cell, deviations), strict=True)
    return {step: (len(curve.seeds), *pair) for step, pair in zip(curve.steps_T.tolist(), both, strict=True)}


TRAINING_COLUMNS = (
    "configuration step seeds train_loss_smoothed_nats validation_loss_nats validation_perplexity "
    "learning_rate gradient_norm_smoothed"
).split()
TRAINING_NOTE = (
    "Lines: mean over the seeds that count; perplexity is exp of the mean loss. The gradient norm is "
    "before clipping. Bands over seeds are in loss_curves."
)


def training_plot(frame: Frame) -> Plot | None:
    """Return ``training`` with a line for each configuration; None where no run that counts has a step."""
    losses, validation = frame.training_losses, frame.validation_losses
    if not losses:
        return None
    rates, norms = (_of_steps(frame, key) for key in ("learning_rate", "gradient_norm"))
    norms = {label: curve.smoothed().thinned() for label, curve in norms.items()}
    rates = {label: curve.thinned() for label, curve in rates.items()}
    legend = frame.legend()
    figure = frame.figure("Training", 5.6 + legend.height, TRAINING_NOTE, frame.about_looks())
    (loss, evaluation), (rate, norm) = figure.subplots(2, 2)
    _draw(loss, frame, losses, "Training loss, smoothed", "loss (nats per token)")
    _draw_perplexity(evaluation, frame, validation)
    _draw(rate, frame, rates, "Learning rate", "learning rate", gap=math.inf)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _draw(norm, frame, norms, "Gradient norm, smoothed", "Euclidean norm")
    _scale_of_norms(norm, norms)
    legend.below(figure)
    rows = _training_table(frame, losses, validation, rates, norms)
    return Plot("training", figure, TRAINING_COLUMNS, rows)


def _of_steps(frame: Frame, key: str) -> dict[str, Curve]:
    curves = {row.configuration.label: training_curve(row.configuration, key) for row in frame.measured}
    return {label: curve for label, curve in curves.items() if curve is not None}


def _draw(axes: Axes, frame: Frame, curves: dict[str, Curve], title: str, unit: str, gap: float = 10) -> None:
    draw_curves(axes, curves, frame.looks, bands=False)
    finish_steps(axes, title, unit, curves, gap)


def _draw_perplexity(axes: Axes, frame: Frame, curves: dict[str, Curve]) -> None:
    """Draw exp of the mean loss, on a logarithmic axis."""
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
        axes.set_ylabel("loss (nats per token)")
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


def _training_table(frame: Frame, *curves: dict[str, Curve]) -> list[list[Any]]:
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


MOST_ROWS, FIRST, LAST = 80, 60, 18
LOOKS = {
    "better": (BLUE, "o", BLUE),
    "worse": (VERMILLION, "s", VERMILLION),
    "equivalent": (GREEN, "D", GREEN),
    "not resolved": (GREY, "o", "white"),
    "reference": ("black", "o", "black"),
    "": (GREY, "o", GREY),
}
"""The colour of the edge, the shape and the colour of the face, by verdict."""
PERPLEXITY_COLUMNS = (
    "configuration seed seeds perplexity perplexity_low_95 perplexity_high_95 loss_nats difference_nats "
    "difference_low_95_nats difference_high_95_nats seeds_paired p_holm verdict status"
).split()
PERPLEXITY_NOTE = (
    "Left: exp of the mean loss over seeds, its 95% t interval (none for one seed), and each seed as a "
    "faint dot. Right: difference of loss paired by seed, 95% t interval; the verdict is by a sign-flip "
    "test after Holm."
)


def perplexity_plot(frame: Frame) -> Plot | None:
    """Return ``perplexity`` with a row for each configuration, the best first, failed ones last."""
    shown, left_out = _shown(frame)
    step = 0.26 if len(shown) <= 30 else 0.2
    rest = f"{left_out} configurations between the best and the worst: table only." if left_out else ""
    subject = "Perplexity on validation, and the paired difference from the reference"
    figure = frame.figure(subject, step * len(shown) + 1.1, PERPLEXITY_NOTE, rest)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_perplexities(left, frame, shown)
    _draw_lines(left, frame)
    _draw_differences(right, frame, shown)
    names = [f"{frame.name(row.configuration)}  n {row.loss.n}" for row in shown]
    name_rows(left, names, 8 if step > 0.2 else 7)
    plain_rows(right, len(shown))
    return Plot("perplexity", figure, PERPLEXITY_COLUMNS, _perplexity_table(frame))


def _shown(frame: Frame) -> tuple[list[ComparisonRow], int]:
    """Return the rows that are drawn, and the number of rows that are not."""
    rows = frame.ranked
    if len(rows) <= MOST_ROWS:
        return rows, 0
    reference = [row for row in rows[FIRST:-LAST] if row.configuration is frame.comparison.reference]
    shown = [*rows[:FIRST], *reference, *rows[-LAST:]]
    return shown, len(rows) - len(shown)


def _kind(frame: Frame, row: ComparisonRow) -> str:
    if row.configuration is frame.comparison.reference:
        return "reference"
    return row.against.verdict.kind if row.against else ""


def _draw_perplexities(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    """Draw the mean, its interval and the seeds of each row; a mean off the scale is written."""
    for place, row in enumerate(rows):
        if row.loss.mean is None:
            write_in_row(axes, place, f"no result: {row.configuration.statuses()}", colour=VERMILLION)
    measured = [(place, row) for place, row in enumerate(rows) if row.loss.mean is not None]
    places = [place for place, _ in measured]
    means = [exp_or_infinity(row.loss.mean or 0.0) for _, row in measured]
    seeds = [
        (exp_or_infinity(loss), place + 0.22) for place, row in measured for loss in row.loss.values.values()
    ]
    known = [value for value in (*(value for value, _ in seeds), *means) if value < BEYOND] or [1.0]
    ends = [perplexities(row.loss.interval) for _, row in measured]
    bounded = [both if both and both[1] < BEYOND else None for both in ends]
    low, high, log = scale_of(known, bounded, ratio=3)
    lines = [value for value in simple_models(frame.comparison.group).values() if _on_scale(value, low, high)]
    low = min([low, *(value / 1.02 for value in lines)])
    high = max([high, *(value * 1.02 for value in lines)])
    set_scale(axes, "x", Scale(low, high, log))
    axes.scatter(*np.array(seeds).T, s=9, color="#999999", linewidth=0, zorder=2)
    intervals(axes, places, bounded, colors="black", linewidths=1.6, zorder=3)
    kinds = [_kind(frame, row) for _, row in measured]
    _draw_marks(axes, list(zip(places, means, kinds, strict=True)))
    for place, mean in zip(places, means, strict=True):
        if not low <= mean <= high:
            write_in_row(axes, place, f"{number(mean)} →", right=True)
    axes.set_xlabel("perplexity (lower is better)")


def _on_scale(value: float, low: float, high: float) -> bool:
    return low - 0.3 * (high - low) <= value <= high + 0.3 * (high - low)


def _draw_marks(axes: Axes, marks: list[tuple[int, float, str]]) -> None:
    """Draw each mean in the colour and shape of its verdict."""
    for kind in {kind for *_, kind in marks}:
        colour, marker, face = LOOKS[kind]
        xs, ys = zip(*((value, place) for place, value, own in marks if own == kind), strict=True)
        axes.scatter(xs, ys, s=30, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.2, zorder=4)


def _draw_lines(axes: Axes, frame: Frame) -> None:
    """Name the simple models above the panel, each with a line, or with an arrow if it is off the scale."""
    axes.set_title("Perplexity", loc="left", fontweight="bold", pad=28)
    low, high = axes.get_xlim()
    for level, (name, value) in enumerate(simple_models(frame.comparison.group).items()):
        text, height = f"{name} {number(value, 1 if value < 1e3 else 0)}", 3 + 11 * level
        transform = axes.get_xaxis_transform()
        place, align = (high, "right") if value > high else (low, "left")
        if low <= value <= high:
            axes.axvline(value, color="black", ls=("--", ":")[level], lw=1.2, zorder=1)
            place, align = value, ("left" if value < (low + high) / 2 else "right")
        else:
            text = f"{text} →" if value > high else f"← {text}"
        write_above(axes, text, place, height, transform, align)


def _draw_differences(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    found = [(place, row.against) for place, row in enumerate(rows) if row.against is not None]
    low, high = _difference_range([against for _, against in found])
    axes.axvspan(-MINIMUM_EFFECT_NATS, MINIMUM_EFFECT_NATS, color="#dddddd", zorder=0.5, linewidth=0)
    axes.axvline(0, color="black", lw=1)
    set_scale(axes, "x", Scale(low, high))
    kinds = [(place, against.paired.mean, against.verdict.kind) for place, against in found]
    ends = [against.paired.interval for _, against in found]
    intervals(axes, [place for place, _ in found], ends, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [mark for mark in kinds if low <= mark[1] <= high])
    for place, mean, _ in kinds:
        if not low <= mean <= high:
            value = f"{mean:.3g}".replace("-", MINUS)
            write_in_row(axes, place, f"{value} →" if mean > high else f"← {value}", right=mean > high)
    write_beside(axes, [_verdict(frame, row) for row in rows], 8 if len(rows) <= 30 else 7)
    axes.set_title("Difference from the reference", loc="left", fontweight="bold", pad=28)
    band = f"grey band: ±{MINIMUM_EFFECT_NATS:g} nats, the minimum effect"
    write_above(axes, band, 0, 3, "axes fraction")
    axes.set_xlabel("nats per token (below 0: better)")


def _verdict(frame: Frame, row: ComparisonRow) -> str:
    if row.against is not None:
        return row.against.verdict.words()
    if row.configuration is frame.comparison.reference:
        return "reference"
    return "no seed in common" if row.loss.n else "not measured"


def _difference_range(found: list[Difference]) -> Ends:
    """Return a range with the minimum effect and most means and intervals."""
    edge = 1.4 * MINIMUM_EFFECT_NATS
    paired = [against.paired for against in found]
    values = [value for one in paired for value in (one.mean, *(one.interval or ()))] or [0.0]
    reach = usual_reach([abs(value) for value in values], gap=10, least=edge)
    low, high = max(min(-edge, *values), -reach), min(max(edge, *values), reach)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _perplexity_table(frame: Frame) -> list[list[Any]]:
    table: list[list[Any]] = []
    for row in frame.ranked:
        label, against, mean = row.configuration.label, row.against, row.loss.mean
        quality = [
            None if mean is None else exp_or_infinity(mean),
            *(perplexities(row.loss.interval) or (None, None)),
            mean,
        ]
        judged: list[Any] = [None] * 5
        if against is not None:
            paired = against.paired
            ends = paired.interval or (None, None)
            judged = [paired.mean, *ends, paired.n, against.p_adjusted]
        verdict = against.verdict.words() if against else _kind(frame, row) or None
        table.append([label, None, row.loss.n, *quality, *judged, verdict, row.configuration.statuses()])
        for seed, loss in row.loss.values.items():
            own = against.by_seed.get(seed) if against else None
            table.append([label, seed, 1, exp_or_infinity(loss), None, None, loss, own, *[None] * 6])
    for name, value in simple_models(frame.comparison.group).items():
        line = f"{name} (reference line)"
        table.append([line, None, None, value, None, None, math.log(value), *[None] * 7])
    return table
