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

from bench.files import between, visible, write_between, write_whole
from bench.record import exp_or_infinity, number
from bench.report.comparison import (
    Answered,
    Comparison,
    ComparisonRow,
    CostOverMean,
    Difference,
    answer_hypotheses,
    compare,
)
from bench.report.experts import ExpertsReading, read_experts
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
    other_models,
    pairs_table,
    runs_table,
)
from bench.report.weights import WeightsReading, matching_table, read_weights
from bench.study.hypotheses import Hypothesis, seeds_needed, stated
from bench.study.run_files import set_aside
from bench.study.runs import Configuration, Study, doubled_words, load_study, statuses, text_warnings
from gnnmoe.config import Refused, brief, unknown_name

COLUMNS = (
    "configuration|n|perplexity [95%]|unknown words|difference from {}|p|verdict|time per step, mean = 0%"
    "|peak memory|parameters"
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
    experts: ExpertsReading | None
    experts_table: Table | None
    matching_table: Table | None
    """The experts matched over seeds; None where no two runs of a configuration kept their features."""

    @property
    def file(self) -> str:
        """The file with all figures of the comparison, in the folder of the report."""
        return f"tables/{self.comparison_table.name}.csv"

    def answer(self) -> str:
        """Return whether a configuration is better than the baseline."""
        return answer(self.comparison)

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
    columns: tuple[str, ...] = ()
    """The columns of the LaTeX tables; empty: six that fit the width of a paper."""

    @property
    def tables(self) -> list[Table]:
        """All tables: those of each section, then those of the study."""
        own = [
            (section.comparison_table, section.pairs_table, section.experts_table, section.matching_table)
            for section in self.sections
        ]
        of_sections = [table for some in own for table in some if table is not None]
        return [*of_sections, self.runs_table, self.failures_table]

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
                f"The runs are in {len(self.sections)} tables: their corpus, device, evaluation, batch or "
                "length differ. --allow-unequal joins runs whose evaluation, batch or length differ."
            )
        if self.study.unreadable:
            files = counted(len(self.study.unreadable), "file")
            found.append(f"{files} of runs cannot be read; the table of failures names them.")
        found += [
            f"Folder {visible(folder.name)} is not counted: {why}." for folder, why in self.study.misplaced
        ]
        failed = Counter(run.status for run in self.study.runs if not run.counts)
        if failed:
            listed = ", ".join(f"{count} {status}" for status, count in failed.items())
            found.append(f"Failed runs, which do not count: {listed}.")
        return found


def make_report(
    study: Study,
    reference: str | None = None,
    hypotheses: Sequence[Hypothesis] = (),
    stated_at: str | None = None,
    columns: Sequence[str] = (),
) -> Report:
    """Compare every group of a study, answer its hypotheses and make its tables.

    ``reference`` is the label of the baseline configuration, for the groups that have it. ``stated_at`` is
    the UTC time at which the hypotheses were written down. ``columns`` are those of the LaTeX tables.

    Raises:
        Refused: no configuration has the label ``reference``, or no table has one of the ``columns``.
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
        experts, weights = read_experts(comparison), read_weights(comparison)
        of_experts = experts and experts.table(suffix)
        matching = matching_table(comparison, weights, suffix)
        sections.append(Section(suffix, comparison, *tables, weights, experts, of_experts, matching))
    readable = [replace(found, statement=visible(found.statement)) for found in hypotheses]
    answers = answer_hypotheses(readable, study.groups)
    when = _when(study, stated_at) if hypotheses else None
    made = Report(
        study, sections, answers, when, runs_table(study.groups), failures_table(study), tuple(columns)
    )
    known = dict.fromkeys(title for table in made.tables for title in table.shown.columns)
    for title in columns:
        if title not in known:
            raise Refused(unknown_name("column", title, known))
    return made


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
        raise Refused(
            f"an image ends in .png or .svg, not in {brief(path.suffix or path.name)}: --image {path}"
        )
    drawing = main_plot(report).drawing(ending)
    try:
        write_whole(path, drawing)
    except OSError as error:
        raise Refused(f"--image {path} cannot be written ({error.strerror}).") from error


def _when(study: Study, time: str | None) -> str:
    """Return in words when the hypotheses were stated, and whether that was before the runs."""
    if time is None:
        return "given to the report, not kept by the sweep: nothing shows that they are older than the runs"
    starts = [run.record.time.start for run in study.runs]
    starts += [run.get("start") for run in set_aside(study.path)]
    earlier = sum(start is None or start < time for start in starts)
    order = (
        "before the first run"
        if not earlier
        else (f"when {earlier:,} of {counted(len(starts), 'run')} had, or may have, started")
    )
    others = sorted(visible(path.name) for path in study.path.glob("hypotheses.*.json"))
    return f"stated {visible(time)}, {order}" + (f"; others before: {', '.join(others)}" if others else "")


def answer(comparison: Comparison) -> str:
    """Return whether a configuration is better than the baseline, and how many are worse."""
    name = comparison.reference.label
    found = [row.against for row in comparison.rows if row.against is not None]
    if not found:
        return f"Nothing is compared: no configuration shares a seed that counts with {name}."
    if few := _too_few(comparison):
        return few
    better = [one for one in found if one.verdict.kind == "better"]
    best, rivals = comparison.best(), counted(len(found), "other configuration")
    if best is comparison.reference:
        return f"{name} is better than {'the' if len(found) == 1 else 'each of the'} {rivals}."
    if not better:
        rest = _counts(found)
        head = f"No configuration is better than {name}"
        return f"{head}: of {counted(len(found), 'configuration')}, {rest}."
    first = better[0]
    than = name if best is None or len(found) == 1 else f"every other configuration, and than {name}"
    head = f"{first.candidate.label} is better than {than}: {_evidence(first)}."
    if len(better) > 1:
        head += (
            f" {counted(len(better) - 1, 'more configuration')} {_are(len(better) - 1)} better than {name}."
        )
    others = [one for one in found if one.verdict.kind != "better"]
    return head + (f" Of the others, {_counts(others)}." if others else "")


def _counts(found: Sequence[Difference]) -> str:
    """Return how many differences have which verdict: "9 are worse and 2 are not resolved"."""
    kinds = Counter(one.verdict.kind for one in found)
    parts = [f"{count} {_are(count)} {kind}" for kind, count in kinds.most_common()]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def explanations(comparison: Comparison) -> list[str]:
    """Return how to read the verdicts of this table, where a reader may stumble over them."""
    found = [row.against for row in comparison.rows if row.against is not None]
    if not found or _too_few(comparison):
        return []
    count, texts = comparison.comparisons, []
    lowest = min(found, key=lambda one: one.p_adjusted)
    floor = count * 2 / 2**lowest.paired.n
    if count > 1 and lowest.p_adjusted <= floor * (1 + 1e-9):
        of = f"{count} comparisons × 2/2^{lowest.paired.n}, {lowest.paired.n} seeds"
        texts.append(f"p = {p_value(floor)} is the smallest possible p here ({of}).")
    unresolved = [one for one in found if one.verdict.kind == "not resolved"]
    if any(one.paired.interval and one.paired.interval[0] * one.paired.interval[1] > 0 for one in unresolved):
        texts.append(
            "An interval without 0 is not enough for a verdict: p after Holm's correction must be ≤ 0.05."
        )
    if count > 1 and any(one.verdict.seeds for one in unresolved):
        texts.append(
            f"The needed seeds are for {count} comparisons; compare tests a single pair and needs fewer."
        )
    return texts


def verdict_sentences(comparison: Comparison) -> list[str]:
    """Return sentences on every configuration beside the baseline, and on those that are not compared."""
    sentences = [*_no_best(comparison)]
    sentences += [_sentence(row, comparison) for row in comparison.rows if row.against is not None]
    alone = [
        row.configuration
        for row in comparison.rows
        if row.against is None and row.configuration is not comparison.reference
    ]
    doubled = [row.configuration for row in comparison.rows if row.configuration.doubled]
    for why, some in (
        ("a seed of it has several runs", doubled),
        ("no common seed counts", [one for one in alone if one not in doubled]),
    ):
        if some:
            names = ", ".join(one.label for one in some)
            sentences.append(f"Not compared with {comparison.reference.label}, because {why}: {names}.")
    return sentences


def _no_best(comparison: Comparison) -> list[str]:
    """Return why no configuration can be better than all others, if there are too few seeds for it."""
    seeds = [pair.paired.n for pair in comparison.pairs]
    among = len(comparison.pairs) - comparison.comparisons
    if not among or _too_few(comparison) or max(seeds) >= seeds_needed(among):
        return []
    return [
        f"{counted(max(seeds), 'seed')} are enough to compare each configuration with "
        f"{comparison.reference.label}, but not with each other "
        f"({seeds_needed(among)} seeds are needed for {counted(among, 'comparison')})."
    ]


def _sentence(row: ComparisonRow, comparison: Comparison) -> str:
    """Return the verdict on a configuration with its evidence, and its cost."""
    against = row.against
    assert against is not None, "the caller has checked it"
    name = comparison.reference.label
    head = {
        "better": f"better than {name}",
        "worse": f"worse than {name}",
        "equivalent": f"equivalent to {name} (within ±0.01 nats)",
    }.get(against.verdict.kind, f"no significant difference from {name}")
    if against.verdict.below_minimum:
        head += ", by less than the minimum effect of 0.01 nats"
    nats = f"{signed(against.paired.mean)} nats; {counted(against.paired.n, 'paired seed')}"
    text = f"{row.configuration.label}: {head}. {_evidence(against).capitalize()}; {nats}"
    text += f", p {p_value(against.p_adjusted)}."
    if against.verdict.kind == "not resolved":
        text += f" {against.verdict.words().capitalize()}."
    noise = against.articles
    if noise and against.verdict.kind in ("better", "worse") and noise[0] <= 0 <= noise[1]:
        text += f" On other articles the difference might vanish: 95% interval {span(noise, 4, sign=True)}."
    return f"{text}{_cost(row.cost)}"


def _evidence(against: Difference) -> str:
    """Return the difference of perplexity with its interval."""
    ends = perplexities(against.paired.interval)
    about = f" (95% interval {percent(ends[0], 2)} to {percent(ends[1], 2)})" if ends else ""
    return f"perplexity {percent(exp_or_infinity(against.paired.mean), 2)}{about}"


def _cost(cost: CostOverMean | None) -> str:
    """Return the cost of a configuration relative to the mean coupler."""
    if cost is None:
        return ""
    parts = []
    time, ends = cost.step_time_ratio(), cost.step_time_interval()
    if time is not None:
        about = f" ({percent(ends[0], 0)} to {percent(ends[1], 0)})" if ends else ""
        parts.append(f"{percent(time, 0)} time per step{about}")
    if cost.memory_bytes is not None:
        parts.append(f"{mebibytes(cost.memory_bytes, sign=True)} memory")
    if cost.parameters is not None:
        parts.append(f"{signed(cost.parameters, 0)} parameters")
    if cost.flops_per_token is not None:
        parts.append(f"{signed(cost.flops_per_token / 1e6, 2)} MFLOPs per token")
    how = "timed alternately" if cost.in_turn else "timed in separate runs"
    return f" Cost relative to {cost.over}, {how}: {', '.join(parts)}." if parts else ""


def _too_few(comparison: Comparison) -> str:
    """Return a sentence if there are too few seeds for any verdict."""
    count = comparison.comparisons
    seeds = [row.against.paired.n for row in comparison.rows if row.against is not None]
    if not seeds or max(seeds) >= seeds_needed(count):
        return ""
    verb, need = "needs" if count == 1 else "need", seeds_needed(count)
    return (
        f"{counted(max(seeds), 'seed')} cannot show a significant difference: "
        f"{counted(count, 'comparison')} at p ≤ 0.05 {verb} at least {need} seeds."
    )


def summary_markdown(report: Report) -> str:
    """Return ``summary.md``: headline, warnings, the table and verdicts of each group, and the answers."""
    lines = [f"# {report.study.name}", "", report.headline() + ".", ""]
    lines += [f"**{warning}**\n" for warning in report.warnings()]
    for section in report.sections:
        lines += [section.answer(), "", section.comparison_table.markdown()]
        lines += [f"- {text}" for text in (*explanations(section.comparison), *section.sentences())] + [""]
        lines += [f"- {reading.sentence()}" for reading in section.weights] + [""]
    for section in report.sections:
        if section.experts and section.experts_table:
            lines += [f"## What the experts learned{section.suffix.replace('_', ', table ')}", ""]
            lines += [section.experts_table.markdown()]
            lines += [f"- {text}" for text in section.experts.sentences()] + [""]
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

    The table has the time of a step relative to the mean coupler only where both were timed alternately.
    """
    parts = [f"{report.headline()}.", *(f"**{warning}**" for warning in report.warnings())]
    for section in report.sections:
        parts.append(f"{section.comparison.group.basis.words()}.")
        codes = codes_of(section.comparison.group.runs)
        if codes.mixed or codes.silent():
            words = ", ".join(filter(None, (codes.words(), codes.silent())))
            parts.append(f"Versions of the code: {words}.")
        parts.append(_table(section.comparison))
        if answers and section.experts:
            said = "\n".join(f"- {text}" for text in section.experts.sentences())
            parts.append(f"What the experts learned:\n\n{said}")
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
        [name, "", number(value), "", "", "", kind, "", "", ""]
        for name, kind, value in other_models(comparison.group)
    ]
    headings = [name.format(comparison.reference.label) for name in COLUMNS]
    kept = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    escaped = [[row[place].replace("|", "\\|") for place in kept] for row in (headings, *rows)]
    return tabulate(escaped[1:], escaped[0], tablefmt="github", disable_numparse=True)


def _cells(row: ComparisonRow, reference: Configuration) -> list[str]:
    loss, against, cost = row.loss, row.against, row.cost
    if loss.mean is None:
        return [row.configuration.label, "0", "", "", "", "", row.configuration.statuses(), "", "", ""]
    judged = ["", "", "baseline" if row.configuration is reference else "no common seed"]
    if against is not None:
        judged = [
            percent(exp_or_infinity(against.paired.mean), 2),
            p_value(against.p_adjusted),
            against.verdict.words(),
        ]
    head = [row.configuration.label, str(loss.n), with_interval(loss.mean, loss.interval)]
    unknown = share(row.means[UNKNOWN_WORDS].mean or None)
    time = percent(cost.step_time_ratio(), 0) if cost and cost.in_turn else ""
    costs = [time, mebibytes(row.means[PEAK_MEMORY].mean), millions(row.model[PARAMETERS])]
    return [*head, unknown, *judged, *costs]
