"""A report's files: what they hold, written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.analysis.page import render_page
from bench.analysis.report import Report, make_plots
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
