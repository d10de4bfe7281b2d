"""What there is: the studies of a results folder, and the runs of a study, as tables of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from bench.analysis.numbers import number, share
from bench.analysis.quantities import perplexity, unknown_words_share
from bench.analysis.study import load_study, statuses
from bench.analysis.terminal import PlainTable
from bench.files import visible
from gnnmoe.config import Refused


def studies_listing(studies: Sequence[Path], results_dir: Path) -> PlainTable:
    """Return a row a study: its runs by status, its couplers, and when its last run began."""
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
        couplers = {found.coupler: None for group in study.groups for found in group.configurations}
        starts = [run.record.time.start for run in study.runs]
        cells = [
            name,
            statuses(study.runs),
            ", ".join(couplers),
            max(starts, default="")[:16].replace("T", " "),
        ]
        table.add_row(*map(escape, cells))
    return table


def runs_listing(path: Path) -> PlainTable:
    """Return a row a run of a study."""
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
    for group in study.groups:
        for found in group.configurations:
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
