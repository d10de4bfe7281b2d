"""Reports on a terminal, in at most 80 columns: a report, the list of studies, the list of runs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.files import visible
from bench.record import exp_or_infinity, number
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.contents import Report, Section, explanations
from bench.report.provenance import code_note
from bench.report.quantities import (
    UNKNOWN_WORDS,
    counted,
    p_value,
    percent,
    perplexity,
    share,
    unknown_words_share,
    with_interval,
)
from bench.report.tables import any_unknown, code_mark, code_warnings, other_models
from bench.study.runs import load_study, statuses
from gnnmoe.config import Refused
from gnnmoe.discovery import short_name

WIDTH = 80
MOST_LINES = 40
"""The most lines of a report."""
MOST_WARNINGS = 8
"""The most lines of its warnings."""
MOST_TABLES = 2
MEASURE = Console(file=io.StringIO(), width=WIDTH, highlight=False)
"""A console of 80 columns, on which lines are counted."""


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


def print_report(report: Report, console: Console, places: Sequence[str] = ()) -> None:
    """Print answer and table of each comparison, and where the rest is, in ``MOST_LINES`` of 80 columns.

    The best configurations are printed first; of the hypotheses, the number of each answer if not all fit.
    ``places`` are the lines that say where the files of the report are; they may be longer than 80 columns.
    """
    headline = Text(f"{report.study.name}: {report.headline()}")
    headline.stylize("bold", 0, len(report.study.name))
    warnings = _fitting([Text(f"! {warning}", "bold yellow") for warning in report.warnings()], MOST_WARNINGS)
    code = Text(code_note(report.study.runs), "dim")
    shown = report.sections[:MOST_TABLES]
    left_out = len(report.sections) - len(shown)
    end = [Text(f"{counted(left_out, 'more table')}: see the page")] if left_out else []
    end += [found for found in (_weights(shown), _experts(shown), _answers(report)) if found] + [code]
    left = MOST_LINES - _lines([headline, *warnings, *end]) - len(places) - 1
    sections = [_section(section, left // len(shown)) for section in shown]
    full = [Text(f"- {found.hypothesis.statement}: {found.words()}") for found in report.answers]
    if full and _lines(full) <= left - sum(map(_lines, sections)):
        end[-1:] = [*full, code]
    for part in (headline, *warnings, *(part for section in sections for part in section), *end):
        console.print(part, width=min(WIDTH, console.width))
    if places:
        console.print()
    for place in places:
        console.print(visible(place), markup=False, soft_wrap=True)


def _lines(parts: Sequence[RenderableType]) -> int:
    """Return the number of lines that some parts take in 80 columns."""
    return sum(len(MEASURE.render_lines(part)) for part in parts)


def _fitting(parts: list[Text], most: int) -> list[Text]:
    """Return as many of the parts as fit in ``most`` lines, at least one, and how many are left out."""
    kept = next((n for n in range(len(parts), 0, -1) if _lines(parts[:n]) <= most), 1)
    rest = len(parts) - kept
    return parts[:kept] + [Text(f"… and {rest:,} more, see the page")] * (rest > 0)


def _section(section: Section, most: int) -> list[RenderableType]:
    """Return setting, answer, table and explanations of a comparison in at most ``most`` lines."""
    comparison = section.comparison
    above = [Text(), Text(comparison.group.basis.words(), "dim"), Text(section.answer(), "bold")]
    below = [Text(text, "bold yellow") for text in code_warnings(comparison)]
    below += [Text(f"- {text}") for text in explanations(comparison) if "needed seeds" not in text]
    rows = len(comparison.rows)
    left = most - _lines([*above, *below])
    if _lines([_table(comparison, rows)]) <= left:
        return [*above, _table(comparison, rows), *below]
    fits = (n for n in range(min(rows - 1, left), 1, -1) if _lines([_table(comparison, n)]) < left)
    kept = next(fits, 1)
    cut = Text(f"… and {counted(rows - kept, 'more configuration')}, see the page or {section.file}")
    return [*above, _table(comparison, kept), cut, *below]


def _weights(sections: Sequence[Section]) -> Text | None:
    found = [reading.agreement for section in sections for reading in section.weights if reading.agreement]
    if not found:
        return None
    matched = [one.matched_agreement for section in sections for one in section.weights]
    agree, on_matched = (sum(one.reproducible for one in some if one) for some in (found, matched))
    beside = f"; on matched experts in {on_matched}" if any(matched) else ""
    return Text(f"hyperedge weights: the seeds agree in {agree} of {counted(len(found), 'layer')}{beside}")


def _experts(sections: Sequence[Section]) -> Text | None:
    found = [section.experts.line() for section in sections if section.experts]
    others = f"; {counted(len(found) - 1, 'other table')} on the page" if len(found) > 1 else ""
    return Text(found[0] + others) if found else None


def _answers(report: Report) -> Text | None:
    if not report.answers:
        return None
    kinds = Counter(found.kind for found in report.answers)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    when = (report.stated or "").partition(", ")[2]
    return Text(f"hypotheses: {listed} ({when})")


def _table(comparison: Comparison, most: int) -> PlainTable:
    """Return a row for each of the first ``most`` configurations, and for the n-gram baselines."""
    table = PlainTable()
    table.add_column("configuration", overflow="fold", ratio=1)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("perplexity [95%]", justify="right", no_wrap=True)
    unknown = any_unknown(comparison)
    if unknown:
        table.add_column("unknown words", justify="right", width=7)
    baseline = comparison.reference.label
    table.add_column(f"vs {escape(baseline) if len(baseline) < 10 else 'baseline'}", justify="right")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", width=15)
    for row in comparison.rows[:most]:
        label, n, value, *judged = map(escape, _cells(row, comparison))
        table.add_row(label, n, value, *[share(row.means[UNKNOWN_WORDS].mean)] * unknown, *judged)
    for name, kind, value in other_models(comparison.group):
        table.add_row(name, "", number(value), *[""] * unknown, "", "", kind, style="dim")
    return table


def _cells(row: ComparisonRow, comparison: Comparison) -> list[str]:
    label, loss, against = row.configuration.label + code_mark(row, comparison), row.loss, row.against
    if loss.mean is None:
        return [label, "0", "", "", "", row.configuration.statuses()]
    head = [label, str(loss.n), with_interval(loss.mean, loss.interval)]
    if against is None:
        return [*head, "", "", "baseline" if row.configuration is comparison.reference else "no common seed"]
    change = percent(exp_or_infinity(against.paired.mean), 2)
    return [*head, change, p_value(against.p_adjusted), against.verdict.kind]


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
