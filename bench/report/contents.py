"""The contents of a report: its comparisons, verdicts in sentences, answers, tables and plots.

Written as files it is ``files``, on a terminal ``terminal``, as one page ``page``; as Markdown it is here:
the summary, and the part of a page for people that ``--page`` writes between two marks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from bench.files import between, cannot_write, visible, write_between, write_whole
from bench.record import exp_or_infinity, number
from bench.report.comparison import (
    Answered,
    Comparison,
    ComparisonRow,
    CostOverMean,
    answer_hypotheses,
    compare,
)
from bench.report.plots.frame import Frame
from bench.report.plots.study import perplexity_plot, study_plots
from bench.report.plots.style import Plot, plot_style
from bench.report.provenance import codes_of
from bench.report.quantities import (
    PARAMETERS,
    PEAK_MEMORY,
    UNKNOWN_WORDS,
    counted,
    mebibytes,
    millions,
    p_value,
    percent,
    perplexities,
    share,
    signed,
    span,
    with_interval,
)
from bench.report.tables import (
    Table,
    comparison_table,
    failures_table,
    pairs_table,
    reference_lines,
    runs_table,
)
from bench.report.weights import WeightsReading, read_weights
from bench.study.hypotheses import Hypothesis, seeds_needed, stated
from bench.study.run_files import set_aside
from bench.study.runs import Configuration, Study, doubled_words, load_study, statuses, text_warnings
from gnnmoe.config import Refused, unknown_name

COLUMNS = (
    "configuration|n|perplexity [95%]|unknown words|nats to {}|p|verdict|time per step over mean|peak memory"
    "|parameters"
).split("|")
"""The columns of the table that ``--page`` writes."""
WHOLE, TABLE = "what", "the table that"
"""The two parts of a study that a page can have, in the words of its marks: all of it, or only its table."""


@dataclass(frozen=True)
class Section:
    """One group of a study, whose configurations share a table."""

    suffix: str
    """The end of the names of its tables and plots: empty, or ``_2`` for the second group."""
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
    """When the hypotheses were stated, in words; None without hypotheses."""
    runs_table: Table
    failures_table: Table

    @property
    def tables(self) -> list[Table]:
        """All tables: those of each section, then those of the study."""
        both = [(section.comparison_table, section.pairs_table) for section in self.sections]
        return [*(table for pair in both for table in pair), self.runs_table, self.failures_table]

    def headline(self) -> str:
        """Return the size of the study in one line."""
        runs = self.study.runs
        seeds = counted(len({run.seed for run in runs}), "seed")
        configurations = sum(len(group.configurations) for group in self.study.groups)
        sizes = f"{counted(configurations, 'configuration')}, {seeds}"
        return f"{counted(len(runs), 'run')} ({statuses(runs)}), {sizes}"

    def doubled(self) -> list[str]:
        """Return a sentence for each seed of a configuration with several runs, which no comparison uses."""
        return [
            text for group in self.study.groups for one in group.configurations for text in doubled_words(one)
        ]

    def warnings(self) -> list[str]:
        """Return what a reader must not miss."""
        found = [*text_warnings(self.study.groups), *self.doubled()]
        if len(self.sections) > 1:
            found.append(
                f"{len(self.sections)} tables, since corpus, device, evaluation, or used batch and length "
                "differ; --allow-unequal puts those that differ in the last two into one."
            )
        if self.study.unreadable:
            files = counted(len(self.study.unreadable), "file")
            found.append(f"{files} of runs cannot be read; see the failures.")
        found += [
            f"Folder {visible(folder.name)} is not counted: {why}." for folder, why in self.study.misplaced
        ]
        failed = Counter(run.status for run in self.study.runs if not run.counts)
        if failed:
            listed = ", ".join(f"{count} {status}" for status, count in failed.items())
            found.append(f"Not counted: {listed}.")
        return found


def make_report(
    study: Study,
    reference: str | None = None,
    hypotheses: Sequence[Hypothesis] = (),
    stated_at: str | None = None,
) -> Report:
    """Compare every group of a study, answer its hypotheses and make its tables.

    ``reference`` is the label of a configuration, for the groups that have it. ``stated_at`` is the UTC time
    at which the hypotheses were written down.

    Raises:
        Refused: no configuration has the label ``reference``.
    """
    labels = [found.label for group in study.groups for found in group.configurations]
    if reference is not None and reference not in labels:
        raise Refused(unknown_name("configuration", reference, labels))
    sections = []
    for place, group in enumerate(study.groups, 1):
        has_it = any(found.label == reference for found in group.configurations)
        suffix = f"_{place}" if place > 1 else ""
        comparison = compare(group, reference if has_it else None)
        tables = comparison_table(comparison, suffix), pairs_table(comparison, suffix)
        sections.append(Section(suffix, comparison, *tables, read_weights(comparison)))
    readable = [replace(found, statement=visible(found.statement)) for found in hypotheses]
    answers = answer_hypotheses(readable, study.groups)
    when = _when(study, stated_at) if hypotheses else None
    return Report(study, sections, answers, when, runs_table(study.groups), failures_table(study))


def load_report(path: Path, reference: str | None = None, allow_unequal: bool = False) -> Report:
    """Read the study in a folder and report on it, with the hypotheses that its sweep stated.

    Raises:
        Refused: as ``load_study``, ``stated`` and ``make_report``.
    """
    hypotheses, when = stated(path)
    return make_report(load_study(path, allow_unequal), reference, hypotheses, when)


def make_plots(report: Report) -> list[Plot]:
    """Draw every plot of a report; the names of a second group's plots end in ``_2``."""
    plots = []
    with plot_style():
        for section in report.sections:
            found = study_plots(report.study.name, section.comparison)
            plots += [replace(plot, name=plot.name + section.suffix) for plot in found]
    return plots


def main_plot(report: Report) -> Plot:
    """Return the plot ``perplexity`` of the largest group of a study.

    Raises:
        Refused: no run of the group counts.
    """
    frame = Frame(report.study.name, report.sections[0].comparison)
    if not frame.measured:
        raise Refused(f"no run of {report.study.name} has a perplexity; there is nothing to draw.")
    with plot_style():
        return perplexity_plot(frame)


def write_image(path: Path, report: Report) -> None:
    """Write the plot ``perplexity`` as a picture, whose metadata hold the mark of its data.

    Raises:
        Refused: the path does not end in .png or .svg or cannot be written, or no run counts.
    """
    ending = path.suffix.removeprefix(".")
    if ending not in ("png", "svg"):
        raise Refused(f"an image ends in .png or .svg, not in {path.suffix or path.name!r}: --image {path}")
    drawing = main_plot(report).drawing(ending)
    try:
        write_whole(path, drawing)
    except OSError as error:
        raise Refused(cannot_write(path, error)) from error


def _when(study: Study, time: str | None) -> str:
    """Return in words when the hypotheses were stated, and whether that was before the runs."""
    if time is None:
        return (
            "given to the report, not kept by the sweep: nothing shows that they were stated before the runs"
        )
    starts = [run.record.time.start for run in study.runs]
    starts += [run.get("start") for run in set_aside(study.path)]
    earlier = sum(start is None or start < time for start in starts)
    order = (
        "before the first run"
        if not earlier
        else (f"when {earlier:,} of {counted(len(starts), 'run')} had started, or may have")
    )
    others = sorted(visible(path.name) for path in study.path.glob("hypotheses.*.json"))
    return f"stated {visible(time)}, {order}" + (f"; others before: {', '.join(others)}" if others else "")


def verdict_sentences(comparison: Comparison) -> list[str]:
    """Return a sentence for every configuration beside the reference, and sentences on all of them."""
    sentences = [_sentence(row, comparison) for row in comparison.rows if row.against is not None]
    sentences = [*_about_best(comparison), *sentences]
    alone = [
        row.configuration
        for row in comparison.rows
        if row.against is None and row.configuration is not comparison.reference
    ]
    doubled = [row.configuration for row in comparison.rows if row.configuration.doubled]
    for why, some in (
        ("since a seed of it has several runs", doubled),
        ("without a seed that counts in common", [one for one in alone if one not in doubled]),
    ):
        if some:
            sentences.append(f"Not compared, {why}: {', '.join(one.label for one in some)}.")
    few = _too_few(comparison)
    return [*sentences, few] if few else sentences


def _about_best(comparison: Comparison) -> list[str]:
    """Return whether one configuration is better than all others, or why nothing can say so."""
    best = comparison.best()
    if best is not None:
        return [f"{best.label} is better than every other configuration beyond the noise."]
    seeds = [pair.paired.n for pair in comparison.pairs]
    if not seeds or len(comparison.rows) <= 2 or _too_few(comparison):
        return []
    among = len(comparison.pairs) - comparison.comparisons
    if max(seeds) < seeds_needed(among):
        return [
            f"With {counted(max(seeds), 'seed')} no single best can be named, only differences from "
            f"{comparison.reference.label}: {seeds_needed(among)} are needed for the "
            f"{counted(among, 'comparison')} among the others."
        ]
    return ["No configuration is better than every other one beyond the noise."]


def _sentence(row: ComparisonRow, comparison: Comparison) -> str:
    """Return the verdict on a configuration with its evidence, and its cost."""
    against = row.against
    assert against is not None, "the caller has checked it"
    paired, name = against.paired, comparison.reference.label
    ratio = percent(exp_or_infinity(paired.mean), 2)
    interval = perplexities(paired.interval)
    about = f", 95% interval {percent(interval[0], 2)} to {percent(interval[1], 2)}" if interval else ""
    head = {
        "better": f"better than {name}",
        "worse": f"worse than {name}",
        "equivalent": f"equivalent to {name} (within ±0.01 nats)",
    }.get(against.verdict.kind, f"no significant difference from {name}")
    if against.verdict.below_minimum:
        head += ", by less than the minimum effect of 0.01 nats"
    text = (
        f"{row.configuration.label}: {head}: perplexity {ratio}{about} ({signed(paired.mean)} nats; "
        f"{counted(paired.n, 'paired seed')}, p {p_value(against.p_adjusted)})"
    )
    if against.verdict.kind == "not resolved":
        text += f"; {against.verdict.words()}"
    noise = against.articles
    if noise and against.verdict.kind in ("better", "worse") and noise[0] <= 0 <= noise[1]:
        text += f"; over other articles the difference might vanish {span(noise, 4, sign=True)}"
    return f"{text}.{_cost(row.cost)}"


def _cost(cost: CostOverMean | None) -> str:
    """Return the cost of a configuration over the mean coupler."""
    if cost is None:
        return ""
    parts = []
    time, ends = cost.step_time_ratio(), cost.step_time_interval()
    if time is not None:
        about = f" ({percent(ends[0], 0)} to {percent(ends[1], 0)})" if ends else ""
        parts.append(f"{percent(time, 0)} time per step{about}")
    if cost.memory_bytes is not None:
        parts.append(f"{mebibytes(cost.memory_bytes, sign=True)} of memory")
    if cost.parameters is not None:
        parts.append(f"{signed(cost.parameters, 0)} parameters")
    if cost.flops_per_token is not None:
        parts.append(f"{signed(cost.flops_per_token / 1e6, 2)} MFLOPs per token")
    return f" Over {cost.over}: {', '.join(parts)}." if parts else ""


def _too_few(comparison: Comparison) -> str:
    """Return a sentence if there are too few seeds for any verdict."""
    count = comparison.comparisons
    seeds = [row.against.paired.n for row in comparison.rows if row.against is not None]
    if not seeds or max(seeds) >= seeds_needed(count):
        return ""
    have, need = counted(max(seeds), "seed"), seeds_needed(count)
    return (
        f"With {have} no difference can be told from noise here: {need} are needed for "
        f"{counted(count, 'comparison')} at p ≤ 0.05."
    )


def summary_markdown(report: Report) -> str:
    """Return ``summary.md``: headline, warnings, the table and verdicts of each group, and the answers."""
    lines = [f"# {report.study.name}", "", report.headline() + ".", ""]
    lines += [f"**{warning}**\n" for warning in report.warnings()]
    for section in report.sections:
        lines += [section.comparison_table.markdown(), *(f"- {text}" for text in section.sentences()), ""]
        lines += [f"- {reading.sentence()}" for reading in section.weights] + [""]
    if report.answers:
        lines += [f"## Hypotheses ({report.stated})", ""]
        lines += [f"- {answered.hypothesis.statement}: {answered.words()}" for answered in report.answers]
    return "\n".join(lines).rstrip() + "\n"


def marks(name: str, part: str = WHOLE) -> tuple[str, str]:
    """Return the two lines between which a page has a study, or only its table (``part``)."""
    of = f"of {part} bench.report {name} --page writes"
    return f"<!-- begin {of} -->", f"<!-- end {of} -->"


def write_study(path: Path, report: Report) -> None:
    """Write a study between its marks on a page.

    Raises:
        Refused: the page cannot be read or written, or has no such marks.
    """
    write_between(path, lambda text: with_study(text, report))


def with_study(text: str, report: Report) -> str:
    """Return the text of a page with the study, or its table, between their marks.

    Raises:
        Refused: the page has no such marks.
    """
    whole, table = marks(report.study.name), marks(report.study.name, TABLE)
    if table[0] in text:
        text = between(text, table, study_markdown(report, answers=False))
        if whole[0] not in text:
            return text
    return between(text, whole, study_markdown(report))


def study_markdown(report: Report, *, answers: bool = True) -> str:
    """Return headline, warnings, the table of each group and the answers to the hypotheses, in Markdown.

    The table has the time of a step beside the mean coupler only where the two were timed in turn.
    """
    parts = [f"{report.headline()}.", *(f"**{warning}**" for warning in report.warnings())]
    for section in report.sections:
        parts.append(f"{section.comparison.group.basis.words()}.")
        codes = codes_of(section.comparison.group.runs)
        if codes.mixed or codes.silent():
            words = ", ".join(filter(None, (codes.words(), codes.silent())))
            parts.append(f"States of the code: {words}.")
        parts.append(_table(section.comparison))
    if answers and report.answers:
        said = [
            f"- {found.hypothesis.statement}: **{found.kind}**{found.words().removeprefix(found.kind)}"
            for found in report.answers
        ]
        parts += [f"Hypotheses, {report.stated}:", "\n".join(said)]
    return "\n\n".join(parts) + "\n"


def _table(comparison: Comparison) -> str:
    rows = [_cells(row, comparison.reference) for row in comparison.rows]
    rows += [
        [name, "", number(value), "", "", "", "reference line", "", "", ""]
        for name, value in reference_lines(comparison.group)
    ]
    headings = [name.format(comparison.reference.label) for name in COLUMNS]
    kept = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    escaped = [[row[place].replace("|", "\\|") for place in kept] for row in (headings, *rows)]
    return tabulate(escaped[1:], escaped[0], tablefmt="github", disable_numparse=True)


def _cells(row: ComparisonRow, reference: Configuration) -> list[str]:
    loss, against, cost = row.loss, row.against, row.cost
    if loss.mean is None:
        return [row.configuration.label, "0", "", "", "", "", row.configuration.statuses(), "", "", ""]
    judged = ["", "", "reference" if row.configuration is reference else "no common seed"]
    if against is not None:
        judged = [signed(against.paired.mean), p_value(against.p_adjusted), against.verdict.words()]
    head = [row.configuration.label, str(loss.n), with_interval(loss.mean, loss.interval)]
    unknown = share(row.means[UNKNOWN_WORDS].mean or None)
    time = percent(cost.step_time_ratio(), 0) if cost and cost.in_turn else ""
    costs = [time, mebibytes(row.means[PEAK_MEMORY].mean), millions(row.model[PARAMETERS])]
    return [*head, unknown, *judged, *costs]
