"""What all plots of one study share: header, warnings, names, and how each configuration looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.analysis.comparison import Comparison, ComparisonRow
from bench.analysis.numbers import counted
from bench.analysis.plot_style import (
    BLUE,
    GREEN,
    LINE_STYLES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    headed_figure,
    printable,
    shorten,
)  # fmt: skip
from bench.analysis.study_plots.curves import Curve, training_curve, validation_curve
from bench.study.runs import Configuration

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)  # with four line styles: twelve looks
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "d")
MAX_LOOKS = 12  # more lines cannot be told apart
BEST = 7  # of more, so many have a look, and the reference
OTHERS = "#bbbbbb"
LABEL_LENGTH = 44
WIDTH = 10.0  # inches, as the plots of a run
LEGEND_ROW, LETTER, HANDLE = 0.18, 0.068, 0.75  # inches


@dataclass(frozen=True)
class Look:
    """How a configuration is drawn, wherever it is drawn."""

    colour: str
    line: str
    marker: str
    width: float = 1.5

    def of_line(self) -> dict[str, Any]:
        """Return the settings of a line."""
        above = 3 if self.colour == "black" else 2
        return {"color": self.colour, "linestyle": self.line, "linewidth": self.width, "zorder": above}

    def of_marker(self) -> dict[str, Any]:
        """Return the settings of markers."""
        return {"marker": self.marker, "markersize": 5.5, "markerfacecolor": self.colour,
                "markeredgecolor": "black", "markeredgewidth": 0.5}  # fmt: skip


REFERENCE = Look("black", "-", "o", 2.2)


@dataclass(frozen=True)
class Frame:
    """A study's name and comparison, and what its plots have in common."""

    study: str
    comparison: Comparison

    @cached_property
    def measured(self) -> list[ComparisonRow]:
        """The rows with a loss, the best first."""
        rows = [row for row in self.comparison.rows if row.loss.mean is not None]
        return sorted(rows, key=lambda row: row.loss.mean or 0.0)

    @cached_property
    def names(self) -> dict[str, str]:
        """Label → what a plot calls the configuration: in one line, drawable, never twice the same."""
        return short_names([row.configuration.label for row in self.comparison.rows])

    @cached_property
    def looks(self) -> dict[str, Look]:
        """Label → look of the configurations that are told apart; the others are grey."""
        known = [row.configuration.label for row in self.measured]
        stable = [one.label for one in self.comparison.group.configurations if one.label in known]
        return looks(stable, self.comparison.reference.label, ranked=known)

    @cached_property
    def training_losses(self) -> dict[str, Curve]:
        """Label → smoothed training loss in nats, of those with a history."""
        curves = {row.configuration.label: training_curve(row.configuration, "loss") for row in self.measured}
        return {label: curve.smoothed().thinned() for label, curve in curves.items() if curve is not None}

    @cached_property
    def validation_losses(self) -> dict[str, Curve]:
        """Label → validation loss in nats, of those with an evaluation."""
        curves = {row.configuration.label: validation_curve(row.configuration) for row in self.measured}
        return {label: curve.thinned() for label, curve in curves.items() if curve is not None}

    def name(self, configuration: Configuration) -> str:
        """Return the name of a configuration, and whether it is the reference."""
        role = " (reference)" if configuration is self.comparison.reference else ""
        return self.names[configuration.label] + role

    def figure(self, subject: str, height: float, *notes: str) -> Figure:
        """Return an empty figure below the study's header, whose notes say how to read it."""
        group = self.comparison.group
        parts = [shorten(self.study), counted(len(group.configurations), "configuration"),
                 counted(len(group.runs), "run"), group.basis.words()]  # fmt: skip
        return headed_figure(subject, printable(" · ".join(parts)), self.warnings(), WIDTH, height,
                             " ".join(filter(None, notes)))  # fmt: skip

    def warnings(self) -> list[str]:
        """Return what a reader of any plot must not miss."""
        group = self.comparison.group
        notes = ["NOT WIKITEXT-2: embedded text"] * group.embedded
        lost = [(one, Counter(run.status if run.status != "ok" else
                              "with a seed that ran twice" if run.counts else "not scored"
                              for run in one.runs if one.doubled or not run.counts))
                for one in group.configurations]  # fmt: skip
        lost = [(one, statuses) for one, statuses in lost if statuses]
        if lost:
            total = sum(statuses.total() for _, statuses in lost)
            listed = [f"{self.names[one.label]}: {', '.join(f'{n} {status}' for status, n in found.items())}"
                      for one, found in lost[:4]]  # fmt: skip
            listed += [f"and {counted(len(lost) - 4, 'more configuration')}"] * (len(lost) > 4)
            notes.append(f"{total} of {counted(len(group.runs), 'run')} do not count ({'; '.join(listed)})")
        return notes

    def about_looks(self) -> str:
        """Return which configurations have a look, where not all have one."""
        grey = len(self.measured) - len(self.looks)
        if not grey:
            return ""
        return f"In colour: {best_and_reference(self.looks)}; grey: {grey} others."

    def legend(self, lines: bool = True) -> Legend:
        """Return the legend of the configurations in the order of the losses, the best first."""
        entries = [(self.name(row.configuration), self.looks[row.configuration.label])
                   for row in self.measured if row.configuration.label in self.looks]  # fmt: skip
        return Legend.of(entries, lines, others=len(self.measured) - len(entries))


def looks(labels: Sequence[str], reference: str | None, ranked: Sequence[str]) -> dict[str, Look]:
    """Return label → look; of more than ``MAX_LOOKS`` only of the reference and the best of ``ranked``."""
    if len(labels) > MAX_LOOKS:
        best = [label for label in ranked if label != reference][:BEST]
        labels = [label for label in labels if label == reference or label in best]
    found = {label: REFERENCE for label in labels if label == reference}
    for place, label in enumerate(label for label in labels if label != reference):
        found[label] = Look(COLOURS[place % 6], LINE_STYLES[place % 4], MARKERS[place % 12])
    return found


def best_and_reference(found: dict[str, Look]) -> str:
    """Return in words which configurations have a look, where not all have one."""
    if REFERENCE not in found.values():
        return f"the best {len(found)}"
    return f"the best {len(found) - 1} and the reference"


def short_names(labels: Sequence[str], length: int = LABEL_LENGTH) -> dict[str, str]:
    """Return label → its short form; where two would be the same they get a number each."""
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
    """Handles of a legend, and the room that it takes below the panels."""

    handles: list[Line2D]
    handle_length: float = 3.6

    @classmethod
    def of(cls, entries: Sequence[tuple[str, Look]], lines: bool = True, others: int = 0) -> Legend:
        """Return the legend of these names and looks, and of so many grey ``others``."""
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
        """How many columns fit below the panels."""
        widest = HANDLE + LETTER * max((len(str(handle.get_label())) for handle in self.handles), default=1)
        return max(1, min(4, len(self.handles), int((WIDTH - 0.2) / widest)))

    @property
    def height(self) -> float:
        """Its height below the panels, in inches."""
        return LEGEND_ROW * -(-len(self.handles) // self.columns) + 0.1

    def below(self, figure: Figure) -> None:
        """Write it below the panels."""
        figure.legend(handles=self.handles, loc="outside lower left", ncols=self.columns,
                      handlelength=self.handle_length, columnspacing=1.5, borderaxespad=0.2)  # fmt: skip
