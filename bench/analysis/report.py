"""Everything that a report says of a study, ready to be shown on a terminal, as files or as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.analysis.answers import Answered, answer_hypotheses
from bench.analysis.comparison import Comparison, compare
from bench.analysis.comparison_tables import comparison_table, pairs_table
from bench.analysis.numbers import counted
from bench.analysis.plot_style import Plot, plot_style
from bench.analysis.run_data import set_aside
from bench.analysis.run_tables import failures_table, runs_table
from bench.analysis.study import Study, doubled_words, load_study, statuses, text_warnings
from bench.analysis.study_plots import study_plots
from bench.analysis.tables import Table
from bench.analysis.weights import WeightsReading, read_weights
from bench.analysis.weights_figures import weights_plots
from bench.analysis.words import verdict_sentences
from bench.files import visible
from bench.sweeps.hypotheses import Hypothesis, stated
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name


@dataclass(frozen=True)
class Section:
    """One group of a study, whose configurations share a table: what it shows and what follows from it."""

    suffix: str
    """Of the names of its tables and plots: empty, or ``_2`` for the second group."""
    comparison: Comparison
    comparison_table: Table
    pairs_table: Table
    weights: list[WeightsReading]

    def sentences(self) -> list[str]:
        """Return the verdicts in words."""
        return verdict_sentences(self.comparison)


@dataclass(frozen=True)
class Report:
    """A study, read and judged."""

    study: Study
    sections: list[Section]
    answers: list[Answered]
    stated: str | None
    """When the hypotheses were stated, in words; None without any."""
    runs_table: Table
    failures_table: Table

    @property
    def tables(self) -> list[Table]:
        """All tables: those of each section, then those of the study."""
        of_sections = [
            table for section in self.sections for table in (section.comparison_table, section.pairs_table)
        ]
        return [*of_sections, self.runs_table, self.failures_table]

    def headline(self) -> str:
        """Return what the study holds in one line."""
        runs = self.study.runs
        seeds = counted(len({run.seed for run in runs}), "seed")
        number = sum(len(group.configurations) for group in self.study.groups)
        return f"{counted(len(runs), 'run')} ({statuses(runs)}), {counted(number, 'configuration')}, {seeds}"

    def doubled(self) -> list[str]:
        """Return, in words, the runs of one seed of one configuration, which no comparison uses."""
        return [text for group in self.study.groups for one in group.configurations
                for text in doubled_words(one)]  # fmt: skip

    def warnings(self) -> list[str]:
        """Return what a reader must not miss."""
        found = [*text_warnings(self.study.groups), *self.doubled()]
        if len(self.sections) > 1:
            found.append(
                f"{len(self.sections)} tables, since corpus, device, evaluation, or used batch and length "
                "differ; --allow-unequal puts those that differ in the last two into one."
            )
        if self.study.unreadable:
            found.append(
                f"{counted(len(self.study.unreadable), 'file')} of runs cannot be read; see the failures."
            )
        found += [f"Folder {visible(folder.name)} is not counted: {why}."
                  for folder, why in self.study.misplaced]  # fmt: skip
        failed = Counter(run.status for run in self.study.runs if not run.counts)
        if failed:
            found.append(
                "Not counted: " + ", ".join(f"{count} {status}" for status, count in failed.items()) + "."
            )
        return found


def make_report(
    study: Study,
    reference: str | None = None,
    hypotheses: Sequence[Hypothesis] = (),
    stated_at: str | None = None,
) -> Report:
    """Compare every group of a study, answer its hypotheses and make its tables.

    ``reference`` is the label of a configuration, in the groups that have it; ``stated_at`` the UTC time at
    which the hypotheses were written down.

    Raises:
        Refused: no configuration has the label ``reference``.
    """
    labels = [found.label for group in study.groups for found in group.configurations]
    if reference is not None and reference not in labels:
        raise Refused(unknown_name("configuration", reference, labels))
    sections = []
    for number, group in enumerate(study.groups, 1):
        has_it = any(found.label == reference for found in group.configurations)
        comparison, suffix = compare(group, reference if has_it else None), f"_{number}" if number > 1 else ""
        sections.append(Section(suffix, comparison, comparison_table(comparison, suffix),
                                pairs_table(comparison, suffix), read_weights(comparison)))  # fmt: skip
    readable = [replace(found, statement=visible(found.statement)) for found in hypotheses]
    answers = answer_hypotheses(readable, study.groups)
    when = _when(study, stated_at) if hypotheses else None
    return Report(study, sections, answers, when, runs_table(study.groups), failures_table(study))


def make_plots(report: Report) -> list[Plot]:
    """Draw every plot of a report; names are unique, those of a second group end in ``_2``."""
    plots = []
    with plot_style():
        for section in report.sections:
            name = report.study.name
            found = [*study_plots(name, section.comparison), *weights_plots(name, section.comparison)]
            plots += [
                Plot(plot.name + section.suffix, plot.figure, plot.columns, plot.rows) for plot in found
            ]
    return plots


def load_report(path: Path, reference: str | None = None, allow_unequal: bool = False) -> Report:
    """Read the study in a folder and report on it, with the hypotheses that its sweep stated.

    Raises:
        Refused: as ``load_study``, ``stated`` and ``make_report``.
    """
    hypotheses, when = stated(path)
    return make_report(load_study(path, allow_unequal), reference, hypotheses, when)


def _when(study: Study, time: str | None) -> str:
    if time is None:
        return (
            "given to the report, not kept by the sweep: nothing shows that they were stated before the runs"
        )
    starts = [run.record.time.start for run in study.runs]
    starts += [run.get("start") for run in set_aside(study.path)]
    earlier = sum(start is None or start < time for start in starts)
    order = "before the first run" if not earlier else (
        f"when {earlier:,} of {counted(len(starts), 'run')} had started, or may have")  # fmt: skip
    others = sorted(visible(path.name) for path in study.path.glob("hypotheses.*.json"))
    return f"stated {visible(time)}, {order}" + (f"; others before: {', '.join(others)}" if others else "")
