"""What the plots of a study share: header, names, looks and legend; curves over seeds; marks and scales.

Letters: S seeds, T steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Transform
from scipy.signal import lfilter

from bench.record import MINUS
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.plots.run import smoothing_span
from bench.report.plots.style import (
    BLUE,
    GREEN,
    LINE_STYLES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    headed_figure,
    log_ticks,
    plain,
    printable,
    shorten,
    step_axis,
)
from bench.report.quantities import counted
from bench.report.statistics import Summary
from bench.study.run_files import Row
from bench.study.runs import Configuration, Run

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
"""With four line styles they give twelve looks."""
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "d")
MAX_LOOKS = 12
"""The most configurations with a look; readers cannot tell more lines apart."""
BEST = 7
"""Of more configurations, the number of best ones that have a look, beside the reference."""
OTHERS = "#bbbbbb"
LABEL_LENGTH = 44
WIDTH = 10.0
"""The width of a figure in inches."""
LEGEND_ROW, LETTER, HANDLE = 0.18, 0.068, 0.75
"""Sizes in inches: the height of a row of a legend, the width of a letter and of a handle."""
MOST_STEPS = 400
"""The most steps of a curve that are drawn and listed; of more steps, evenly chosen ones are."""
FEW = 12
"""Up to so many points of a curve, each has a marker."""
Ends = tuple[float, float]
"""The ends of an interval or of a range."""


@dataclass(frozen=True)
class Look:
    """How a configuration is drawn in every plot."""

    colour: str
    line: str
    marker: str
    width: float = 1.5

    def of_line(self) -> dict[str, Any]:
        """Return the settings of its line."""
        above = 3 if self.colour == "black" else 2
        return {"color": self.colour, "linestyle": self.line, "linewidth": self.width, "zorder": above}

    def of_marker(self) -> dict[str, Any]:
        """Return the settings of its markers."""
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.5}
        return {"marker": self.marker, "markersize": 5.5, "markerfacecolor": self.colour, **edge}


REFERENCE = Look("black", "-", "o", 2.2)


@dataclass(frozen=True)
class Frame:
    """A study's name and comparison, with the texts, looks and curves that its plots share."""

    study: str
    comparison: Comparison

    @cached_property
    def measured(self) -> list[ComparisonRow]:
        """The rows with a loss, the lowest loss first."""
        rows = [row for row in self.comparison.rows if row.loss.mean is not None]
        return sorted(rows, key=lambda row: row.loss.mean or 0.0)

    @cached_property
    def ranked(self) -> list[ComparisonRow]:
        """All rows: those with a loss, the lowest first, then those without."""
        return [*self.measured, *(row for row in self.comparison.rows if row.loss.mean is None)]

    @cached_property
    def names(self) -> dict[str, str]:
        """The name of each configuration in plots, by its label: unique, and in one line."""
        return short_names([row.configuration.label for row in self.comparison.rows])

    @cached_property
    def looks(self) -> dict[str, Look]:
        """The look of each configuration that has one, by its label; the other configurations are grey."""
        known = [row.configuration.label for row in self.measured]
        stable = [one.label for one in self.comparison.group.configurations if one.label in known]
        return looks(stable, self.comparison.reference.label, ranked=known)

    @cached_property
    def training_losses(self) -> dict[str, Curve]:
        """The smoothed training loss in nats by label; without configurations that have no history."""
        curves = {row.configuration.label: training_curve(row.configuration, "loss") for row in self.measured}
        return {label: curve.smoothed().thinned() for label, curve in curves.items() if curve is not None}

    @cached_property
    def validation_losses(self) -> dict[str, Curve]:
        """The validation loss in nats by label; without configurations that have no evaluation."""
        curves = {row.configuration.label: validation_curve(row.configuration) for row in self.measured}
        return {label: curve.thinned() for label, curve in curves.items() if curve is not None}

    def name(self, configuration: Configuration) -> str:
        """Return the name of a configuration, with "(reference)" if it is the reference."""
        role = " (reference)" if configuration is self.comparison.reference else ""
        return self.names[configuration.label] + role

    def figure(self, subject: str, height: float, *notes: str) -> Figure:
        """Return an empty figure below the study's header; the notes say how to read it."""
        group = self.comparison.group
        sizes = counted(len(group.configurations), "configuration"), counted(len(group.runs), "run")
        title = printable(" · ".join([shorten(self.study), *sizes, group.basis.words()]))
        note = " ".join(filter(None, notes))
        return headed_figure(subject, title, self.warnings(), WIDTH, height, note)

    def warnings(self) -> list[str]:
        """Return what a reader of any plot must not miss."""
        group = self.comparison.group
        notes = ["NOT WIKITEXT-2: embedded text"] * group.embedded
        lost = []
        for one in group.configurations:
            statuses = Counter(_why_not(run) for run in one.runs if one.doubled or not run.counts)
            if statuses:
                lost.append((one, statuses))
        if lost:
            total = sum(statuses.total() for _, statuses in lost)
            listed = [
                f"{self.names[one.label]}: {', '.join(f'{n} {status}' for status, n in found.items())}"
                for one, found in lost[:4]
            ]
            listed += [f"and {counted(len(lost) - 4, 'more configuration')}"] * (len(lost) > 4)
            notes.append(f"{total} of {counted(len(group.runs), 'run')} do not count ({'; '.join(listed)})")
        return notes

    def about_looks(self) -> str:
        """Return a sentence on which configurations have a colour; empty if all have one."""
        grey = len(self.measured) - len(self.looks)
        if not grey:
            return ""
        return f"In colour: {best_and_reference(self.looks)}; grey: {grey} others."

    def legend(self, lines: bool = True) -> Legend:
        """Return the legend of the configurations, the lowest loss first."""
        entries = [
            (self.name(row.configuration), self.looks[row.configuration.label])
            for row in self.measured
            if row.configuration.label in self.looks
        ]
        return Legend.of(entries, lines, others=len(self.measured) - len(entries))


def _why_not(run: Run) -> str:
    """Return why a run does not count."""
    if run.status != "ok":
        return run.status
    return "with a seed that ran twice" if run.counts else "not scored"


def looks(labels: Sequence[str], reference: str | None, ranked: Sequence[str]) -> dict[str, Look]:
    """Return looks by label; of more than ``MAX_LOOKS``, for the reference and the best of ``ranked``."""
    if len(labels) > MAX_LOOKS:
        best = [label for label in ranked if label != reference][:BEST]
        labels = [label for label in labels if label == reference or label in best]
    found = {label: REFERENCE for label in labels if label == reference}
    for place, label in enumerate(label for label in labels if label != reference):
        found[label] = Look(COLOURS[place % 6], LINE_STYLES[place % 4], MARKERS[place % 12])
    return found


def best_and_reference(found: dict[str, Look]) -> str:
    """Return in words which configurations have a look, if not all have one."""
    if REFERENCE not in found.values():
        return f"the best {len(found)}"
    return f"the best {len(found) - 1} and the reference"


def short_names(labels: Sequence[str], length: int = LABEL_LENGTH) -> dict[str, str]:
    """Return the short form of each label; equal short forms get a number each."""
    short = {label: printable(shorten(label, length)) for label in labels}
    seen = Counter(short.values())
    counts: Counter[str] = Counter()
    for label, text in short.items():
        if seen[text] > 1:
            counts[text] += 1
            short[label] = f"{text} #{counts[text]}"
    return short


@dataclass(frozen=True)
class Legend:
    """A legend below the panels, and its size."""

    handles: list[Line2D]
    handle_length: float = 3.6

    @classmethod
    def of(cls, entries: Sequence[tuple[str, Look]], lines: bool = True, others: int = 0) -> Legend:
        """Return the legend of these names and looks, and of a number of grey ``others``."""
        found = []
        for name, look in entries:
            style: dict[str, Any] = look.of_line() | look.of_marker() | ({} if lines else {"linestyle": ""})
            found.append(Line2D([], [], label=name, **style))
        if others:
            style = {"linestyle": "-"} if lines else {"linestyle": "", "marker": "."}
            found.append(Line2D([], [], color=OTHERS, label=f"{others} others", **style))
        return cls(found, 3.6 if lines else 1.5)

    @property
    def columns(self) -> int:
        """The number of columns that fit below the panels."""
        widest = HANDLE + LETTER * max((len(str(handle.get_label())) for handle in self.handles), default=1)
        return max(1, min(4, len(self.handles), int((WIDTH - 0.2) / widest)))

    @property
    def height(self) -> float:
        """The height in inches."""
        return LEGEND_ROW * -(-len(self.handles) // self.columns) + 0.1

    def below(self, figure: Figure) -> None:
        """Draw the legend below the panels."""
        space = {"columnspacing": 1.5, "borderaxespad": 0.2, "handlelength": self.handle_length}
        figure.legend(handles=self.handles, loc="outside lower left", ncols=self.columns, **space)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps that all seeds have."""

    seeds: tuple[int, ...]
    steps_T: np.ndarray
    values_ST: np.ndarray

    @property
    def mean_T(self) -> np.ndarray:
        """The mean over seeds; not finite where the value of a seed is not."""
        with np.errstate(invalid="ignore"):
            return self.values_ST.mean(axis=0)

    @property
    def deviation_T(self) -> np.ndarray | None:
        """The sample's standard deviation over seeds; None for one seed."""
        if len(self.seeds) < 2:
            return None
        with np.errstate(invalid="ignore"):
            return self.values_ST.std(axis=0, ddof=1)

    def smoothed(self) -> Curve:
        """Return the exponential average of each seed, as ``smooth`` computes it.

        Values that are not finite are skipped and leave a gap.
        """
        keep = 1 - 2 / (smoothing_span(len(self.steps_T)) + 1)
        finite_ST = np.isfinite(self.values_ST)
        sums_ST, weights_ST = (
            lfilter([1.0], [1.0, -keep], values_ST, axis=1)
            for values_ST in (np.where(finite_ST, self.values_ST, 0.0), finite_ST.astype(float))
        )
        smooth_ST = np.divide(sums_ST, weights_ST, out=np.full_like(self.values_ST, np.nan), where=finite_ST)
        return Curve(self.seeds, self.steps_T, smooth_ST)

    def thinned(self) -> Curve:
        """Return at most ``MOST_STEPS`` steps, with the first and the last."""
        steps = len(self.steps_T)
        if steps <= MOST_STEPS:
            return self
        chosen = np.unique(np.linspace(0, steps - 1, MOST_STEPS).round().astype(int))
        return Curve(self.seeds, self.steps_T[chosen], self.values_ST[:, chosen])

    def less(self, other: Curve) -> Curve | None:
        """Return the paired difference over the seeds and steps that both have; None without common ones."""
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        steps_T = np.intersect1d(self.steps_T, other.steps_T)
        if not seeds or not len(steps_T):
            return None
        ours, theirs = (one.at(seeds, steps_T) for one in (self, other))
        with np.errstate(invalid="ignore"):
            return Curve(tuple(seeds), steps_T, ours - theirs)

    def at(self, seeds: Sequence[int], steps_T: np.ndarray) -> np.ndarray:
        """Return the values of some of its seeds at some of its steps."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return self.values_ST[rows][:, np.isin(self.steps_T, steps_T)]

    def means(self) -> dict[int, float]:
        """Return the mean over seeds by step."""
        return dict(zip(self.steps_T.tolist(), self.mean_T.tolist(), strict=True))


def training_curve(configuration: Configuration, key: str) -> Curve | None:
    """Return a quantity of the training steps over the runs that count; None without a history."""
    return _curve(configuration, lambda run: run.train, lambda row: row[key])


def validation_curve(configuration: Configuration) -> Curve | None:
    """Return the validation loss in nats over the runs that count; None without an evaluation."""
    return _curve(configuration, lambda run: run.validation, lambda row: row["nll_sum"] / row["tokens"])


def _curve(configuration: Configuration, rows_of: Callable, value: Callable[[Row], float]) -> Curve | None:
    rows = {seed: rows_of(run.data) for seed, run in configuration.counted.items()}
    rows = {seed: found for seed, found in rows.items() if found}
    steps = [[row["step"] for row in found] for found in rows.values()]
    if not steps:
        return None
    values = [np.array([value(row) for row in found], dtype=float) for found in rows.values()]
    common_T = np.array(steps[0])
    if any(other != steps[0] for other in steps):
        common_T = _common(steps)
        values = [one[np.isin(own, common_T)] for one, own in zip(values, steps, strict=True)]
    return Curve(tuple(rows), common_T, np.stack(values)) if len(common_T) else None


def _common(steps: Sequence[Sequence[int]]) -> np.ndarray:
    return reduce(np.intersect1d, map(np.array, steps))


class Scale(NamedTuple):
    """The ends of an axis, and whether it is logarithmic."""

    low: float
    high: float
    log: bool = False


def intervals(
    axes: Axes, places: Sequence[float], ends: Sequence[Ends | None], vertical: bool = False, **settings
) -> None:
    """Draw a horizontal or vertical line for the interval at each place; None means no interval."""
    segments = [
        [(place, end) if vertical else (end, place) for end in both]
        for place, both in zip(places, ends, strict=True)
        if both is not None
    ]
    if segments:
        axes.add_collection(LineCollection(segments, **settings), autolim=False)


def stripes(axes: Axes, rows: int) -> None:
    """Shade every second row, so that a row is easy to follow; as one artist, since many artists are slow."""
    bands = [
        [(0, place - 0.5), (1, place - 0.5), (1, place + 0.5), (0, place + 0.5)]
        for place in range(1, rows, 2)
    ]
    transform = axes.get_yaxis_transform()
    axes.add_collection(
        PolyCollection(bands, facecolor="#f5f5f5", transform=transform, zorder=0), autolim=False
    )


def draw_curves(axes: Axes, curves: dict[str, Curve], looks: dict[str, Look], bands: bool = True) -> None:
    """Draw the mean of each curve; for curves with a look also a band of ± 1 standard deviation."""
    grey = [
        np.column_stack([curve.steps_T, curve.mean_T])
        for label, curve in curves.items()
        if label not in looks
    ]
    if grey:
        axes.add_collection(LineCollection(grey, colors=OTHERS, linewidths=0.7, zorder=1), autolim=False)
    for number, (label, look) in enumerate(looks.items()):
        curve = curves.get(label)
        if curve is None:
            continue
        deviation_T, steps = curve.deviation_T, len(curve.steps_T)
        if bands and deviation_T is not None:
            low_T, high_T = curve.mean_T - deviation_T, curve.mean_T + deviation_T
            axes.fill_between(curve.steps_T, low_T, high_T, color=look.colour, alpha=0.13, linewidth=0)
        every = 1 if steps <= FEW else (number * steps // 40 % max(1, steps // 4), max(1, steps // 4))
        axes.plot(curve.steps_T, curve.mean_T, markevery=every, **look.of_line(), **look.of_marker())


def finish_steps(axes: Axes, title: str, unit: str, curves: dict[str, Curve], gap: float = 10) -> None:
    """Label a panel of curves, and set a range that shows most of them despite a few outliers."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    step_axis(axes, [int(curve.steps_T[-1]) for curve in curves.values()], margin=0.02)
    low, high = curves_range(list(curves.values()), gap)
    axes.set_ylim(low, high)
    above = sum(not (curve.mean_T <= high).any() for curve in curves.values())
    if above:
        axes.set_title(f"{counted(above, 'line')} above ↑", loc="right", fontsize=8)


def curves_range(curves: Sequence[Curve], gap: float = 10) -> Ends:
    """Return the range of the curves and their bands, without curves that lie far above the others.

    A curve lies far above if its distance from the lowest value is ``gap`` times that of the curves below it.
    """
    ends = [found for curve in curves if (found := _extent(curve)) is not None]
    if not ends:
        return 0.0, 1.0
    low = min(bottom for bottom, _ in ends)
    high = low + usual_reach([top - low for _, top in ends], gap, least=1e-2 * abs(low))
    margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
    return low - margin, high + margin


def _extent(curve: Curve) -> Ends | None:
    """Return the range of a curve and its band, without a few steps that lie far above the others."""
    half_T = 0.0 if curve.deviation_T is None else curve.deviation_T
    values = np.concatenate([curve.mean_T - half_T, curve.mean_T + half_T])
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high, most = float(known.min()), float(known.max()), float(np.quantile(known, 0.98))
    return low, low + 1.3 * (most - low) if high - low > 10 * (most - low) > 0 else high


def usual_reach(distances: Sequence[float], gap: float, least: float = 0.0) -> float:
    """Return the largest of ``distances`` before a gap above their median; a gap is a factor of ``gap``."""
    ordered = sorted(distances)
    middle = (len(ordered) - 1) // 2
    reach = max(least, ordered[middle])
    for distance in ordered[middle:]:
        if distance > gap * reach > 0:
            break
        reach = max(reach, distance)
    return reach


def value_range(values: Sequence[float], ends: Sequence[Ends | None]) -> Ends:
    """Return the range of an axis of values with intervals; intervals that are far wider are cut."""
    low, high = min(values), max(values)
    least = (0.02 if low == high else 0.002) * abs(high) or 1.0  # a finer scale would show noise
    spread = max(high - low, least)
    known = [both for both in ends if both is not None]
    widest = max((b - a for a, b in known), default=0.0)
    reach = 2 * spread if len(values) > 2 else max(2 * spread, widest)
    bottom = max(low - reach, min([low, *(a for a, _ in known)]))
    top = min(high + reach, max([high, *(b for _, b in known)]))
    margin = max(0.06 * (top - bottom), (least - (top - bottom)) / 2)
    return bottom - margin, top + margin


def scale_of(values: Sequence[float], ends: Sequence[Ends | None], ratio: float) -> Scale:
    """Return the scale of values with intervals; logarithmic if the values span more than ``ratio``."""
    smallest, largest = min(values), max(values)
    if smallest > 0 and largest / smallest > ratio:
        return Scale(smallest / 1.25, largest * 1.25, log=True)
    return Scale(*value_range(values, ends))


def set_scale(axes: Axes, axis: Literal["x", "y"], scale: Scale) -> None:
    """Scale an axis, with round ticks in plain numbers."""
    if scale.log:
        log_ticks(axes, scale.low, scale.high, axis)
        return
    (axes.set_xlim if axis == "x" else axes.set_ylim)(scale.low, scale.high)
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(MaxNLocator(5 if axis == "x" else 6, steps=[1, 2, 2.5, 5, 10]))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: plain(value).replace("-", MINUS)))


def hollow(axes: Axes, x: float, y: float, marker: str, colour: str, transform: Transform) -> None:
    """Draw a hollow marker, which stands for a configuration that ran out of memory."""
    style = {"marker": marker, "markersize": 6, "markerfacecolor": "white", "markeredgecolor": colour}
    axes.plot(x, y, **style, ls="", transform=transform, zorder=6)


def beside(axes: Axes, text: str, at: Ends, points: float, coords: Any, **settings: Any) -> None:
    """Write a text to the right of ``at``, or to the left if ``points`` is negative."""
    side = "left" if points > 0 else "right"
    axes.annotate(
        text, at, xycoords=coords, xytext=(points, 0), textcoords="offset points", ha=side, **settings
    )


def name_rows(axes: Axes, names: Sequence[str], size: float) -> None:
    """Name the rows of a panel from top to bottom, and shade every second row."""
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylim(len(names) - 0.4, -0.6)
    plain_rows(axes, len(names))


def plain_rows(axes: Axes, rows: int) -> None:
    """Draw a panel of rows without marks at the side, and shade every second row."""
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    stripes(axes, rows)


def write_beside(axes: Axes, texts: Sequence[str], size: float) -> None:
    """Write a text at the right end of each row, as ticks of a second axis, so that the texts get room."""
    other = axes.twinx()
    other.set_ylim(axes.get_ylim())
    other.set_yticks(range(len(texts)), texts, fontsize=size)
    other.tick_params(axis="y", length=0)
    other.grid(False)


def write_in_row(axes: Axes, row: int, text: str, right: bool = False, colour: str = "black") -> None:
    """Write a text at the left or the right end of a row, inside the panel."""
    at, side = (0.99, "right") if right else (0.01, "left")
    place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center"}
    axes.text(at, row, text, fontsize=7, color=colour, **place)


def write_above(axes: Axes, text: str, at: float, points: float, coords: Any, side: str = "left") -> None:
    """Write a text some points above the panel."""
    place = {"xytext": (0, points), "textcoords": "offset points", "ha": side, "va": "bottom"}
    axes.annotate(text, (at, 1), xycoords=coords, fontsize=8, **place)


def mean_and_ends(*summaries: Summary) -> list[float | None]:
    """Return for each summary its mean and both ends of its interval, for a table."""
    return [value for found in summaries for value in (found.mean, *(found.interval or (None, None)))]


def cell(value: float | None) -> float | None:
    """Return a number for a table; None for NaN."""
    return None if value is None or math.isnan(value) else float(value)
