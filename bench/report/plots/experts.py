"""What the experts learned: how alike they are, what the loss is without one of them, their effective rank.

The numbers of experts mean nothing across seeds, so experts are sorted within each seed before a mean over
the seeds is taken. Letters: S seeds, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from bench.record import ExpertsOfLayer, is_measured
from bench.report.plots.frame import (
    Curve,
    Ends,
    Frame,
    cell,
    intervals,
    sampled_curve,
    usual_reach,
    value_range,
)
from bench.report.plots.maps import LEAST_RANGE, Map, Texts, maps_figure, two_digits
from bench.report.plots.style import LIGHT, VERMILLION, Plot, label_ends, lay_out, shorten, step_axis
from bench.report.statistics import t_interval
from bench.study.runs import Configuration

SIMILARITY_NOTE = (
    "Lower left: cosine of the updates of two experts; upper right: debiased CKA. Mean over seeds. In each "
    "seed, expert 1 is most like the other experts."
)
ABLATION_NOTE = (
    "The mean of the other experts replaces an expert. Experts are sorted by the rise in each seed. {}"
    "Grey: ±1.96 standard errors over the tokens."
)
RANK_NOTE = "Effective rank of the E updates of a token, mean over tokens, layers and seeds."
BANDS = " Bands: 95% intervals over seeds."
NORMAL_95 = 1.96
LEAST_RISE, LEAST_RANK_RANGE = 1e-4, 0.05
"""Smaller ranges of the rise of the loss in nats, and of the effective rank, show no difference."""
MOST_BARS = 6
"""The most configurations whose intervals are drawn."""


@dataclass(frozen=True)
class Layer:
    """What the seeds of a configuration measured of the experts of one layer."""

    configuration: Configuration
    number: int
    seeds: dict[int, ExpertsOfLayer]
    """By seed; all have as many experts."""


def layers_of(frame: Frame) -> list[Layer]:
    """Return the layers of each configuration with measured experts, the best configuration first."""
    return [layer for row in frame.measured for layer in _layers(row.configuration)]


def _layers(configuration: Configuration) -> Iterator[Layer]:
    found: dict[int, dict[int, ExpertsOfLayer]] = {}
    for seed, run in configuration.counted.items():
        if is_measured(run.record.diagnostics):
            for place, layer in enumerate(run.record.diagnostics.layers):
                found.setdefault(place, {})[seed] = layer
    for place, seeds in sorted(found.items()):
        if len({len(layer.ablation_nats) for layer in seeds.values()}) == 1:
            yield Layer(configuration, place, seeds)


def similarity_plot(frame: Frame) -> Plot | None:
    """Return ``expert_similarity``: cosine and CKA of every two experts by layer and configuration."""
    layers = layers_of(frame)
    found = [_alike(layer) for layer in layers]
    if not found:
        return None
    means = [(_between(cosine), _between(cka)) for cosine, cka in found]
    maps = [
        Map(_title(frame, layer, mean), names, names, _joined(*both))
        for layer, both, mean in zip(layers, found, means, strict=True)
        if (names := [str(place + 1) for place in range(len(both[0]))])
    ]
    values = np.concatenate([one.values[~np.isnan(one.values)] for one in maps])
    if np.ptp(values) < LEAST_RANGE:
        return None
    columns = 3 if len({layer.number for layer in layers}) in (3, 5, 6) else 4
    texts = Texts(_subject(frame, layers, means), SIMILARITY_NOTE, "expert", "expert", "cosine or CKA")
    figure = maps_figure(frame, maps, texts, Normalize(min(0.0, float(values.min())), 1.0), columns)
    table: list[list[Any]] = [
        [layer.configuration.label, layer.number, len(layer.seeds), i + 1, j + 1, cosine[i, j], cka[i, j]]
        for layer, (cosine, cka) in zip(layers, found, strict=True)
        for i in range(len(cosine))
        for j in range(i)
    ]
    headings = "configuration layer seeds expert other_expert cosine cka".split()
    return Plot("expert_similarity", figure, headings, table)


def _alike(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds of cosine and CKA, each (E, E), of experts sorted within each seed."""
    sorted_ = []
    for one in layer.seeds.values():
        cosine_EE, cka_EE = np.array(one.cosine), np.array(one.cka)
        order = np.argsort(-cosine_EE.sum(1), kind="stable")
        sorted_.append((cosine_EE[np.ix_(order, order)], cka_EE[np.ix_(order, order)]))
    cosines, ckas = zip(*sorted_, strict=True)
    return np.mean(cosines, axis=0), np.mean(ckas, axis=0)


def _between(matrix_EE: np.ndarray) -> float:
    """Return the mean of a matrix without its diagonal."""
    return float(matrix_EE[~np.eye(len(matrix_EE), dtype=bool)].mean())


def _joined(cosine_EE: np.ndarray, cka_EE: np.ndarray) -> np.ndarray:
    """Return a matrix with the cosine below the empty diagonal and the CKA above it."""
    joined_EE = np.tril(cosine_EE, -1) + np.triu(cka_EE, 1)
    np.fill_diagonal(joined_EE, np.nan)
    return joined_EE


def _title(frame: Frame, layer: Layer, means: tuple[float, float]) -> str:
    cosine, cka = map(two_digits, means)
    name = shorten(frame.names[layer.configuration.label], 34)
    return f"{name}\nlayer {layer.number}: cosine {cosine}, CKA {cka}"


def _subject(frame: Frame, layers: Sequence[Layer], means: Sequence[tuple[float, float]]) -> str:
    """Return the question, with the least and the most alike experts of several configurations."""
    cosines: dict[str, list[float]] = {}
    for layer, (cosine, _) in zip(layers, means, strict=True):
        cosines.setdefault(layer.configuration.label, []).append(cosine)
    by_mean = sorted((float(np.mean(values)), label) for label, values in cosines.items())
    question = "How alike are the experts?"
    if len(by_mean) < 2:
        return question
    ends = [f"{two_digits(mean)} ({frame.names[label]})" for mean, label in (by_mean[0], by_mean[-1])]
    return f"{question} Mean cosine {' to '.join(ends)}"


def ablation_plot(frame: Frame) -> Plot | None:
    """Return ``expert_ablation``: the rise of the loss without one expert, sorted within each seed."""
    layers = layers_of(frame)
    rises = [np.sort([one.ablation_nats for one in layer.seeds.values()], axis=1) for layer in layers]
    if not layers or max(float(np.abs(rises_SE).max()) for rises_SE in rises) < LEAST_RISE:
        return None
    numbers = sorted({layer.number for layer in layers})
    columns = min(len(numbers), 3)
    rows = -(-len(numbers) // columns)
    over = "seeds" if any(len(layer.seeds) > 1 for layer in layers) else "tokens"
    note = ABLATION_NOTE.format(f"Bars: 95% intervals over {over}. " * _has_bars(layers))
    subject = "How much does the loss rise without one expert?"
    figure = frame.figure(subject, 3.4 * rows, note, frame.about_looks())
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(numbers) :]:
        figure.delaxes(axes)
    ends = [_intervals(layer, rises_SE) for layer, rises_SE in zip(layers, rises, strict=True)]
    _set_heights(grid.flat[0], rises, ends)
    for place, (axes, wanted) in enumerate(zip(grid.flat, numbers, strict=False)):
        some = [one for one in zip(layers, rises, ends, strict=True) if one[0].number == wanted]
        _draw_ablation(axes, frame, some)
        axes.set_title(f"layer {wanted}", loc="left", fontsize=8)
        axes.set_ylabel("rise of the loss (nats per token)" if place % columns == 0 else "")
    lay_out(figure)
    last = [one for one in zip(layers, rises, strict=True) if one[0].number == numbers[-1]]
    label_ends(grid.flat[len(numbers) - 1], _labels(frame, last))
    return Plot("expert_ablation", figure, ABLATION_COLUMNS, _ablation_table(layers, rises, ends))


ABLATION_COLUMNS = (
    "configuration layer seeds expert_sorted rise_nats rise_low_95_nats rise_high_95_nats"
).split()


def _intervals(layer: Layer, rises_SE: np.ndarray) -> list[Ends | None]:
    """Return for each sorted expert the 95% interval over seeds, or over tokens where there is one seed."""
    if len(rises_SE) > 1:
        return [t_interval(rises_S) for rises_S in rises_SE.T]
    (one,) = layer.seeds.values()
    order = np.argsort(one.ablation_nats, kind="stable")
    errors_E = NORMAL_95 * np.array(one.ablation_standard_error)[order]
    return [(rise - error, rise + error) for rise, error in zip(rises_SE[0], errors_E, strict=True)]


def _set_heights(axes: Axes, rises: Sequence[np.ndarray], ends: Sequence[Sequence[Ends | None]]) -> None:
    """Scale the panels so that means and most intervals fit."""
    tops = [float(rises_SE.mean(0).max()) for rises_SE in rises]
    reach = usual_reach([*tops, LEAST_RISE], 10, least=LEAST_RISE)
    means = np.concatenate([rises_SE.mean(0) for rises_SE in rises])
    known = [both for some in ends for both in some if both is not None]
    high = min(max([reach, *(top for _, top in known)]), 1.5 * reach)
    low = max(min([0.0, float(means.min()), *(bottom for bottom, _ in known)]), -0.5 * reach)
    margin = 0.04 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _draw_ablation(
    axes: Axes, frame: Frame, some: Sequence[tuple[Layer, np.ndarray, list[Ends | None]]]
) -> None:
    experts = max(rises_SE.shape[1] for _, rises_SE, _ in some)
    errors = [
        error for layer, *_ in some for one in layer.seeds.values() for error in one.ablation_standard_error
    ]
    noise = NORMAL_95 * float(np.median(errors))
    axes.axhspan(-noise, noise, color="#e4e4e4", linewidth=0, zorder=0.5)
    axes.axhline(0, color="black", lw=1)
    axes.set_xlim(0.5, experts + 0.5)
    shift = 0.5 / max(1, len(some) - 1) * min(1.0, len(some) / 6)
    for place, (layer, rises_SE, ends) in enumerate(some):
        look = frame.looks.get(layer.configuration.label)
        at_E = np.arange(1, rises_SE.shape[1] + 1) + shift * (place - (len(some) - 1) / 2)
        mean_E = rises_SE.mean(0)
        if look is None:
            axes.plot(at_E, mean_E, color=LIGHT, lw=0.7, zorder=1)
            continue
        axes.plot(at_E, mean_E, lw=1, zorder=3, **look.of_line(), **look.of_marker(4))
        if _has_bars([one for one, *_ in some]):
            intervals(axes, at_E.tolist(), ends, True, colors=look.colour, linewidths=1, zorder=2)
    above = [
        shorten(frame.names[layer.configuration.label], 28)
        for layer, rises_SE, _ in some
        if rises_SE.mean(0).max() > axes.get_ylim()[1]
    ]
    if above:
        axes.text(0.01, 0.99, f"above ↑: {', '.join(above[:4])}", transform=axes.transAxes, va="top",
                  fontsize=7, color=VERMILLION)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("expert, sorted")


def _has_bars(layers: Sequence[Layer]) -> bool:
    return len({layer.configuration.label for layer in layers}) <= MOST_BARS


def _labels(frame: Frame, last: Sequence[tuple[Layer, np.ndarray]]) -> list[tuple[float, str, str]]:
    """Return the ends of the lines with a look, their names and their colours."""
    return [
        (float(rises_SE.mean(0)[-1]), shorten(frame.names[label], 34), look.colour)
        for layer, rises_SE in last
        if (look := frame.looks.get(label := layer.configuration.label))
    ]


def _ablation_table(
    layers: Sequence[Layer], rises: Sequence[np.ndarray], ends: Sequence[Sequence[Ends | None]]
) -> list[list[Any]]:
    return [
        [layer.configuration.label, layer.number, len(rises_SE), place + 1, mean, *(both or (None, None))]
        for layer, rises_SE, own in zip(layers, rises, ends, strict=True)
        for place, (mean, both) in enumerate(zip(rises_SE.mean(0).tolist(), own, strict=True))
    ]


def effective_rank_plot(frame: Frame) -> Plot | None:
    """Return ``effective_rank``: the effective rank of the experts' updates over the steps."""
    curves = {
        row.configuration.label: curve.thinned()
        for row in frame.measured
        if (curve := sampled_curve(row.configuration, "effective_rank")) is not None
    }
    values = [curve.mean_T for curve in curves.values()]
    if not curves or max(map(len, values)) < 2 or np.ptp(np.concatenate(values)) < LEAST_RANK_RANGE:
        return None
    subject = "How many directions do the experts' updates of a token span?"
    bands = any(curve.half_T is not None for curve in curves.values())
    figure = frame.figure(subject, 3.8, RANK_NOTE + BANDS * bands, frame.about_looks())
    axes = figure.subplots()
    step_axis(axes, [int(curve.steps_T[-1]) for curve in curves.values()])
    _draw_experts(axes, frame, list(curves))
    for label, curve in curves.items():
        _draw_rank(axes, frame, label, curve)
    _set_rank_scale(axes, frame, curves)
    axes.set_ylabel("effective rank (1 to E)")
    lay_out(figure)
    ends = [(float(curve.mean_T[-1]), frame.names[label], look.colour)
            for label, curve in curves.items() if (look := frame.looks.get(label))]  # fmt: skip
    label_ends(axes, ends)
    table = [
        [
            label,
            step,
            len(curve.seeds),
            cell(mean),
            None if curve.half_T is None else cell(curve.half_T[place]),
        ]
        for label, curve in curves.items()
        for place, (step, mean) in enumerate(curve.means().items())
    ]
    columns = "configuration step seeds effective_rank half_width_95".split()
    return Plot("effective_rank", figure, columns, table)


def _draw_experts(axes: Axes, frame: Frame, labels: Sequence[str]) -> None:
    """Draw a line at each number of experts, the largest effective rank."""
    for experts in _numbers_of_experts(frame, labels):
        axes.axhline(experts, color="black", ls="--", lw=1)
        place = {"xytext": (3, 2), "textcoords": "offset points", "va": "bottom"}
        axes.annotate(
            f"E = {experts}", (0, experts), xycoords=axes.get_yaxis_transform(), fontsize=7, **place
        )


def _numbers_of_experts(frame: Frame, labels: Sequence[str]) -> list[int]:
    rows = [row for row in frame.measured if row.configuration.label in labels]
    return sorted({row.configuration.flags["num_experts"] for row in rows})


def _set_rank_scale(axes: Axes, frame: Frame, curves: dict[str, Curve]) -> None:
    """Scale the panel within the possible values, 1 to E, so that all means and most bands fit."""
    means = np.concatenate([curve.mean_T for curve in curves.values()])
    ends = [(mean - half, mean + half)
            for curve in curves.values() if curve.half_T is not None
            for mean, half in zip(curve.mean_T.tolist(), curve.half_T.tolist(), strict=True)]  # fmt: skip
    most = _numbers_of_experts(frame, list(curves))[-1]
    low = max(1.0, value_range(means.tolist(), ends)[0])
    axes.set_ylim(low, most + 0.08 * (most - low))


def _draw_rank(axes: Axes, frame: Frame, label: str, curve: Curve) -> None:
    look = frame.looks.get(label)
    if look is None:
        axes.plot(curve.steps_T, curve.mean_T, color=LIGHT, lw=0.7, zorder=1)
        return
    marks = {**look.of_line(), **look.of_marker(4), "clip_on": False}
    axes.plot(curve.steps_T, curve.mean_T, lw=1.3, zorder=3, **marks)
    if curve.half_T is not None:
        low_T, high_T = curve.mean_T - curve.half_T, curve.mean_T + curve.half_T
        axes.fill_between(curve.steps_T, low_T, high_T, color=look.colour, alpha=0.12, linewidth=0)
