"""The table and the answers of a study on a page for people, written between two marks."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from bench.analysis.comparison import ComparisonRow
from bench.analysis.comparison_tables import reference_lines
from bench.analysis.numbers import (
    mebibytes,
    millions,
    number,
    p_value,
    percent,
    perplexities,
    share,
    signed,
    span,
)
from bench.analysis.over_seeds import unknown_words
from bench.analysis.provenance import codes_of
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.report import Report, Section
from bench.files import between, write_between

COLUMNS = ["configuration", "n", "perplexity [95 %]", "unknown words", "nats to {}", "p", "verdict",
           "time a step over mean", "peak memory", "parameters"]  # fmt: skip


WHOLE, TABLE = "what", "the table that"
"""The two things that a page may have of a study, in the words of its marks: all of it, or no answers."""


def marks(name: str, part: str = WHOLE) -> tuple[str, str]:
    """Return the two lines between which a page has a study, or only its table (``part``)."""
    of = f"of {part} bench.report {name} --page writes"
    return f"<!-- begin {of} -->", f"<!-- end {of} -->"


def write_study(path: Path, report: Report) -> None:
    """Put a study between its marks on a page.

    Raises:
        Refused: the page cannot be read or written, or has no such marks.
    """
    write_between(path, lambda text: with_study(text, report))


def with_study(text: str, report: Report) -> str:
    """Return a page's text with the study between its marks, and its table alone between those for that.

    Raises:
        Refused: it has no such marks.
    """
    whole, table = marks(report.study.name), marks(report.study.name, TABLE)
    if table[0] in text:
        text = between(text, table, study_markdown(report, answers=False))
        if whole[0] not in text:
            return text
    return between(text, whole, study_markdown(report))


def study_markdown(report: Report, *, answers: bool = True) -> str:
    """Return headline, warnings, the table of each group and the answers to the hypotheses, in Markdown.

    Time is that of a step beside the same model with the mean coupler, where the two were timed in turn.
    """
    parts = [f"{report.headline()}.", *(f"**{warning}**" for warning in report.warnings())]
    for section in report.sections:
        parts.append(f"{section.comparison.group.basis.words()}.")
        codes = codes_of(section.comparison.group.runs)
        if codes.mixed or codes.silent():
            words = ", ".join(filter(None, (codes.words(), codes.silent())))
            parts.append(f"States of the code: {words}.")
        parts.append(_table(section))
    if answers and report.answers:
        said = [f"- {found.hypothesis.statement}: **{found.kind}**{found.words().removeprefix(found.kind)}"
                for found in report.answers]  # fmt: skip
        parts += [f"Hypotheses, {report.stated}:", "\n".join(said)]
    return "\n\n".join(parts) + "\n"


def _table(section: Section) -> str:
    comparison = section.comparison
    rows = [_cells(row) for row in comparison.rows]
    rows += [[name, "", number(value), "", "", "", "reference line", "", "", ""]
             for name, value in reference_lines(comparison.group)]  # fmt: skip
    headings = [name.format(comparison.reference.label) for name in COLUMNS]
    kept = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    escaped = [[row[place].replace("|", "\\|") for place in kept] for row in (headings, *rows)]
    return tabulate(escaped[1:], escaped[0], tablefmt="github", disable_numparse=True)


def _cells(row: ComparisonRow) -> list[str]:
    loss, against, cost = row.loss, row.against, row.cost
    if loss.mean is None:
        return [row.configuration.label, "0", "", "", "", "", row.configuration.statuses(), "", "", ""]
    value = f"{number(exp_or_infinity(loss.mean))} {span(perplexities(loss.interval))}".strip()
    judged = ["", "", "reference"] if against is None else [
        signed(against.paired.mean), p_value(against.p_adjusted), against.verdict.words()]  # fmt: skip
    unknown = share(unknown_words(row.configuration) or None)
    return [row.configuration.label, str(loss.n), value, unknown, *judged,
            percent(cost.step_time_ratio(), 0) if cost and cost.in_turn else "",
            mebibytes(row.peak_memory_bytes.mean), millions(row.parameters)]  # fmt: skip
