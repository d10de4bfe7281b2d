"""Reports on a terminal, in at most 80 columns: a report, the list of studies, the list of runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from bench.files import visible
from bench.record import number
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.contents import Report, Section
from bench.report.provenance import code_note
from bench.report.quantities import (
    UNKNOWN_WORDS,
    perplexity,
    share,
    signed,
    unknown_words_share,
    with_interval,
)
from bench.report.tables import any_unknown, code_mark, code_warnings, reference_lines
from bench.study.runs import load_study, statuses
from gnnmoe.config import Refused
from gnnmoe.discovery import short_name

WIDTH = 80
MOST_ROWS, MOST_SENTENCES = 30, 12


class PlainTable(Table):
    """A table without lines, 80 columns wide or as wide as a narrower terminal; long texts are folded."""

    def __init__(self) -> None:
        super().__init__(box=None, padding=(0, 1, 0, 0), show_edge=False, expand=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, with columns of equal width where the terminal is narrow."""
        width = min(WIDTH, options.max_width)
        for column in self.columns:
            column.overflow, column.no_wrap = "fold", False
            if width < WIDTH:
                column.ratio = column.width = None
        yield from super().__rich_console__(console, options.update(width=width))


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
    for reading in section.weights[:MOST_SENTENCES]:
        console.print(_wrapped(f"- {reading.sentence()}", "  ", console), markup=False)


def _table(comparison: Comparison) -> PlainTable:
    table = PlainTable()
    table.add_column("configuration", overflow="fold", ratio=1)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("perplexity [95%]", justify="right", no_wrap=True)
    unknown = any_unknown(comparison)
    if unknown:
        table.add_column("unknown words", justify="right", width=7)
    table.add_column(f"nats to {escape(comparison.reference.label)}", justify="right", max_width=20)
    table.add_column("verdict", overflow="fold", width=14)
    for row in comparison.rows[:MOST_ROWS]:
        label, n, value, *judged = map(escape, _cells(row, comparison))
        table.add_row(label, n, value, *[share(row.means[UNKNOWN_WORDS].mean)] * unknown, *judged)
    for name, value in reference_lines(comparison.group):
        table.add_row(name, "", number(value), *[""] * unknown, "", "reference line", style="dim")
    return table


def _cells(row: ComparisonRow, comparison: Comparison) -> list[str]:
    label, loss, against = row.configuration.label + code_mark(row, comparison), row.loss, row.against
    if loss.mean is None:
        return [label, "0", "", "", row.configuration.statuses()]
    head = [label, str(loss.n), with_interval(loss.mean, loss.interval)]
    if against is None:
        verdict = "reference" if row.configuration is comparison.reference else "no common seed"
        return [*head, "", verdict]
    words = against.verdict.words() if against.verdict.kind != "not resolved" else "not resolved"
    return [*head, signed(against.paired.mean), words]


def _wrapped(text: str, indent: str, console: Console) -> str:
    lines = text.replace(" %", "\u00a0%").split("\n")  # a number and its sign stay on one line
    width = min(WIDTH, console.width)
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent) if line else "" for line in lines)


def studies_listing(studies: Sequence[Path], results_dir: Path) -> PlainTable:
    """Return a row for each study: its runs by status, its couplers, and the start of its last run."""
    table = PlainTable()
    table.add_column("study", overflow="fold", ratio=2)
    table.add_column("runs", overflow="fold", ratio=1)
    table.add_column("couplers", overflow="fold", ratio=2)
    table.add_column("last run", no_wrap=True)
    for path in studies:
        name = visible(path.relative_to(results_dir).as_posix())
        try:
            study = load_study(path)
        except Refused as error:
            table.add_row(escape(name), "", escape(visible(str(error))), "")
            continue
        found = (one.coupler for group in study.groups for one in group.configurations)
        couplers = dict.fromkeys(map(short_name, found))
        last = max((run.record.time.start for run in study.runs), default="")[:16].replace("T", " ")
        table.add_row(*map(escape, (name, statuses(study.runs), ", ".join(couplers), last)))
    return table


def runs_listing(path: Path) -> PlainTable:
    """Return a row for each run of a study."""
    study = load_study(path)
    table = PlainTable()
    table.add_column("run", no_wrap=True)
    table.add_column("configuration", overflow="fold", ratio=1)
    table.add_column("seed", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("perplexity", justify="right", no_wrap=True)
    unknown = any(unknown_words_share(run.record) for run in study.runs)
    if unknown:
        table.add_column("unknown words", justify="right", width=7)
    table.add_column("began", no_wrap=True)
    for found in (found for group in study.groups for found in group.configurations):
        for run in found.runs:
            record = run.record
            name = f"{found.label} ({record.run_name})" if record.run_name else found.label
            start = record.time.start[5:16].replace("T", " ")
            figures = [number(perplexity(record)), *[share(unknown_words_share(record))] * unknown]
            cells = [record.run_id, name, str(run.seed), run.status, *figures, start]
            table.add_row(*map(escape, cells))
    for status, folders in (("unreadable", study.unreadable), ("not counted", study.misplaced)):
        for folder, why in folders:
            table.add_row(escape(visible(folder.name)), escape(why), "", status)
    return table
