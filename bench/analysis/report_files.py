"""A report's files: written whole, and recomputed from the records to verify them."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.analysis.page import figures_of_page, render_page
from bench.analysis.report import Report, make_plots
from bench.analysis.study import Run
from bench.measure.quantity import is_measured
from bench.records.store import cannot_write

PAGE, OPTIONS, SUMMARY = "report.html", "options.json", "summary.md"
Options = dict[str, Any]
"""What a report was made with: reference, allow_unequal, hypotheses and when they were stated."""


def write_report(report: Report, options: Options, folder: Path, plots: bool = True) -> list[Path]:
    """Write page, summary, tables and plots into ``folder``, in the place of an earlier report.

    Everything is complete in a temporary folder beside it before the earlier one goes.

    Raises:
        ValueError: the folder cannot be written, or holds what no report wrote.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / OPTIONS).is_file():
        raise ValueError(f"{folder} holds files that no report wrote; choose another folder with --out.")
    drawn = {
        name: data for plot in (make_plots(report) if plots else []) for name, data in plot.files().items()
    }
    files = {**text_files(report, options), PAGE: render_page(report, drawn)}
    contents = {name: text.encode() for name, text in files.items()}
    contents |= {f"plots/{name}": data for name, data in drawn.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            made = Path(temporary) / "made"
            for name, data in contents.items():
                path = made / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            earlier = Path(temporary) / "earlier"
            if folder.exists():
                folder.rename(earlier)
            made.rename(folder)
            for path in earlier.glob("*"):  # what others put there stays
                if path.name not in ("tables", "plots") and not (folder / path.name).exists():
                    path.rename(folder / path.name)
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error
    return [folder / name for name in contents]


def text_files(report: Report, options: Options) -> dict[str, str]:
    """Return the contents of the summary, the options and every table, by path."""
    tables = {f"tables/{name}": text for table in report.tables for name, text in table.files().items()}
    return {**tables, SUMMARY: _summary(report), OPTIONS: json.dumps(options, indent=2) + "\n"}


def read_options(folder: Path) -> Options:
    """Return what the report in ``folder`` was made with.

    Raises:
        ValueError: there is no report, or its options cannot be read.
    """
    try:
        return json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no report; make one first, without --verify.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / OPTIONS} cannot be read: {error}.") from error


def problems_of(report: Report, options: Options, folder: Path) -> list[str]:
    """Return where the written report differs from its records, and records from their own losses."""
    found = [problem for run in report.study.runs for problem in _problems_of_run(run)]
    for name, expected in text_files(report, options).items():
        path = folder / name
        written = path.read_text(encoding="utf-8") if path.is_file() else None
        if written is None:
            found.append(f"{name} is missing")
        elif written != expected:
            found.append(f"{name}: {_first_difference(name, expected, written)}")
    page = folder / PAGE
    if not page.is_file():
        return [*found, f"{PAGE} is missing"]
    expected = figures_of_page(render_page(report, {}))
    try:
        written = figures_of_page(page.read_text(encoding="utf-8"))
    except ValueError as error:
        return [*found, f"{PAGE}: {error}"]
    return found if written == expected else [*found, f"{PAGE}: its figures are not those of the records"]


def _problems_of_run(run: Run) -> Iterator[str]:
    """Yield where the losses by token that a run kept do not add up to what its record says."""
    quality, path = run.record["quality"], run.folder / "nll.npz"
    if not is_measured(quality) or not path.is_file():
        return
    with np.load(path) as arrays:
        for split in ("validation", "test"):
            if not is_measured(quality.get(split)) or f"{split}_nll" not in arrays:
                continue
            nll, said = arrays[f"{split}_nll"], quality[split]
            total = float(nll.sum(dtype=np.float64))
            if len(nll) != said["tokens"] or abs(total - said["nll_sum"]) > 1e-6 * abs(said["nll_sum"]):
                yield (
                    f"run {run.folder.name}: {len(nll):,} losses of {split} add up to {total:.6f}, "
                    f"its record says {said['nll_sum']:.6f} on {said['tokens']:,}"
                )


def _first_difference(name: str, expected: str, written: str) -> str:
    if name.endswith(".csv"):
        ours, theirs = (list(csv.DictReader(io.StringIO(text))) for text in (expected, written))
        for number, (right, wrong) in enumerate(zip(ours, theirs, strict=False), 1):
            for column, value in right.items():
                if wrong.get(column) != value:
                    return f"row {number}, {column}: {wrong.get(column)!r}, by the records {value!r}"
        return f"{len(theirs)} rows, by the records {len(ours)}"
    lines = zip(expected.splitlines(), written.splitlines(), strict=False)
    number = next((n for n, (right, wrong) in enumerate(lines, 1) if right != wrong), None)
    return (
        "another length than by the records" if number is None else f"line {number} differs from the records"
    )


def _summary(report: Report) -> str:
    lines = [f"# {report.study.name}", "", report.headline() + ".", ""]
    lines += [f"**{warning}**\n" for warning in report.warnings()]
    for section in report.sections:
        lines += [section.comparison_table.markdown(), *(f"- {text}" for text in section.sentences()), ""]
        lines += [f"- {reading.sentence()}" for reading in section.weights] + [""]
    if report.answers:
        lines += [f"## Hypotheses ({report.stated})", ""]
        lines += [f"- {answered.hypothesis.statement}: {answered.words()}" for answered in report.answers]
    return "\n".join(lines).rstrip() + "\n"
