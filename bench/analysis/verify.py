"""A study checked again: its report and its published files, and its records by their own losses."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from bench.analysis.page import render_page
from bench.analysis.report import Report, make_plots
from bench.analysis.report_files import OPTIONS, PAGE, Options, read_options, text_files
from bench.analysis.run_data import ARTICLES, NLL, REDACTED, SPLITS, article_sums
from bench.analysis.study import Run
from bench.measure.quantity import is_measured


def verify(study: Path, folder: Path, make: Callable[[Options | None], Report]) -> tuple[list[str], str]:
    """Return what differs, and in words what was held against what.

    Args:
        study: Folder of the study.
        folder: Of its report. A study that ``--redact`` published need have none: then its files are held
            against the hashes taken when it was published, and its records against their losses.
        make: Makes the report anew, with the options that it was made with.

    Raises:
        ValueError: there is neither a report nor what ``--redact`` wrote, or the options cannot be read.
    """
    hashes = _published(study)
    options = read_options(folder) if not hashes or (folder / OPTIONS).is_file() else None
    report = make(options)
    problems = [problem for run in report.study.runs for problem in _problems_of_run(run)]
    problems += _changed(study, hashes)
    against = []
    if options is not None:
        problems += _problems_of_report(report, options, folder)
        against.append(f"{len(options.get('files', {}))} files of {folder}")
    if hashes:
        against.append(f"{len(hashes):,} published files of {study}")
    losses = sum(_has_losses(run) for run in report.study.runs)
    return problems, (f"{' and '.join(against)}, from {len(report.study.runs):,} records "
                      f"({losses:,} of them against the losses of their tokens)")  # fmt: skip


def _published(study: Path) -> dict[str, str]:
    """Return the hashes of a published study's files by their paths, nothing of another."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return dict(json.loads((study / REDACTED).read_text(encoding="utf-8"))["files"])
    return {}


def _changed(study: Path, hashes: dict[str, str]) -> Iterator[str]:
    for name, sha256 in hashes.items():
        if not (study / name).is_file():
            yield f"{name} is missing"
        elif hashlib.sha256((study / name).read_bytes()).hexdigest() != sha256:
            yield f"{name} is not what was published"


def _problems_of_report(report: Report, options: Options, folder: Path) -> Iterator[str]:
    """Yield where the written report differs from its records.

    Tables, summary, the data of the plots and the page (with the drawings of the folder) are made again and
    compared byte for byte; drawings are compared with the hash that was taken when they were written.
    """
    files = options.get("files", {})
    expected = {name: text.encode() for name, text in text_files(report).items()}
    drawn = {name.removeprefix("plots/"): folder / name for name in files if name.startswith("plots/")}
    if drawn:
        expected |= {f"plots/{plot.name}.csv": plot.data() for plot in make_plots(report)}
    there = {name: path.read_bytes() for name, path in drawn.items() if path.is_file()}
    expected[PAGE] = render_page(report, there).encode()
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif name not in expected and hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            yield f"{name} is not what the report wrote"
    for name, data in expected.items():
        if (folder / name).is_file() and (written := (folder / name).read_bytes()) != data:
            texts = (part.decode(errors="replace") for part in (data, written))
            yield f"{name}: {_first_difference(name, *texts)}"


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
