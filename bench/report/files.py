"""The files of a report: writing them, and verifying them.

``verify`` computes a report again from the records, compares published files with their hashes, and adds up
the losses that each record was computed from.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import DAMAGE_LETTERS, inside, not_linked_out, read_json, write_whole
from bench.record import Part, part_of
from bench.report.contents import Report, make_plots, summary_markdown
from bench.report.page import render_page
from bench.report.quantities import counted
from bench.study.hypotheses import read_hypotheses
from bench.study.run_files import ARTICLES, NLL, SPLITS, article_sums, publication
from bench.study.runs import Run
from gnnmoe.config import Refused, brief, shortened

PAGE, OPTIONS, SUMMARY = "report.html", "options.json", "summary.md"
ANEW = "delete it with its folder, or choose another with --out."
ReportOptions = dict[str, Any]
"""The options of a report: baseline, columns, allow_unequal, hypotheses, time stated; and file hashes."""


def write_report(report: Report, options: ReportOptions, folder: Path, plots: bool = True) -> list[Path]:
    """Write page, summary, tables and plots into ``folder``, and delete the other files of an earlier report.

    Each file is written whole or not at all. Files that no report wrote stay as they are.

    Raises:
        Refused: the folder cannot be written, holds files that no report wrote, or a link leads out of it.
    """
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is no folder; choose another with --out.")
    earlier: dict[str, str] = {}
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / OPTIONS).is_file():
            raise Refused(f"{folder} holds files that no report wrote; choose another folder with --out.")
        earlier = read_options(folder)["files"]
    drawn = {
        name: data for plot in (make_plots(report) if plots else []) for name, data in plot.files().items()
    }
    contents = {name: text.encode() for name, text in text_files(report).items()}
    contents |= {f"plots/{name}": data for name, data in drawn.items()}
    contents[PAGE] = render_page(report, drawn).encode()
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    paths = {name: _own_path(folder, name) for name in (*files, OPTIONS)}
    try:
        _write(paths[OPTIONS], {**options, "files": {**earlier, **files}})  # in case it is stopped
        for name, data in contents.items():
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            write_whole(paths[name], data)
        for name in earlier.keys() - files.keys():
            left_over = inside(folder, name, folder / OPTIONS)
            if left_over.is_file() and not left_over.is_symlink():
                left_over.unlink()
        _write(paths[OPTIONS], {**options, "files": files})
    except OSError as error:
        why = f"the report cannot be written to {folder} ({error.strerror})"
        raise Refused(f"{why}; choose another folder with --out.") from error
    return [paths[name] for name in files]


def _own_path(folder: Path, name: str) -> Path:
    """Return the path of a file of a report.

    Raises:
        Refused: a symbolic link leads out of the folder, or the path is a folder.
    """
    path = not_linked_out(folder, name)
    if path.is_dir():
        raise Refused(f"{path} is a folder, and the report has a file there; choose another with --out.")
    return path


def _write(path: Path, options: ReportOptions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {**options, "hypotheses": [found.to_table() for found in options["hypotheses"]]}
    write_whole(path, (json.dumps(stored, indent=2) + "\n").encode())


def text_files(report: Report) -> dict[str, str]:
    """Return the contents of the summary and of every table that has a row, by path."""
    tables = [table.files(report.columns) for table in report.tables if len(table.figures)]
    contents = {f"tables/{name}": text for files in tables for name, text in files.items()}
    return {**contents, SUMMARY: summary_markdown(report)}


def read_options(folder: Path) -> ReportOptions:
    """Return the options of the report in ``folder``.

    Raises:
        Refused: there is no report, or its options cannot be read, were not written by a report, or name a
            file outside the folder.
    """
    path = folder / OPTIONS
    if not path.is_file():
        raise Refused(f"{folder} holds no report; make one first, without --verify.")
    options = read_json(path)
    try:
        part_of(_Options, options)
        found = read_hypotheses(options["hypotheses"]) if options["hypotheses"] else []
    except Refused as error:
        why = shortened(str(error).rstrip("."), DAMAGE_LETTERS)
        raise Refused(f"{path} is not what a report writes: {why}; {ANEW}") from error
    for name in options["files"]:
        inside(folder, name, path)
    return {**options, "hypotheses": found}


class _Options(Part):
    baseline: str | None
    columns: list[str]
    allow_unequal: bool
    stated: str | None
    hypotheses: list[dict[str, Any]]
    files: dict[str, str]


def verify(
    study: Path, folder: Path, make: Callable[[ReportOptions | None], Report]
) -> tuple[list[str], str]:
    """Return the differences that were found, and in words what was compared.

    Args:
        study: The folder of the study.
        folder: The folder of its report. A published study needs no report: then its files are compared with
            the hashes in ``published.json``, and its records with the sums by article.
        make: Makes the report again with these options.

    Raises:
        Refused: the study has no report and was not published, or the options cannot be read.
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
"""How a record was verified: by losses per token, by file hash and sums by article, by file hash alone."""


def _words(ways: Counter[str]) -> str:
    """Return how many records were verified in each way."""
    by_hash = f"{ways[SUMS] + ways[HASH]:,} by file hash, not by token losses"
    if ways[SUMS]:
        by_hash += f" ({ways[SUMS]:,} of them also by their sums by article)"
    parts = [
        (ways[LOSSES], f"{ways[LOSSES]:,} by the losses of their tokens"),
        (ways[SUMS] + ways[HASH], by_hash),
        (ways[FAILED], f"{ways[FAILED]:,} NOT verified"),
        (ways[NOTHING], f"{ways[NOTHING]:,} without a measured quality"),
    ]
    return ", ".join(text for count, text in parts if count)


def _way(run: Run) -> str:
    """Return how a run can be verified with the files that it has."""
    if not _measured_splits(run):
        return NOTHING
    if (run.folder / NLL).is_file():
        return LOSSES
    return SUMS if (run.folder / ARTICLES).is_file() else HASH


def _measured_splits(run: Run) -> list[str]:
    return [split for split in SPLITS if run.record.split(split)]


def _unlike_losses(run: Run, hashes: Mapping[str, str]) -> Iterator[str]:
    """Yield the differences between a record and its losses by token or article, or that it has none."""
    way = _way(run)
    if way == NOTHING:
        return
    if way != LOSSES and f"{run.folder.name}/record.json" not in hashes:
        yield f"it has a measured quality and no {NLL}, so that nothing verifies it"
    elif way != HASH:
        yield from _unlike_sums(run, _measured_splits(run))


def _unlike_sums(run: Run, splits: Sequence[str]) -> Iterator[str]:
    """Yield the splits whose losses by token or article do not add up to the sum in the record."""
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
        assert said is not None, "the split was measured"
        if count != said.tokens or abs(total - said.nll_sum) > 1e-6 * abs(said.nll_sum):
            yield (
                f"{count:,.0f} losses of {split} add up to {total:.6f}, "
                f"its record says {said.nll_sum:.6f} on {said.tokens:,}"
            )


def _changed(study: Path, hashes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each published file that has changed or is missing, with a sentence."""
    for name, sha256 in hashes.items():
        path = study / name
        if not path.is_file():
            yield name, f"{name} is missing"
        elif _sha256(path) != sha256:
            yield name, f"{name} is not what was published"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problems_of_report(report: Report, options: ReportOptions, folder: Path) -> Iterator[str]:
    """Yield the differences between a written report and its records.

    Tables, summary, the data of the plots and the page (with the drawings in the folder) are made again and
    compared byte for byte. Drawings are compared with the hash from when they were written.
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
        elif name not in expected and _sha256(folder / name) != sha256:
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
                    return (
                        f"row {number}, {column}: {brief(wrong.get(column))}, by the records {brief(value)}"
                    )
        return f"{len(theirs)} rows, by the records {len(ours)}"
    lines = zip(expected.splitlines(), written.splitlines(), strict=False)
    number = next((n for n, (right, wrong) in enumerate(lines, 1) if right != wrong), None)
    return (
        "another length than by the records" if number is None else f"line {number} differs from the records"
    )
