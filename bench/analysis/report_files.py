"""A report's files: what they hold, written whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.analysis.page import render_page
from bench.analysis.report import Report, make_plots
from bench.analysis.run_data import is_names
from bench.files import inside, not_linked_out, read_json, write_whole
from bench.sweeps.hypotheses import read_hypotheses
from gnnmoe.config import Refused

PAGE, OPTIONS, SUMMARY = "report.html", "options.json", "summary.md"
ANEW = "delete it with its folder, or make the report in another one with --out."
ReportOptions = dict[str, Any]
"""What a report was made with: reference, allow_unequal, hypotheses, when stated; and its files' hashes."""


def write_report(report: Report, options: ReportOptions, folder: Path, plots: bool = True) -> list[Path]:
    """Write page, summary, tables and plots into ``folder``; what an earlier report left over goes.

    Each file is there whole or not at all, and nothing that no report wrote is touched.

    Raises:
        Refused: the folder cannot be written, holds what no report wrote, or leads elsewhere.
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
        _write(paths[OPTIONS], {**options, "files": {**earlier, **files}})  # so that a rest is known
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
    """Return where a file of a report is written.

    Raises:
        Refused: a symbolic link in the folder leads out of it, or a folder stands in the file's place.
    """
    path = not_linked_out(folder, name)
    if path.is_dir():
        raise Refused(f"{path} is a folder, and the report has a file there; choose another with --out.")
    return path


def _write(path: Path, options: ReportOptions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {**options, "hypotheses": [asdict(found) for found in options["hypotheses"]]}
    write_whole(path, (json.dumps(stored, indent=2) + "\n").encode())


def text_files(report: Report) -> dict[str, str]:
    """Return the contents of the summary and of every table, by path."""
    tables = {f"tables/{name}": text for table in report.tables for name, text in table.files().items()}
    return {**tables, SUMMARY: _summary(report)}


def read_options(folder: Path) -> ReportOptions:
    """Return what the report in ``folder`` was made with, its hypotheses as ``Hypothesis``.

    Raises:
        Refused: there is no report, or its options cannot be read, are none that a report writes, or name
            a file that is not in the folder.
    """
    path = folder / OPTIONS
    if not path.is_file():
        raise Refused(f"{folder} holds no report; make one first, without --verify.")
    options = read_json(path)
    kinds = {"reference": str | None, "allow_unequal": bool, "stated": str | None, "hypotheses": list}
    wrong = not isinstance(options, dict) or not is_names(options.get("files")) or any(
        not isinstance(options.get(key, ...), kind) for key, kind in kinds.items())  # fmt: skip
    if wrong:
        raise Refused(f"{path} is not what a report of this version writes; {ANEW}")
    for name in options["files"]:
        inside(folder, name, path)
    try:
        found = read_hypotheses(options["hypotheses"]) if options["hypotheses"] else []
    except Refused as error:
        raise Refused(f"{path}: {error} {ANEW.capitalize()}") from error
    return {**options, "hypotheses": found}


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
