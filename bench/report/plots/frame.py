"""What the plots of a study share: header, names and looks; curves over seeds; marks, rows and scales.

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
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation, Transform
from scipy.signal import lfilter
from scipy.stats import t as student

from bench.record import MINUS
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.plots.run import smoothing_span
from bench.report.plots.style import (
    GREY,
    NAME_LENGTH,
    Look,
    corpus_words,
    headed_figure,
    log_ticks,
    plain,
    printable,
    shorten,
)
from bench.report.quantities import counted, share
from bench.report.statistics import Summary
from bench.study.labels import OF_HYPERGRAPHS, part_text
from bench.study.run_files import Row, RunData
from bench.study.runs import Configuration, Run

MAX_LOOKS, BEST = 20, 12
"""The most configurations with a look; of more, the number of best ones with a look, beside the baseline."""
WIDTH = 10.0
"""The width of a figure in inches."""
MOST_STEPS = 400
"""The most steps of a curve that a picture can show."""
Ends = tuple[float, float]
"""The ends of an interval or of an axis."""
ARROWS = "arrow: the interval goes on beyond the axis"
SIDE_BY_SIDE = "marks that would cover each other stand side by side"
NOTES = (ARROWS, SIDE_BY_SIDE)
"""Notes below a panel that only some pictures need."""


@dataclass(frozen=True)
class Frame:
    """A study's name and comparison, with the names, looks and curves that its plots share."""

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
        return short_names(self.comparison.group.configurations)[0]

    @property
    def baseline(self) -> str:
        """The name of the baseline coupler: the configuration that all others are compared with."""
        return self.names[self.comparison.reference.label]

    @cached_property
    def looks(self) -> dict[str, Look]:
        """The look of each configuration that has one, by its label; the other configurations are grey."""
        found, variants = {}, Counter[str]()
        for one in self.comparison.group.configurations:
            found[one.label] = Look.of(one.coupler, variants[one.coupler])
            variants[one.coupler] += 1
        if len(self.measured) <= MAX_LOOKS:
            return found
        shown = {row.configuration.label for row in self.measured[:BEST]} | {self.comparison.reference.label}
        return {label: look for label, look in found.items() if label in shown}

    @cached_property
    def training_losses(self) -> dict[str, Curve]:
        """The smoothed training loss in nats by label; without configurations that have no history."""
        curves = {row.configuration.label: training_curve(row.configuration, "loss") for row in self.measured}
        return {label: curve.smoothed() for label, curve in curves.items() if curve is not None}

    @cached_property
    def validation_losses(self) -> dict[str, Curve]:
        """The validation loss in nats by label; without configurations that have no evaluation."""
        curves = {row.configuration.label: validation_curve(row.configuration) for row in self.measured}
        return {label: curve.thinned() for label, curve in curves.items() if curve is not None}

    def name(self, configuration: Configuration) -> str:
        """Return the name of a configuration, with "(baseline)" if the others are compared with it."""
        role = " (baseline)" if configuration is self.comparison.reference else ""
        return self.names[configuration.label] + role

    def figure(self, subject: str, height: float, *notes: str, width: float = WIDTH) -> Figure:
        """Return an empty figure below the study's header; the notes say how to read it."""
        group = self.comparison.group
        seeds = sorted({row.loss.n for row in self.measured})
        each = f"{seeds[0]}–{counted(seeds[-1], 'seed')}" if len(seeds) > 1 else counted(seeds[0], "seed")
        runs = (run.record for run in group.runs if run.counts)
        corpus = next((words for record in runs if (words := corpus_words(record))), "")
        sizes = f"{counted(len(group.configurations), 'configuration')}, {each} each"
        tokens, *_, unknown = group.basis.protocol or (1, 0)
        words = f"{share(unknown / tokens)} unknown words" if unknown else ""
        about = " · ".join(filter(None, (corpus, words, sizes, shorten(self.study, 60))))
        note = " ".join(filter(None, (*notes, short_names(group.configurations)[1])))
        return headed_figure(subject, about, self.warnings(), width, height, note)

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
                for one, found in lost[:8]
            ]
            listed += [f"and {counted(len(lost) - 8, 'more configuration')}"] * (len(lost) > 8)
            notes.append(f"{total} of {counted(len(group.runs), 'run')} do not count ({'; '.join(listed)})")
        return notes

    def about_looks(self) -> str:
        """Return a sentence on which configurations have a colour; empty if all have one."""
        grey = len(self.measured) - len(self.looks)
        return f"In colour: the {BEST} best and the baseline; grey: {grey} others." if grey > 0 else ""


def _why_not(run: Run) -> str:
    """Return why a run does not count."""
    if run.status != "ok":
        return run.status
    return "with a seed that ran twice" if run.counts else "not scored"


def short_names(configurations: Sequence[Configuration]) -> tuple[dict[str, str], str]:
    """Return a short unique name for each label, and a sentence on what the names leave out.

    A name leaves out the value of a hypergraph flag that most configurations of the coupler share, and the
    folder of a coupler's file.
    """
    common: dict[str, list[str]] = {}
    for coupler in dict.fromkeys(one.coupler for one in configurations):
        alike = [one for one in configurations if one.coupler == coupler]
        for flag in OF_HYPERGRAPHS:
            ((text, count),) = Counter(part_text(flag, one.flags.get(flag)) for one in alike).most_common(1)
            parts = [one for one in alike if text in one.label.split(" · ")]
            if len(parts) == count and 2 * count > len(alike):
                common.setdefault(coupler, []).append(text)
    said = "; ".join(f"{shorten(name)}: {', '.join(texts)}" for name, texts in common.items())
    note = f"Where a name does not say otherwise, {said}." if said else ""
    for separators, left_out, words in ((":/", common, note), ("/", common, note), ("/", {}, "")):
        names = {one.label: _name(one, separators, left_out.get(one.coupler, ())) for one in configurations}
        if len(set(names.values())) == len(names):
            return names, words
    return {label: f"{name} #{place}" for place, (label, name) in enumerate(names.items(), 1)}, ""


def _name(one: Configuration, separators: str, left_out: Sequence[str]) -> str:
    """Return the label without what precedes one of ``separators``, and without the parts ``left_out``."""
    coupler, *parts = one.label.split(" · ")
    for separator in separators:
        coupler = coupler.rpartition(separator)[2]
    rest = "".join(f" · {part}" for part in parts if part not in left_out)
    return printable(shorten(shorten(coupler, max(16, NAME_LENGTH - len(rest))) + rest))


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
    def half_T(self) -> np.ndarray | None:
        """Half the width of the 95% t interval of the mean; None for one seed."""
        n = len(self.seeds)
        if n < 2:
            return None
        with np.errstate(invalid="ignore"):
            return student.ppf(0.975, n - 1) * self.values_ST.std(axis=0, ddof=1) / math.sqrt(n)

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

    def minus(self, other: Curve) -> Curve | None:
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


def sampled_curve(configuration: Configuration, name: str) -> Curve | None:
    """Return the mean over the layers of a sampled number, such as effective_rank; None without samples."""
    return _curve(configuration, lambda run: _samples(run, name), lambda row: row["value"])


def _samples(run: RunData, name: str) -> list[Row]:
    of_layers = [values for key, values in run.trace.items() if key.partition(".")[2] == name]
    if not of_layers or any(values.ndim != 1 for values in of_layers):
        return []
    pairs = zip(run.trace["step"].tolist(), np.mean(of_layers, axis=0).tolist(), strict=True)
    return [{"step": step, "value": value} for step, value in pairs]


def _curve(configuration: Configuration, rows_of: Callable, value: Callable[[Row], float]) -> Curve | None:
    rows = {seed: rows_of(run.data) for seed, run in configuration.counted.items()}
    rows = {seed: found for seed, found in rows.items() if found}
    steps = [[row["step"] for row in found] for found in rows.values()]
    if not steps:
        return None
    values = [np.array([value(row) for row in found], dtype=float) for found in rows.values()]
    common_T = np.array(steps[0])
    if any(other != steps[0] for other in steps):
        common_T = reduce(np.intersect1d, map(np.array, steps))
        values = [one[np.isin(own, common_T)] for one, own in zip(values, steps, strict=True)]
    return Curve(tuple(rows), common_T, np.stack(values)) if len(common_T) else None


class Scale(NamedTuple):
    """The ends of an axis, and whether it is logarithmic."""

    low: float
    high: float
    log: bool = False


def intervals(
    axes: Axes,
    places: Sequence[float],
    ends: Sequence[Ends | None],
    vertical: bool = False,
    shift: float = 0.0,
    **settings: Any,
) -> None:
    """Draw a horizontal or vertical line for the interval at each place; None means no interval.

    Set the scale first: an end beyond the axis has an arrow. ``shift`` moves everything sideways, in points.
    """
    low, high = sorted(axes.get_ylim() if vertical else axes.get_xlim())
    segments, moved = [], shifted(axes, shift)
    for place, both in zip(places, ends, strict=True):
        if both is None:
            continue
        segments.append([(place, end) if vertical else (end, place) for end in both])
        for beyond, edge, arrow in ((both[0] < low, low, "<v"), (both[1] > high, high, ">^")):
            if beyond:
                at = (place, edge) if vertical else (edge, place)
                look = {"ms": 5, "color": settings.get("colors"), "clip_on": False, "zorder": 5}
                axes.plot(*at, arrow[vertical], transform=moved, **look)
                note_below(axes, ARROWS)
    if segments:
        axes.add_collection(LineCollection(segments, transform=moved, **settings), autolim=False)


def shifted(axes: Axes, points: float) -> Transform:
    """Return the transform of the data of a panel, moved sideways by some points."""
    return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def shifts_apart(axes: Axes, places: Sequence[tuple[float, float]], size: float) -> list[float]:
    """Return by how many points to move each mark of ``size`` sideways, so that it covers no earlier mark.

    Set the scale first. A mark that covers none stays where it is.
    """
    taken: list[tuple[float, float]] = []
    found: list[float] = []
    for x, y in axes.transData.transform(places) * 72 / axes.figure.dpi:
        tries = (side * step * size for step in range(len(places)) for side in (1, -1))
        free = (
            shift for shift in tries if not any(math.hypot(x + shift - a, y - b) < size for a, b in taken)
        )
        shift = next(free, 0.0)
        taken.append((x + shift, y))
        found.append(shift)
    if any(found):
        note_below(axes, SIDE_BY_SIDE)
    return found


def note_below(axes: Axes, text: str) -> None:
    """Write a small note below a panel, at its right end; once in a figure."""
    if any(other.get_gid() == text for panel in axes.figure.axes for other in panel.texts):
        return
    above = sum(other.get_gid() in NOTES for other in axes.texts)
    place = {"xytext": (0, -32 - 9 * above), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(text, (1, 0), xycoords="axes fraction", fontsize=6.5, color=GREY, gid=text, **place)


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


def name_rows(axes: Axes, names: Sequence[str], size: float) -> None:
    """Name the rows of a panel from top to bottom, and shade every second row."""
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylim(len(names) - 0.4, -0.6)
    plain_rows(axes, len(names))


def plain_rows(axes: Axes, rows: int) -> None:
    """Draw a panel of rows without marks at the side, and shade every second row as one artist."""
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    bands = [
        [(0, place - 0.5), (1, place - 0.5), (1, place + 0.5), (0, place + 0.5)]
        for place in range(1, rows, 2)
    ]
    shade = PolyCollection(bands, facecolor="#f5f5f5", transform=axes.get_yaxis_transform(), zorder=0)
    axes.add_collection(shade, autolim=False)


def write_beside(axes: Axes, texts: Sequence[str], size: float, colours: Sequence[str] = ()) -> None:
    """Write a text at the right end of each row; the rows must have been named before.

    The texts are ticks of a second axis, so that they get room.
    """
    other = axes.twinx()
    other.set_ylim(axes.get_ylim())
    other.set_yticks(range(len(texts)), texts, fontsize=size)
    other.tick_params(axis="y", length=0)
    other.grid(False)
    for label, colour in zip(other.get_yticklabels(), colours, strict=False):
        label.set_color(colour)


def write_in_row(axes: Axes, row: int, text: str, right: bool = False, colour: str = "black") -> None:
    """Write a text at the left or the right end of a row, inside the panel."""
    at, side = (0.99, "right") if right else (0.01, "left")
    place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center"}
    axes.text(at, row, text, fontsize=7, color=colour, **place)


def write_above(axes: Axes, text: str, at: float, points: float, coords: Any, side: str = "left") -> None:
    """Write a text some points above the panel."""
    place = {"xytext": (0, points), "textcoords": "offset points", "ha": side, "va": "bottom"}
    axes.annotate(text, (at, 1), xycoords=coords, fontsize=7.5, **place)


def mean_and_ends(*summaries: Summary) -> list[float | None]:
    """Return for each summary its mean and both ends of its interval, for a table."""
    return [value for found in summaries for value in (found.mean, *(found.interval or (None, None)))]


def cell(value: float | None) -> float | None:
    """Return a number for a table; None for NaN."""
    return None if value is None or math.isnan(value) else float(value)
