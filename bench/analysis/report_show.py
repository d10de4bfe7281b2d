"""A report on the terminal, in at most 80 columns."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.markup import escape

from bench.analysis.comparison import Comparison, ComparisonRow
from bench.analysis.comparison_tables import any_unknown, code_mark, code_warnings, reference_lines
from bench.analysis.numbers import number, perplexities, share, signed, span
from bench.analysis.over_seeds import unknown_words
from bench.analysis.provenance import code_note
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.report import Report, Section
from bench.analysis.terminal import WIDTH, PlainTable

MOST_ROWS, MOST_SENTENCES = 30, 12


def print_report(report: Report, console: Console) -> None:
    """Print headline, warnings, each section's table, verdicts and weights, the answers, and the code."""
    console.print(f"[bold]{escape(report.study.name)}[/]: {escape(report.headline())}")
    for warning in report.warnings():
        console.print(_wrapped(f"! {warning}", "  ", console), style="bold yellow", markup=False)
    for section in report.sections:
        _print_section(section, console)
    if report.answers:
        console.print(_wrapped(f"\nhypotheses ({report.stated})", "", console), style="bold", markup=False)
        for answered in report.answers:
            text = f"- {answered.hypothesis.statement}: {answered.words()}"
            console.print(_wrapped(text, "  ", console), markup=False)
    console.print(_wrapped(f"\n{code_note(report.study.runs)}\n", "  ", console), markup=False, style="dim")


def _print_section(section: Section, console: Console) -> None:
    comparison = section.comparison
    console.print()
    console.print(_wrapped(comparison.group.basis.words(), "", console), markup=False, style="dim")
    console.print(_table(comparison))
    if len(comparison.rows) > MOST_ROWS:
        console.print(f"… and {len(comparison.rows) - MOST_ROWS:,} more, in the tables")
    for warning in code_warnings(comparison):
        console.print(_wrapped(warning, "  ", console), style="bold yellow", markup=False)
    sentences = section.sentences()
    for sentence in sentences[:MOST_SENTENCES]:
        console.print(_wrapped(f"- {sentence}", "  ", console), markup=False)
    if len(sentences) > MOST_SENTENCES:
        console.print(f"… and {len(sentences) - MOST_SENTENCES:,} more, on the page")
    readings = [reading.sentence() for reading in section.weights]
    for sentence in readings[:MOST_SENTENCES]:
        console.print(_wrapped(f"- {sentence}", "  ", console), markup=False)


def _table(comparison: Comparison) -> PlainTable:
    table = PlainTable()
    table.add_column("configuration", overflow="fold", ratio=1)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("perplexity [95 %]", justify="right", no_wrap=True)
    unknown = any_unknown(comparison)
    if unknown:
        table.add_column("unknown words", justify="right", width=7)
    table.add_column(f"nats to {escape(comparison.reference.label)}", justify="right", max_width=20)
    table.add_column("verdict", overflow="fold", width=14)
    for row in comparison.rows[:MOST_ROWS]:
        label, n, value, *judged = map(escape, _cells(row, comparison))
        table.add_row(label, n, value, *[share(unknown_words(row.configuration))] * unknown, *judged)
    for name, value in reference_lines(comparison.group):
        table.add_row(name, "", number(value), *[""] * unknown, "", "reference line", style="dim")
    return table


def _cells(row: ComparisonRow, comparison: Comparison) -> list[str]:
    label, loss, against = row.configuration.label + code_mark(row, comparison), row.loss, row.against
    if loss.mean is None:
        return [label, "0", "", "", row.configuration.statuses()]
    value = f"{number(exp_or_infinity(loss.mean))} {span(perplexities(loss.interval))}".strip()
    if against is None:
        verdict = "reference" if row.configuration is comparison.reference else "no common seed"
        return [label, str(loss.n), value, "", verdict]
    words = against.verdict.words() if against.verdict.kind != "not resolved" else "not resolved"
    return [label, str(loss.n), value, signed(against.paired.mean), words]


def _wrapped(text: str, indent: str, console: Console) -> str:
    lines = text.replace(" %", "\u00a0%").split("\n")  # a number and its sign stay on one line
    width = min(WIDTH, console.width)
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent) if line else "" for line in lines)
