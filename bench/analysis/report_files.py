"""A report's files: written whole, and recomputed from the records to verify them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.analysis.page import render_page
from bench.analysis.report import Report, make_plots
from bench.analysis.run_data import ARTICLES, NLL, SPLITS, article_sums
from bench.analysis.study import Run
from bench.measure.quantity import is_measured
from bench.records.store import write_whole

PAGE, OPTIONS, SUMMARY = "report.html", "options.json", "summary.md"
Options = dict[str, Any]
"""What a report was made with: reference, allow_unequal, hypotheses, when stated; and its files' hashes."""


def write_report(report: Report, options: Options, folder: Path, plots: bool = True) -> list[Path]:
    """Write page, summary, tables and plots into ``folder``; what an earlier report left over goes.

    Each file is there whole or not at all, and nothing that no report wrote is touched.

    Raises:
        ValueError: the folder cannot be written, or holds what no report wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; choose another with --out.")
    earlier: dict[str, str] = {}
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / OPTIONS).is_file():
            raise ValueError(f"{folder} holds files that no report wrote; choose another folder with --out.")
        earlier = read_options(folder).get("files", {})
    drawn = {
        name: data for plot in (make_plots(report) if plots else []) for name, data in plot.files().items()
    }
    contents = {name: text.encode() for name, text in text_files(report).items()}
    contents |= {f"plots/{name}": data for name, data in drawn.items()}
    contents[PAGE] = render_page(report, drawn).encode()
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    try:
        _write(folder / OPTIONS, {**options, "files": {**earlier, **files}})  # so that a rest is known
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, data)
        for name in earlier.keys() - files.keys():
            (folder / name).unlink(missing_ok=True)
        _write(folder / OPTIONS, {**options, "files": files})
    except OSError as error:
        why = f"the report cannot be written to {folder} ({error.strerror})"
        raise ValueError(f"{why}; choose another folder with --out.") from error
    return [folder / name for name in files]


def _write(path: Path, options: Options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(options, indent=2) + "\n").encode())


def text_files(report: Report) -> dict[str, str]:
    """Return the contents of the summary and of every table, by path."""
    tables = {f"tables/{name}": text for table in report.tables for name, text in table.files().items()}
    return {**tables, SUMMARY: _summary(report)}


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
    """Return where the written report differs from its records, and records from their own losses.

    Tables, summary, the data of the plots and the page (with the drawings of the folder) are made again and
    compared byte for byte; drawings are compared with the hash that was taken when they were written.
    """
    found = [problem for run in report.study.runs for problem in _problems_of_run(run)]
    expected = {name: text.encode() for name, text in text_files(report).items()}
    drawn = {
        name.removeprefix("plots/"): folder / name for name in options["files"] if name.startswith("plots/")
    }
    if drawn:
        expected |= {f"plots/{plot.name}.csv": plot.data() for plot in make_plots(report)}
    there = {name: path.read_bytes() for name, path in drawn.items() if path.is_file()}
    expected[PAGE] = render_page(report, there).encode()
    for name, sha256 in options["files"].items():
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
        elif name not in expected and hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            found.append(f"{name} is not what the report wrote")
    for name, data in expected.items():
        if (folder / name).is_file() and (written := (folder / name).read_bytes()) != data:
            texts = (part.decode(errors="replace") for part in (data, written))
            found.append(f"{name}: {_first_difference(name, *texts)}")
    return found


def runs_with_losses(report: Report) -> int:
    """Return how many runs kept losses, by token or article, that their records can be checked with."""
    return sum(_has_losses(run) for run in report.study.runs)


def _has_losses(run: Run) -> bool:
    return any((run.folder / name).is_file() for name in (NLL, ARTICLES))


def _problems_of_run(run: Run) -> Iterator[str]:
    """Yield where the losses by token or article that a run kept do not add up to what its record says."""
    quality = run.record["quality"]
    if not is_measured(quality) or not _has_losses(run):
        return
    for split in SPLITS:
        try:
            sums = article_sums(run.folder, split)
        except (ValueError, KeyError, TypeError) as error:
            yield f"run {run.folder.name}: {error}"
            return
        if sums is None or not is_measured(quality.get(split)):
            continue
        said, total, count = quality[split], float(sums[0].sum()), int(sums[1].sum())
        if count != said["tokens"] or abs(total - said["nll_sum"]) > 1e-6 * abs(said["nll_sum"]):
            yield (
                f"run {run.folder.name}: {count:,} losses of {split} add up to {total:.6f}, "
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
