"""The page of a report: one HTML file that needs no network, the same bytes for the same records."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.analysis.page_tables import TableView, figures, table_view
from bench.analysis.provenance import Kind, RunFacts, kinds_of, run_facts
from bench.analysis.report import Report
from bench.analysis.tables import Table
from bench.files import visible

UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
OPTION = re.compile(r"(?<= )(?=--)")
NUMBERED = re.compile(r"(hyperedge_weights(?:_over_steps)?)_(\d+)(_\d+)?")
TITLES = {
    "loss_curves": ("Loss curves", "loss over the steps of every configuration, with bands over the seeds"),
    "perplexity": ("Perplexity", "perplexity of every configuration, its interval, and paired differences"),
    "pareto": ("Perplexity against cost", "perplexity against memory, throughput and parameters"),
    "experts": ("Cost by number of experts", "memory and throughput against the number of experts"),
    "coupler_cost": ("What a coupler costs", "time and memory of each coupler over the mean coupler"),
    "training": ("Training", "training loss, validation loss, learning rate and gradient norm by step"),
    "hyperedge_weights": ("Hyperedge weights", "learned weight of each hyperedge, the mean and every seed"),
    "hyperedge_weights_over_steps": ("Hyperedge weights over steps", "weight of each hyperedge by step"),
    "mixing": ("Experts in the output", "share of each expert in the output of each layer"),
}  # fmt: skip


@dataclass(frozen=True)
class PlotView:
    """One plot as the page shows it."""

    name: str
    title: str
    alt: str
    svg: str
    table: str | None
    """Its data, as is ``svg`` a data: URI; None without."""


@dataclass(frozen=True)
class SectionView:
    """One section as the page shows it."""

    key: str
    """Of its anchor."""
    title: str
    embedded: bool
    setting: str
    general: list[str]
    """Verdicts on all configurations."""
    labelled: list[tuple[str, str]]
    """Verdicts on one: the label that a sentence begins with, and its rest."""
    comparison: TableView
    pairs: TableView
    plots: list[PlotView]
    weights: list[tuple[str, str]]


def render_page(report: Report, files: Mapping[str, bytes]) -> str:
    """Return the page of a report as HTML.

    ``files`` are the plots' files by name (``Plot.files``), in the order in which they are shown; each svg
    is shown, with the csv of its name to download.
    """
    keys = ("environment", "code", "data")
    kinds: dict[str, list[Kind]] = {key: kinds_of(report.study.runs, key) for key in keys}
    plots = _plots(report, files)
    sections = [_section(report, place, plots.get(place, [])) for place in range(len(report.sections))]
    warnings = report.warnings()
    runs = list(zip(_view(report.runs_table).rows, _facts(report, kinds), strict=True))
    return _template().render(
        study=report.study.name, headline=report.headline(),
        alarms=[text for text in warnings if text.startswith("NOT WIKITEXT-2")],
        warnings=[text for text in warnings if not text.startswith("NOT WIKITEXT-2")],
        sections=sections, answers=report.answers, stated=report.stated, kinds=kinds,
        runs=runs, runs_table=_view(report.runs_table), failures=_view(report.failures_table),
        statuses=list(dict.fromkeys(facts.status for _, facts in runs)),
        configurations=list(dict.fromkeys(facts.configuration for _, facts in runs)),
        command=visible(f"python -m bench.report {study_arguments(report.study.path)}"),
        figures=Markup(_json(figures(report.study.name, report.tables))),
    )  # fmt: skip


def study_arguments(path: Path) -> str:
    """Return what names a study to the command: its path below the current folder, else name and folder."""
    place = path.resolve()
    below = place.is_relative_to(Path.cwd()) and place != Path.cwd()
    if below:
        text = place.relative_to(Path.cwd()).as_posix()
        return shlex.quote(text if "/" in text else f"./{text}")  # which is no option, and no other command
    return f"{shlex.quote(place.name)} --results-dir {shlex.quote(str(place.parent))}"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("bench.analysis"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_showable,
    )  # fmt: skip
    environment.filters |= {"csp_hash": _csp_hash, "options": OPTION.split}
    return environment.get_template("report.html.j2")


def _showable(value: Any) -> Any:
    """Return text with "�" for what HTML cannot hold, all else as it is; jinja2 escapes it."""
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return UNSHOWABLE.sub("\ufffd", value) if plain else value


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON in ASCII that is safe within a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _view(table: Table) -> TableView:
    text = table.figures.to_csv(index=False, lineterminator="\n")
    return table_view(table, _data_uri("text/csv", text.encode("utf-8", "replace")))


def _facts(report: Report, kinds: dict[str, list[Kind]]) -> list[RunFacts]:
    return [run_facts(run, found.label, kinds) for group in report.study.groups
            for found in group.configurations for run in found.runs]  # fmt: skip


def _section(report: Report, place: int, plots: list[PlotView]) -> SectionView:
    section, number = report.sections[place], len(report.sections)
    labels = [f"{row.configuration.label}:" for row in section.comparison.rows]
    verdicts = [_headed(sentence, labels) for sentence in section.sentences()]
    return SectionView(
        key=section.comparison_table.name,
        title="Comparison" if number == 1 else f"Comparison {place + 1} of {number}",
        embedded=section.comparison.group.embedded,
        setting=section.comparison.group.setting.words(),
        general=[text for label, text in verdicts if not label],
        labelled=[verdict for verdict in verdicts if verdict[0]],
        comparison=_view(section.comparison_table), pairs=_view(section.pairs_table), plots=plots,
        weights=[_headed(reading.sentence(), [reading.configuration.label]) for reading in section.weights],
    )  # fmt: skip


def _headed(sentence: str, labels: Sequence[str]) -> tuple[str, str]:
    """Return the longest of ``labels`` that a sentence begins with, or nothing, and its rest."""
    head = max((label for label in labels if sentence.startswith(label)), key=len, default="")
    return head, sentence[len(head) :]


def _plots(report: Report, files: Mapping[str, bytes]) -> dict[int, list[PlotView]]:
    """Return the plots by the place of their section."""
    places = {section.suffix: place for place, section in enumerate(report.sections)}
    found: dict[int, list[PlotView]] = {}
    for file, svg in files.items():
        name, dot, ending = file.rpartition(".")
        if dot and ending == "svg":
            base, suffix = _parts(name, places)
            view = _plot(name, base, svg, files.get(f"{name}.csv"))
            found.setdefault(places[suffix], []).append(view)
    return found


def _parts(name: str, suffixes: Mapping[str, int]) -> tuple[str, str]:
    """Return what a plot shows and the suffix of its section: ``hyperedge_weights_2`` is of the first."""
    numbered = NUMBERED.fullmatch(name)
    if numbered:
        suffix = numbered[3] or ""
        return (numbered[1], suffix) if suffix in suffixes else (name, "")
    suffix = next((found for found in suffixes if found and name.endswith(found)), "")
    return name.removesuffix(suffix), suffix


def _plot(name: str, base: str, svg: bytes, table: bytes | None) -> PlotView:
    title, what = TITLES.get(base, (base.replace("_", " ").capitalize(), ""))
    if table is not None and base.startswith("hyperedge_weights"):
        rows = list(csv.DictReader(io.StringIO(table.decode())))
        title += f": {rows[0]['configuration']}" if rows and "configuration" in rows[0] else ""
    alt = f"{title}: {what}. The figures are in {name}.csv." if what else title
    return PlotView(name, title, alt, _data_uri("image/svg+xml", svg),
                    None if table is None else _data_uri("text/csv", table))  # fmt: skip
