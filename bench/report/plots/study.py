"""The plots of a whole study: each configuration as the mean over its seeds, with how far they scatter.

Loss curves of a study: training, validation, and the paired difference from the reference.

The 2 × 2 figure of a training, over a study: a line a configuration.

Perplexity with its interval, and the paired difference from the reference with the verdict in words.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.record import MINUS
from bench.report.comparison import Comparison, ComparisonRow, Difference
from bench.report.plots.cost import coupler_cost_plot, experts_plot, pareto_plot
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
    scale_of,
    set_scale,
    stripes,
    training_curve,
    usual_reach,
)
from bench.report.plots.run import MAX_NATS
from bench.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    Plot,
    log_ticks,
    plain,
    plot_style,
    round_ticks,
)
from bench.report.quantities import exp_or_infinity, number, perplexities
from bench.report.statistics import MINIMUM_EFFECT_NATS
from bench.report.tables import simple_models

NAMES = ("loss_curves", "perplexity", "pareto", "experts", "coupler_cost", "training")
"""Every name that a plot of ``study_plots`` can have."""


def study_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return the plots of a comparison, in the order of ``NAMES``.

    A figure whose quantities nothing measured is left out: all of them where no run counts.
    """
    frame = Frame(study_name, comparison)
    if not frame.measured:
        return []
    with plot_style():
        plots = [loss_curves_plot(frame), perplexity_plot(frame), pareto_plot(frame), experts_plot(frame),
                 coupler_cost_plot(frame), training_plot(frame)]  # fmt: skip
    return [plot for plot in plots if plot is not None]


Curves = dict[str, Curve]
LOSS_CURVES_COLUMNS = (
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
LOSS_CURVES_NOTE = (
    "Lines: mean over the seeds that count. Bands: ± 1 standard deviation over seeds (none for one seed)."
)


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
    return Plot(
        "loss_curves",
        figure,
        LOSS_CURVES_COLUMNS,
        _loss_curves_table(frame, training, validation, difference),
    )


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
        axes.axhline(0, color="black", linewidth=1.2)
        axes.set_xlabel(f"step · below 0: better than {reference}")
    if name == "validation" and high <= MAX_NATS:
        twin = axes.twinx()
        log_ticks(twin, math.exp(low), math.exp(high))
        twin.set_ylabel("perplexity = exp(loss)")
        twin.grid(False)
        twin.spines["right"].set_visible(True)


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
    return {step: (len(curve.seeds), cell(mean), cell(deviation)) for step, mean, deviation in
            zip(curve.steps_T.tolist(), curve.mean_T.tolist(), deviations, strict=True)}  # fmt: skip


TRAINING_COLUMNS = (
    "configuration", "step", "seeds", "train_loss_smoothed_nats", "validation_loss_nats",
    "validation_perplexity", "learning_rate", "gradient_norm_smoothed",
)  # fmt: skip
TRAINING_NOTE = (
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
    figure = frame.figure("Training", 5.6 + legend.height, TRAINING_NOTE, frame.about_looks())
    (loss, evaluation), (rate, norm) = figure.subplots(2, 2)
    _draw(loss, frame, losses, "Training loss, smoothed", "loss (nats a token)")
    _draw_perplexity(evaluation, frame, validation)
    _draw(rate, frame, rates, "Learning rate", "learning rate", gap=math.inf)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _draw(norm, frame, norms, "Gradient norm, smoothed", "Euclidean norm")
    _scale_of_norms(norm, norms)
    legend.below(figure)
    return Plot(
        "training", figure, TRAINING_COLUMNS, _training_table(frame, losses, validation, rates, norms)
    )


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
BEYOND = 1e9  # a perplexity that no scale shows
LOOKS = {
    "better": (BLUE, "o", BLUE), "worse": (VERMILLION, "s", VERMILLION), "equivalent": (GREEN, "D", GREEN),
    "not resolved": (GREY, "o", "white"), "reference": ("black", "o", "black"), "": (GREY, "o", GREY),
}  # fmt: skip
"""Verdict → colour of the edge, shape, colour of the face."""
PERPLEXITY_COLUMNS = (
    "configuration", "seed", "seeds", "perplexity", "perplexity_low_95", "perplexity_high_95", "loss_nats",
    "difference_nats", "difference_low_95_nats", "difference_high_95_nats", "seeds_paired", "p_holm",
    "verdict", "status",
)  # fmt: skip
PERPLEXITY_NOTE = (
    "Left: exp of the mean loss over seeds, its 95 % t interval (none for one seed), and each seed as a "
    "faint dot. Right: difference of loss paired by seed, 95 % t interval; the verdict is by a sign-flip "
    "test after Holm."
)


def perplexity_plot(frame: Frame) -> Plot | None:
    """Return ``perplexity``: a row a configuration, the best first, failed ones last."""
    rows = _rows(frame)
    shown, left_out = _shown(frame, rows)
    step = 0.26 if len(shown) <= 30 else 0.2
    rest = f"{left_out} configurations between the best and the worst: table only." if left_out else ""
    figure = frame.figure("Perplexity on validation, and the paired difference from the reference",
                          step * len(shown) + 1.1, PERPLEXITY_NOTE, rest)  # fmt: skip
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_perplexities(left, frame, shown)
    _draw_lines(left, frame)
    _draw_differences(right, frame, shown)
    small = 8 if step > 0.2 else 7
    left.set_yticks(range(len(shown)), [_row_name(frame, row) for row in shown], fontsize=small)
    left.set_ylim(len(shown) - 0.4, -0.6)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        stripes(axes, len(shown))
    return Plot("perplexity", figure, PERPLEXITY_COLUMNS, _perplexity_table(frame, rows))


def _rows(frame: Frame) -> list[ComparisonRow]:
    failed = [row for row in frame.comparison.rows if row.loss.mean is None]
    return [*frame.measured, *failed]


def _shown(frame: Frame, rows: list[ComparisonRow]) -> tuple[list[ComparisonRow], int]:
    """Return the rows that are drawn, and how many are not."""
    if len(rows) <= MOST_ROWS:
        return rows, 0
    reference = [row for row in rows[FIRST:-LAST] if row.configuration is frame.comparison.reference]
    shown = [*rows[:FIRST], *reference, *rows[-LAST:]]
    return shown, len(rows) - len(shown)


def _row_name(frame: Frame, row: ComparisonRow) -> str:
    return f"{frame.name(row.configuration)}  n {row.loss.n}"


def _kind(frame: Frame, row: ComparisonRow) -> str:
    if row.configuration is frame.comparison.reference:
        return "reference"
    return row.against.verdict.kind if row.against else ""


def _draw_perplexities(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    seeds, means, ends = [], [], []
    for place, row in enumerate(rows):
        if row.loss.mean is None:
            axes.text(0.01, place, f"no result: {row.configuration.statuses()}", va="center",
                      transform=axes.get_yaxis_transform(), fontsize=7, color=VERMILLION)  # fmt: skip
            continue
        seeds += [(exp_or_infinity(value), place + 0.22) for value in row.loss.values.values()]
        means.append((place, exp_or_infinity(row.loss.mean), row))
        ends.append(perplexities(row.loss.interval))
    known = [value for value in (*(value for value, _ in seeds), *(mean for _, mean, _ in means))
             if value < BEYOND] or [1.0]  # fmt: skip
    bounded = [both if both and both[1] < BEYOND else None for both in ends]
    low, high, log = scale_of(known, bounded, ratio=3)
    lines = [value for value in simple_models(frame.comparison.group).values() if _on_scale(value, low, high)]
    low, high = (
        min([low, *(value / 1.02 for value in lines)]),
        max([high, *(value * 1.02 for value in lines)]),
    )
    set_scale(axes, "x", Scale(low, high, log))
    axes.scatter(*np.array(seeds).T, s=9, color="#999999", linewidth=0, zorder=2)
    intervals(axes, [place for place, *_ in means], bounded, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [(place, mean, _kind(frame, row)) for place, mean, row in means])
    for place, mean, _ in means:
        if not low <= mean <= high:
            axes.text(0.99, place, f"{number(mean)} →", ha="right",
                      va="center", transform=axes.get_yaxis_transform(), fontsize=7)  # fmt: skip
    axes.set_xlabel("perplexity (less is better)")


def _on_scale(value: float, low: float, high: float) -> bool:
    return low - 0.3 * (high - low) <= value <= high + 0.3 * (high - low)


def _draw_marks(axes: Axes, marks: list[tuple[int, float, str]]) -> None:
    """Draw each mean in the colour and shape of its verdict."""
    for kind in {kind for *_, kind in marks}:
        colour, marker, face = LOOKS[kind]
        xs, ys = zip(*((value, place) for place, value, own in marks if own == kind), strict=True)
        axes.scatter(xs, ys, s=30, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.2, zorder=4)


def _draw_lines(axes: Axes, frame: Frame) -> None:
    """Mark the simple models above the panel: a line where it is on scale, else an arrow to where it lies."""
    axes.set_title("Perplexity", loc="left", fontweight="bold", pad=28)
    low, high = axes.get_xlim()
    for level, (name, value) in enumerate(simple_models(frame.comparison.group).items()):
        text, height = f"{name} {number(value, 1 if value < 1e3 else 0)}", 3 + 11 * level
        transform = axes.get_xaxis_transform()
        place, align = (high, "right") if value > high else (low, "left")
        if low <= value <= high:
            axes.axvline(value, color="black", linestyle=("--", ":")[level], linewidth=1.2, zorder=1)
            place, align = value, ("left" if value < (low + high) / 2 else "right")
        else:
            text = f"{text} →" if value > high else f"← {text}"
        axes.annotate(text, (place, 1), xycoords=transform, xytext=(0, height), textcoords="offset points",
                      ha=align, va="bottom", fontsize=8)  # fmt: skip


def _draw_differences(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    found = [(place, row.against) for place, row in enumerate(rows) if row.against is not None]
    low, high = _difference_range([against for _, against in found])
    axes.axvspan(-MINIMUM_EFFECT_NATS, MINIMUM_EFFECT_NATS, color="#dddddd", zorder=0.5, linewidth=0)
    axes.axvline(0, color="black", linewidth=1)
    set_scale(axes, "x", Scale(low, high))
    kinds = [(place, against.paired.mean, against.verdict.kind) for place, against in found]
    ends = [against.paired.interval for _, against in found]
    intervals(axes, [place for place, _ in found], ends, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [mark for mark in kinds if low <= mark[1] <= high])
    for place, mean, _ in kinds:
        if not low <= mean <= high:
            value = f"{mean:.3g}".replace("-", MINUS)
            text, at, align = (f"{value} →", 0.99, "right") if mean > high else (f"← {value}", 0.01, "left")
            axes.text(
                at, place, text, ha=align, va="center", transform=axes.get_yaxis_transform(), fontsize=7
            )
    _write_verdicts(axes, frame, rows)
    axes.set_title("Difference from the reference", loc="left", fontweight="bold", pad=28)
    band = f"grey band: ±{MINIMUM_EFFECT_NATS:g} nats, the minimum effect"
    axes.annotate(band, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
                  fontsize=8, va="bottom")  # fmt: skip
    axes.set_xlabel("nats a token (below 0: better)")


def _write_verdicts(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    """Write each verdict at the end of its row, as ticks of a second axis, for which room is made."""
    words = []
    for row in rows:
        text = "no seed in common" if row.loss.n else "not measured"
        if row.configuration is frame.comparison.reference:
            text = "reference"
        words.append(row.against.verdict.words() if row.against else text)
    beside = axes.twinx()
    beside.set_ylim(len(rows) - 0.4, -0.6)
    beside.set_yticks(range(len(rows)), words, fontsize=8 if len(rows) <= 30 else 7)
    beside.tick_params(axis="y", length=0)
    beside.grid(False)


def _difference_range(found: list[Difference]) -> Ends:
    """Return the range of differences: of most means and their intervals, and the minimum effect."""
    edge = 1.4 * MINIMUM_EFFECT_NATS
    values = [value for against in found
              for value in (against.paired.mean, *(against.paired.interval or ()))] or [0.0]  # fmt: skip
    reach = usual_reach([abs(value) for value in values], gap=10, least=edge)
    low, high = max(min(-edge, *values), -reach), min(max(edge, *values), reach)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _perplexity_table(frame: Frame, rows: list[ComparisonRow]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for row in rows:
        label, against = row.configuration.label, row.against
        low, high = perplexities(row.loss.interval) or (None, None)
        mean = row.loss.mean
        paired = None if against is None else against.paired
        difference: list[Any] = [None] * 4 if paired is None else [
            paired.mean, *(paired.interval or (None, None)), paired.n]  # fmt: skip
        verdict = against.verdict.words() if against else _kind(frame, row) or None
        table.append([
            label, None, row.loss.n, None if mean is None else exp_or_infinity(mean), low, high, mean,
            *difference, against and against.p_adjusted, verdict, row.configuration.statuses(),
        ])  # fmt: skip
        for seed, loss in row.loss.values.items():
            own = against.by_seed.get(seed) if against else None
            table.append([label, seed, 1, exp_or_infinity(loss), None, None, loss, own, *[None] * 6])
    for name, value in simple_models(frame.comparison.group).items():
        table.append(
            [f"{name} (reference line)", None, None, value, None, None, math.log(value), *[None] * 7]
        )
    return table
