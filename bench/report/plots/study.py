"""The plots of a study about quality: perplexity with verdicts, verdicts of all pairs, loss over training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from bench.record import MINUS
from bench.report.comparison import Comparison, ComparisonRow, Difference, simple_models
from bench.report.plots.cost import coupler_cost_plot, memory_plot, pareto_plot
from bench.report.plots.experts import ablation_plot, effective_rank_plot, similarity_plot
from bench.report.plots.frame import (
    BEST,
    Curve,
    Ends,
    Frame,
    Scale,
    cell,
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
    LIGHT,
    VERMILLION,
    Look,
    Plot,
    count_axis,
    label_ends,
    lay_out,
    plot_style,
    shorten,
)
from bench.report.plots.swept import swept_plots
from bench.report.plots.weights import mixing_plot, weights_plot
from bench.report.quantities import TRAINING_FLOPS, counted, exp_or_infinity, number, perplexities, signed
from bench.report.statistics import MINIMUM_EFFECT_NATS
from bench.study.hypotheses import seeds_needed


def study_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return the plots of a comparison; none without a run that counts.

    In this order: ``perplexity``, ``perplexity_by_FLAG`` for each flag with several numbers, ``loss_curves``,
    ``verdicts``, ``pareto``, ``coupler_cost``, ``memory``, ``hyperedge_weights``, ``mixing``,
    ``expert_similarity``, ``expert_ablation`` and ``effective_rank``. A plot whose quantity was not measured,
    or that shows no difference, is left out.
    """
    frame = Frame(study_name, comparison)
    if not frame.measured:
        return []
    with plot_style():
        others: list[Callable[[Frame], Plot | None]] = [loss_curves_plot, verdicts_plot, pareto_plot]
        others += [coupler_cost_plot, memory_plot, weights_plot, mixing_plot]
        others += [similarity_plot, ablation_plot, effective_rank_plot]
        plots = [perplexity_plot(frame), *swept_plots(frame), *(draw(frame) for draw in others)]
    return [plot for plot in plots if plot is not None]


MOST_ROWS, FIRST, LAST = 80, 60, 18
BEYOND = 1e9
"""A perplexity that no scale shows."""
KINDS = {"better": BLUE, "worse": VERMILLION, "equivalent": GREEN, "not resolved": GREY}
"""The colour of each verdict."""
PERPLEXITY_COLUMNS = (
    "configuration seed seeds perplexity perplexity_low_95 perplexity_high_95 loss_nats difference_nats "
    "difference_low_95_nats difference_high_95_nats seeds_paired p_holm verdict status"
).split()


def perplexity_plot(frame: Frame) -> Plot:
    """Return ``perplexity`` with a row for each configuration, the best first, failed ones last."""
    shown, left_out = _shown(frame)
    size = 8 if len(shown) <= 30 else 7
    rest = f"{left_out} configurations between the best and the worst: table only." if left_out else ""
    figure = frame.figure(answer(frame), (0.26 if size == 8 else 0.2) * len(shown) + 1.0, rest)
    compared = any(row.against is not None for row in shown)
    left, *others = figure.subplots(1, 1 + compared, sharey=True, squeeze=False)[0]
    seeds = {row.loss.n for row in frame.measured}
    n = "" if len(seeds) == 1 else "  n {}"
    name_rows(left, [frame.name(row.configuration) + n.format(row.loss.n) for row in shown], size)
    _draw_perplexities(left, frame, shown)
    _draw_simple_models(left, frame)
    for right in others:
        plain_rows(right, len(shown))
        _draw_differences(right, frame, shown)
        verdicts = [_verdict(frame, row) for row in shown]
        colours = [KINDS[row.against.verdict.kind] if row.against else "black" for row in shown]
        write_beside(right, verdicts, size, colours)
    return Plot("perplexity", figure, PERPLEXITY_COLUMNS, _perplexity_table(frame))


def answer(frame: Frame) -> str:
    """Return which configurations are better than the baseline, and how many are not, in one sentence."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for row in frame.measured:
        if row.against is not None:
            found[row.against.verdict.kind].append(frame.names[row.configuration.label])
    others = sum(map(len, found.values()))
    if not others:
        return "Which perplexity does each configuration reach?"
    if others == 1:
        ((kind, (name,)),) = ((kind, names) for kind, names in found.items() if names)
        known = {"better": f"{name} is better than ", "worse": f"{name} is worse than "}
        known["equivalent"] = f"{name} is equivalent to "
        return known.get(kind, f"{name} is not significantly different from ") + frame.baseline
    best = found.pop("better")
    head = f"{', '.join(best)} {'is' if len(best) == 1 else 'are'} better than "
    if not best or len(best) > 3:
        head = f"{len(best) or 'None'} of {others} configurations {'are' if best else 'is'} better than "
    rest = [f"{len(some)} {'is' if len(some) == 1 else 'are'} {kind}" for kind, some in found.items() if some]
    return "; ".join(filter(None, (head + frame.baseline, ", ".join(rest))))


def _shown(frame: Frame) -> tuple[list[ComparisonRow], int]:
    """Return the rows that are drawn, and the number of rows that are not."""
    rows = frame.ranked
    if len(rows) <= MOST_ROWS:
        return rows, 0
    reference = [row for row in rows[FIRST:-LAST] if row.configuration is frame.comparison.reference]
    shown = [*rows[:FIRST], *reference, *rows[-LAST:]]
    return shown, len(rows) - len(shown)


def _draw_perplexities(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    """Draw the mean, its interval and the seeds of each row; a mean off the scale is written."""
    for place, row in enumerate(rows):
        if row.loss.mean is None:
            write_in_row(axes, place, f"no result: {row.configuration.statuses()}", colour=VERMILLION)
    measured = [(place, row) for place, row in enumerate(rows) if row.loss.mean is not None]
    means = [exp_or_infinity(row.loss.mean or 0.0) for _, row in measured]
    seeds = [
        (exp_or_infinity(loss), place + 0.26) for place, row in measured for loss in row.loss.values.values()
    ]
    known = [value for value in (*(value for value, _ in seeds), *means) if value < BEYOND] or [1.0]
    ends = [perplexities(row.loss.interval) for _, row in measured]
    bounded = [both if both and both[1] < BEYOND else None for both in ends]
    low, high, log = scale_of(known, bounded, ratio=3)
    lines = [value for value in simple_models(frame.comparison.group).values() if _near(value, low, high)]
    low = min([low, *(value / 1.02 for value in lines)])
    high = max([high, *(value * 1.02 for value in lines)])
    set_scale(axes, "x", Scale(low, high, log))
    if any(row.loss.n > 1 for _, row in measured):
        axes.scatter(*np.array(seeds).T, s=8, color="#aaaaaa", linewidth=0, zorder=2)
    intervals(axes, [place for place, _ in measured], bounded, colors="black", linewidths=1.6, zorder=3)
    _draw_marks(axes, [(place, mean, row) for (place, row), mean in zip(measured, means, strict=True)])
    for (place, _), mean in zip(measured, means, strict=True):
        if not low <= mean <= high:
            write_in_row(axes, place, f"{number(mean)} →", right=True)
    axes.set_xlabel("perplexity (lower is better)")


def _near(value: float, low: float, high: float) -> bool:
    return low - 0.3 * (high - low) <= value <= high + 0.3 * (high - low)


def _draw_marks(axes: Axes, marks: list[tuple[int, float, ComparisonRow]]) -> None:
    """Draw each mean with the look of its coupler: filled, or hollow where the verdict is not resolved."""
    for place, mean, row in marks:
        open_ = row.against is not None and row.against.verdict.kind == "not resolved"
        look = Look.of(row.configuration.coupler, variant=int(open_))
        if math.isfinite(mean):
            axes.plot(mean, place, ls="", zorder=4, **look.of_marker())


def _draw_simple_models(axes: Axes, frame: Frame) -> None:
    """Name the n-gram baselines above the panel, each with a line, or an arrow if it is off the scale."""
    low, high = axes.get_xlim()
    for level, (name, value) in enumerate(simple_models(frame.comparison.group).items()):
        text = f"{name} {number(value, 1 if value < 1e3 else 0)}"
        place, align = (high, "right") if value > high else (low, "left")
        if low <= value <= high:
            axes.axvline(value, color="black", ls=("--", ":")[level], lw=1.2, zorder=1)
            place, align = value, ("left" if value < (low + high) / 2 else "right")
        else:
            text = f"{text} →" if value > high else f"← {text}"
        write_above(axes, text, place, 3 + 10 * level, axes.get_xaxis_transform(), align)


def _draw_differences(axes: Axes, frame: Frame, rows: list[ComparisonRow]) -> None:
    found = [(place, row, row.against) for place, row in enumerate(rows) if row.against is not None]
    low, high = _difference_range([against for *_, against in found])
    axes.axvspan(-MINIMUM_EFFECT_NATS, MINIMUM_EFFECT_NATS, color="#dddddd", zorder=0.5, linewidth=0)
    axes.axvline(0, color="black", lw=1)
    set_scale(axes, "x", Scale(low, high))
    ends = [against.paired.interval for *_, against in found]
    intervals(axes, [place for place, *_ in found], ends, colors="black", linewidths=1.6, zorder=3)
    means = [(place, against.paired.mean, row) for place, row, against in found]
    _draw_marks(axes, [mark for mark in means if low <= mark[1] <= high])
    for place, mean, _ in means:
        if not low <= mean <= high:
            value = f"{mean:.3g}".replace("-", MINUS)
            write_in_row(axes, place, f"{value} →" if mean > high else f"← {value}", right=mean > high)
    band = f"grey: ±{MINIMUM_EFFECT_NATS:g}, the minimum effect; hollow: not resolved"
    write_above(axes, band, 0, 3, "axes fraction")
    write_above(axes, f"Loss minus {frame.baseline}, paired by seed, 95% interval", 0, 14, "axes fraction")
    axes.set_xlabel("nats per token (below 0 is better)")


def _verdict(frame: Frame, row: ComparisonRow) -> str:
    if row.against is not None:
        return row.against.verdict.words()
    if row.configuration is frame.comparison.reference:
        return "baseline"
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
        verdict = "reference" if row.configuration is frame.comparison.reference else None
        if against is not None:
            paired = against.paired
            judged = [paired.mean, *(paired.interval or (None, None)), paired.n, against.p_adjusted]
            verdict = against.verdict.words()
        table.append([label, None, row.loss.n, *quality, *judged, verdict, row.configuration.statuses()])
        for seed, loss in row.loss.values.items():
            own = against.by_seed.get(seed) if against else None
            table.append([label, seed, 1, exp_or_infinity(loss), None, None, loss, own, *[None] * 6])
    for name, value in simple_models(frame.comparison.group).items():
        line = f"{name} (reference line)"
        table.append([line, None, None, value, None, None, math.log(value), *[None] * 7])
    return table


MOST_PAIRED = 24
VERDICTS_COLUMNS = "configuration beside difference_nats seeds_paired p_holm verdict".split()
PALE = {"better": "#9ecae8", "worse": "#f2b48f", "equivalent": "#a8dcc8", "not resolved": "#f2f2f2"}


def verdicts_plot(frame: Frame) -> Plot | None:
    """Return ``verdicts``, a matrix of all pairs; None below three configurations or without a difference."""
    rows = frame.measured[:MOST_PAIRED]
    found = {(pair.candidate.label, pair.reference.label): pair for pair in frame.comparison.pairs}
    told = [pair for pair in found.values() if pair.verdict.kind in ("better", "worse", "equivalent")]
    if len(rows) < 3 or not told:
        return None
    labels = [row.configuration.label for row in rows]
    subject = "Which configuration (row) is better than which other one (column)?"
    left_out = len(frame.measured) - len(rows)
    rest = f"{left_out} more configurations: table only." if left_out else ""
    note = "Numbers: by how many percent the perplexity of the row is above (+) or below (−) the column."
    figure = frame.figure(subject, 0.3 * len(rows) + 0.5, note, _too_few(frame.comparison), rest)
    axes = figure.subplots()
    for y, x in np.ndindex(len(rows), len(rows)):
        pair, sign = found.get((labels[y], labels[x])), 1
        if pair is None:
            pair, sign = found.get((labels[x], labels[y])), -1
        if pair is None:
            axes.add_patch(_square(x, y, "white"))
        else:
            kind = pair.verdict.kind if sign > 0 else _turned(pair.verdict.kind)
            axes.add_patch(_square(x, y, PALE[kind]))
            text = signed(100 * (exp_or_infinity(sign * pair.paired.mean) - 1), 1)
            text = "0.0" if text.strip(f"+{MINUS}") == "0.0" else text
            grey = GREY if kind == "not resolved" else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=grey)
    name_rows(axes, [f"{frame.names[label]}  {n}" for n, label in enumerate(labels, 1)], 8)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_xticks(range(len(rows)), [str(n) for n in range(1, len(rows) + 1)])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.grid(False)
    used = [
        kind
        for kind in PALE
        if any(kind in (p.verdict.kind, _turned(p.verdict.kind)) for p in found.values())
    ]
    words = {"better": "row is better", "worse": "row is worse"}
    handles = [_square(0, 0, PALE[kind], label=words.get(kind, kind)) for kind in used]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    table = [
        [one.candidate.label, one.reference.label, one.paired.mean, one.paired.n, one.p_adjusted,
         one.verdict.words()] for one in frame.comparison.pairs
    ]  # fmt: skip
    return Plot("verdicts", figure, VERDICTS_COLUMNS, table)


def _too_few(comparison: Comparison) -> str:
    """Return a sentence where the pairs without the baseline have too few seeds for any verdict."""
    among, seeds = (
        len(comparison.pairs) - comparison.comparisons,
        max(one.paired.n for one in comparison.pairs),
    )
    if among < 1 or seeds >= (needed := seeds_needed(among)):
        return ""
    return (
        f"{seeds} seeds are too few for a difference between two others than {comparison.reference.label}: "
        f"{counted(among, 'comparison')} need {needed}."
    )


def _square(x: float, y: float, colour: str, **settings: Any) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", **settings)


def _turned(kind: str) -> str:
    """Return the verdict on a pair in the other order."""
    return {"better": "worse", "worse": "better"}.get(kind, kind)


Curves = dict[str, Curve]
FIRST_PART = 0.15
"""The share of the training whose steep fall the axis of the loss leaves out."""
LOSS_CURVES_COLUMNS = (
    "configuration step seeds tokens training_flops train_loss_smoothed_nats validation_loss_nats "
    "validation_perplexity difference_nats difference_half_width_95_nats"
).split()


def loss_curves_plot(frame: Frame) -> Plot | None:
    """Return ``loss_curves``: the loss by tokens or FLOPs, and the paired difference; None without history.

    The left panel is by training FLOPs where configurations differ in them by more than 2%, else by tokens.
    """
    training = frame.training_losses
    if not training:
        return None
    tokens = {label: _tokens(frame, label) for label in training}
    flops = {row.configuration.label: row.model[TRAINING_FLOPS] for row in frame.comparison.rows}
    known = [value for label in training if (value := flops.get(label))]
    by_flops = len(known) == len(training) and max(known) > 1.02 * min(known)
    scale = {label: rate if by_flops and rate else 1.0 for label, rate in flops.items()}
    differences = _differences(frame, training)
    subject = f"Is a configuration ahead of {frame.baseline} during training?" if differences else (
        "How does the loss fall during training?")  # fmt: skip
    figure = frame.figure(subject, 4.2, frame.about_looks())
    grid = figure.subplots(1, 1 + bool(differences), squeeze=False)[0]
    places = {label: one * scale[label] for label, one in tokens.items()}
    count_axis(
        grid[0], "training FLOPs" if by_flops else "training tokens", max(one[-1] for one in places.values())
    )
    _draw_losses(grid[0], frame, places)
    _draw_diverged(grid[0], frame, scale)
    if differences:
        _draw_ahead(grid[1], frame, differences, tokens)
    lay_out(figure)
    last = differences or training
    looks = {label: look for label, look in frame.looks.items() if label in last}
    ends = [(_last(last[label]), frame.names[label], look.colour) for label, look in looks.items()]
    label_ends(grid[-1], ends)
    rows = _loss_curves_table(frame, tokens, flops, differences)
    return Plot("loss_curves", figure, LOSS_CURVES_COLUMNS, rows)


def _tokens(frame: Frame, label: str) -> np.ndarray:
    """Return the tokens trained on up to each step of a training curve, the mean over seeds."""
    row = next(row for row in frame.measured if row.configuration.label == label)
    curve = training_curve(row.configuration, "tokens")
    assert curve is not None, "it has training losses"
    return np.cumsum(curve.mean_T)


def _differences(frame: Frame, training: Curves) -> Curves:
    reference = training.get(frame.comparison.reference.label)
    if reference is None:
        return {}
    found = {label: curve.minus(reference) for label, curve in training.items() if curve is not reference}
    return {label: curve for label, curve in found.items() if curve is not None}


def _last(curve: Curve) -> float:
    known = curve.mean_T[np.isfinite(curve.mean_T)]
    return float(known[-1]) if len(known) else math.nan


def _draw_losses(axes: Axes, frame: Frame, places: dict[str, np.ndarray]) -> None:
    """Draw the smoothed training loss as lines and the validation loss as markers."""
    values = []
    for label, curve in frame.training_losses.items():
        _draw_curve(axes, frame, label, places[label], curve)
        later = curve.mean_T[int(FIRST_PART * len(curve.steps_T)) :]
        values.append(later[np.isfinite(later)])
        validation, look = frame.validation_losses.get(label), frame.looks.get(label)
        if validation is not None and look is not None:
            at = np.interp(validation.steps_T, curve.steps_T, places[label])
            axes.plot(at, validation.mean_T, ls="", **look.of_marker(4.5), zorder=4)
            values.append(validation.mean_T[np.isfinite(validation.mean_T)])
    bounds = [(float(one.min()), float(one.max())) for one in values if len(one)] or [(0.0, 1.0)]
    low = min(bottom for bottom, _ in bounds)
    high = low + usual_reach([top - low for _, top in bounds], 4, least=1e-2 * abs(low))
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss. Lines: training, smoothed; marks: validation", loc="left", fontsize=8)
    above = [
        frame.names[label] for label, one in frame.training_losses.items() if not (one.mean_T <= high).any()
    ]
    if above:
        axes.text(0.99, 0.99, f"above ↑: {', '.join(above[:4])}", transform=axes.transAxes, ha="right",
                  va="top", fontsize=7, color=VERMILLION)  # fmt: skip


def _draw_curve(axes: Axes, frame: Frame, label: str, places_T: np.ndarray, curve: Curve) -> None:
    look, thin = frame.looks.get(label), curve.thinned()
    at_T = places_T[np.isin(curve.steps_T, thin.steps_T)]
    if look is None:
        line = LineCollection([np.column_stack([at_T, thin.mean_T])], colors=LIGHT, linewidths=0.7, zorder=1)
        axes.add_collection(line, autolim=False)
        return
    baseline = label == frame.comparison.reference.label
    axes.plot(at_T, thin.mean_T, lw=2 if baseline else 1.2, zorder=3 if baseline else 2, **look.of_line())


def _draw_diverged(axes: Axes, frame: Frame, scale: dict[str, float]) -> None:
    """Name each run that diverged, and mark its last loss that was a number."""
    (_, far), (_, high) = axes.get_xlim(), axes.get_ylim()
    diverged = [
        (one, run) for one in frame.comparison.group.configurations for run in one.runs
        if run.status == "diverged"
    ]  # fmt: skip
    for place, (one, run) in enumerate(diverged[:6]):
        rows = [row for row in run.data.train if math.isfinite(row["loss"])]
        look = Look.of(one.coupler)
        if rows:
            at = scale[one.label] * sum(row["tokens"] for row in rows)
            height = min(rows[-1]["loss"], high)
            axes.plot(min(at, far), height, "x", ms=8, mew=2, color=look.colour, clip_on=False, zorder=5)
        step = rows[-1]["step"] if rows else 0
        text = f"× {shorten(frame.names[one.label], 28)}, seed {run.seed}: diverged after step {step:,}"
        axes.text(0.98, 0.93 - 0.05 * place, text, transform=axes.transAxes, ha="right", va="top",
                  fontsize=7, color=look.colour)  # fmt: skip


def _draw_ahead(axes: Axes, frame: Frame, differences: Curves, tokens: dict[str, np.ndarray]) -> None:
    """Draw the paired difference of the training loss from the baseline coupler, with its 95% interval."""
    axes.axhline(0, color="black", lw=1.2)
    banded = len(differences) <= BEST
    for label, curve in differences.items():
        own = frame.training_losses[label]
        at_T = tokens[label][np.isin(own.steps_T, curve.steps_T)]
        _draw_curve(axes, frame, label, at_T, curve)
        half_T, look = curve.half_T, frame.looks.get(label)
        if half_T is not None and look is not None and banded:
            low_T, high_T = curve.mean_T - half_T, curve.mean_T + half_T
            axes.fill_between(at_T, low_T, high_T, color=look.colour, alpha=0.1, linewidth=0)
    ends = [end for curve in differences.values() for end in _span(curve, banded)]
    reach = 1.15 * usual_reach([0.005, *map(abs, ends)], 10)
    axes.set_ylim(
        max(min(min(ends) * 1.15, -0.1 * reach), -reach), min(max(max(ends) * 1.15, 0.1 * reach), reach)
    )
    count_axis(axes, "training tokens", max(one[-1] for one in tokens.values()))
    axes.set_ylabel(f"training loss minus {frame.baseline} (nats)")
    band = "; bands: 95% intervals" if banded else ""
    axes.set_title(f"Difference, paired by seed (below 0 is better){band}", loc="left", fontsize=8)


def _span(curve: Curve, banded: bool) -> Ends:
    half_T = 0.0 if curve.half_T is None or not banded else curve.half_T
    both = np.concatenate([curve.mean_T - half_T, curve.mean_T + half_T])
    known = both[np.isfinite(both)]
    return (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)


def _loss_curves_table(
    frame: Frame, tokens: dict[str, np.ndarray], flops: dict[str, float | None], differences: Curves
) -> list[list[Any]]:
    rows = []
    for label, whole in frame.training_losses.items():
        curve, less = whole.thinned(), differences.get(label)
        trained = dict(zip(whole.steps_T.tolist(), tokens[label].tolist(), strict=True))
        validation = frame.validation_losses.get(label)
        losses, scores = curve.means(), validation.means() if validation else {}
        ahead = less.means() if less else {}
        halves = less and less.half_T
        half = (
            dict(zip(less.steps_T.tolist(), halves.tolist(), strict=True))
            if less and halves is not None
            else {}
        )
        for step in sorted(losses.keys() | scores.keys()):
            score, seen, rate = cell(scores.get(step)), trained.get(step), flops.get(label)
            work = seen * rate if seen is not None and rate else None
            perplexity = None if score is None else exp_or_infinity(score)
            rows.append([label, step, len(curve.seeds), seen, work, cell(losses.get(step)), score, perplexity,
                         cell(ahead.get(step)), cell(half.get(step))])  # fmt: skip
    return rows
