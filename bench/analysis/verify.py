"""A study checked again: its report and its published files, and its records by their own losses."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.analysis.numbers import counted
from bench.analysis.page import render_page
from bench.analysis.report import Report, make_plots
from bench.analysis.report_files import OPTIONS, PAGE, ReportOptions, read_options, text_files
from bench.study.run_files import ARTICLES, NLL, SPLITS, article_sums, publication
from bench.study.runs import Run
from gnnmoe.config import Refused


def verify(
    study: Path, folder: Path, make: Callable[[ReportOptions | None], Report]
) -> tuple[list[str], str]:
    """Return what differs, and in words what was held against what.

    Args:
        study: Folder of the study.
        folder: Of its report. A study that ``--publish`` published need have none: then its files are held
            against the hashes taken when it was published, and its records against the sums by article.
        make: Makes the report anew, with the options that it was made with.

    Raises:
        Refused: there is neither a report nor what ``--publish`` wrote, or the options cannot be read.
    """
    published = publication(study)
    hashes: dict[str, str] = {} if published is None else published["files"]
    options = read_options(folder) if published is None or (folder / OPTIONS).is_file() else None
    report = make(options)
    changed = dict(_changed(study, hashes))
    runs = {run.folder: run for run in report.study.runs}
    problems = [*changed.values()]
    problems += [f"{place.name}: {why}" for place, why in report.study.unreadable if place not in runs]
    ways = Counter[str]()
    for run in runs.values():
        found = list(_unlike_losses(run, hashes))
        problems += [f"run {run.folder.name}: {problem}" for problem in found]
        own = f"{run.folder.name}/record.json"
        ways[FAILED if found or own in changed else _way(run)] += 1
    against = []
    if options is not None:
        problems += _problems_of_report(report, options, folder)
        against.append(f"{len(options['files']):,} files of {folder}")
    if published is not None:
        against.append(f"{len(hashes):,} published files of {study}")
    return problems, f"{' and '.join(against)}; of {counted(len(runs), 'record')}, {_words(ways)}"


LOSSES, SUMS, HASH, NOTHING, FAILED = "losses", "sums", "hash", "nothing", "failed"
"""How a record was verified: by the losses of its tokens, by hash and sums by article, by hash alone."""


def _words(ways: Counter[str]) -> str:
    """Return how many records were verified in which way."""
    by_hash = f"{ways[SUMS] + ways[HASH]:,} by file hash, not by token losses"
    if ways[SUMS]:
        by_hash += f" ({ways[SUMS]:,} of them also by their sums by article)"
    parts = [(ways[LOSSES], f"{ways[LOSSES]:,} by the losses of their tokens"),
             (ways[SUMS] + ways[HASH], by_hash), (ways[FAILED], f"{ways[FAILED]:,} NOT verified"),
             (ways[NOTHING], f"{ways[NOTHING]:,} without a measured quality")]  # fmt: skip
    return ", ".join(text for count, text in parts if count)


def _way(run: Run) -> str:
    """Return how a run is verified by the files that it has."""
    if not _measured_splits(run):
        return NOTHING
    if (run.folder / NLL).is_file():
        return LOSSES
    return SUMS if (run.folder / ARTICLES).is_file() else HASH


def _measured_splits(run: Run) -> list[str]:
    return [split for split in SPLITS if run.record.split(split)]


def _unlike_losses(run: Run, hashes: Mapping[str, str]) -> Iterator[str]:
    """Yield where a run's losses by token or article are not what its record says, or nothing holds it."""
    way = _way(run)
    if way == NOTHING:
        return
    if way != LOSSES and f"{run.folder.name}/record.json" not in hashes:
        yield f"it has a measured quality and no {NLL}, so that nothing verifies it"
    elif way != HASH:
        yield from _unlike_sums(run, _measured_splits(run))


def _unlike_sums(run: Run, splits: Sequence[str]) -> Iterator[str]:
    """Yield where the losses by token or article that a run kept do not add up to what its record says."""
    for split in splits:
        try:
            sums = article_sums(run.folder, split)
        except Refused as error:
            yield str(error)
            continue
        if sums is None:
            yield f"its file of losses holds none of {split}, which its record says was measured"
            continue
        said, total, count = run.record.split(split), float(sums[0].sum()), float(sums[1].sum())
        assert said is not None, "it is a measured split"
        if count != said.tokens or abs(total - said.nll_sum) > 1e-6 * abs(said.nll_sum):
            yield (
                f"{count:,.0f} losses of {split} add up to {total:.6f}, "
                f"its record says {said.nll_sum:.6f} on {said.tokens:,}"
            )


def _changed(study: Path, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each published file that is not as it was published, and in words how."""
    for name, sha256 in hashes.items():
        path = study / name
        if not path.is_file():
            yield name, f"{name} is missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            yield name, f"{name} is not what was published"


def _problems_of_report(report: Report, options: ReportOptions, folder: Path) -> Iterator[str]:
    """Yield where the written report differs from its records.

    Tables, summary, the data of the plots and the page (with the drawings of the folder) are made again and
    compared byte for byte; drawings are compared with the hash that was taken when they were written.
    """
    files = options["files"]
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
