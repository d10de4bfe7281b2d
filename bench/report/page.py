"""The page of a report: one HTML file that needs no network. The same records give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.files import visible
from bench.report.charts import charts
from bench.report.contents import Report, explanations
from bench.report.provenance import Kind, RunFacts, kinds_of, run_facts
from bench.report.quantities import QUANTITIES
from bench.report.tables import Table

UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
OPTION = re.compile(r"(?<= )(?=--)")
TITLES = {
    "perplexity": ("Perplexity", "perplexity of every configuration, its interval, and paired differences"),
    "loss_curves": ("Loss curves", "loss by tokens or FLOPs, and the paired difference from the baseline"),
    "verdicts": ("Verdicts on all pairs", "verdict and difference of each configuration and each other one"),
    "pareto": (
        "Perplexity against cost",
        "paired difference of perplexity against memory, time and parameters",
    ),
    "coupler_cost": ("What a coupler costs", "time that each coupler adds to a training step"),
    "memory": ("Memory by part", "peak memory of a training step of every configuration, by part"),
    "hyperedge_weights": ("Hyperedge weights", "learned weight of each hyperedge by seed"),
    "mixing": ("Experts in the output", "share of each expert in the output of each layer by seed"),
    "expert_similarity": ("How alike the experts are", "cosine and CKA of every two experts by layer"),
    "expert_ablation": ("What an expert is worth", "rise of the loss without each expert by layer"),
    "effective_rank": ("Effective rank", "effective rank of the experts' updates over the steps"),
}


SCRIPTS = ("uPlot.LICENSE", "uPlot.iife.min.js", "report.js", "charts.js")
FEW = 10
"""With fewer evaluations, the chart of losses begins with the training loss."""
View = dict[str, Any]
"""What the template shows of a section or of a plot, by name."""


def render_page(report: Report, files: Mapping[str, bytes]) -> str:
    """Return the page of a report as HTML.

    ``files`` holds the files of the plots by name (``Plot.files``), in the order on the page. Each svg is
    shown, with a link to download its csv.
    """
    keys = ("environment", "code", "data")
    kinds: dict[str, list[Kind]] = {key: kinds_of(report.study.runs, key) for key in keys}
    plots = _plots(report, files)
    sections = [_section(report, place, plots.get(place, [])) for place in range(len(report.sections))]
    warnings = report.warnings()
    drawn = [charts(report.study.name, section.comparison) for section in report.sections]
    for section, chart in zip(sections, drawn, strict=True):
        section |= _menus(section, chart)
    runs = list(zip(_view(report.runs_table).rows, _facts(report, kinds), strict=True))
    return _template().render(
        study=report.study.name,
        headline=report.headline(),
        alarms=[text for text in warnings if text.startswith("NOT WIKITEXT-2")],
        warnings=[text for text in warnings if not text.startswith("NOT WIKITEXT-2")],
        sections=sections,
        answers=report.answers,
        stated=report.stated,
        kinds=kinds,
        runs=runs,
        runs_table=_view(report.runs_table),
        failures=_view(report.failures_table),
        statuses=list(dict.fromkeys(facts.status for _, facts in runs)),
        configurations=list(dict.fromkeys(facts.configuration for _, facts in runs)),
        command=visible(f"python -m bench.report {study_arguments(report.study.path)}"),
        charts=Markup(_json(drawn)),
        scripts=_scripts(),
    )


def _scripts() -> list[Markup]:
    """Return the scripts of the page: uPlot below its licence, and the page's own."""
    folder = Path(__file__).with_name("templates")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in SCRIPTS}
    licence = f"/*\n{texts['uPlot.LICENSE']}*/\n{texts['uPlot.iife.min.js']}"
    return [Markup(licence), Markup(texts["report.js"] + texts["charts.js"])]


def _menus(section: View, chart: dict[str, Any] | None) -> View:
    """Return the menus of a section's charts, and its pictures without those that a chart shows."""
    curves = [arm["curves"] for arm in chart["arms"]] if chart else []
    splits = [split for split in ("validation", "training") if any(split in found for found in curves)]
    if splits and max(len(found.get("validation", {"step": ()})["step"]) for found in curves) < FEW:
        splits.reverse()
    costs = chart["costs"] if chart else []
    hidden = {"perplexity", *(["loss_curves"] if splits else []), *(["pareto"] if costs else [])}
    return {
        "splits": splits,
        "costs": costs,
        "arms": len(curves),
        "left_out": chart["left_out"] if chart else 0,
        "first": [plot for plot in section["plots"] if plot["kind"] == "perplexity"],
        "plots": [plot for plot in section["plots"] if plot["kind"] not in hidden],
    }


def study_arguments(path: Path) -> str:
    """Return the arguments that name a study: its path below the current folder, else its name and folder."""
    place = path.resolve()
    below = place.is_relative_to(Path.cwd()) and place != Path.cwd()
    if below:
        text = place.relative_to(Path.cwd()).as_posix()
        return shlex.quote(text if "/" in text else f"./{text}")  # no option, no command
    return f"{shlex.quote(place.name)} --results-dir {shlex.quote(str(place.parent))}"


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_showable,
    )
    environment.filters |= {"csp_hash": _csp_hash, "options": OPTION.split}
    return environment.get_template("report.html.j2")


def _showable(value: Any) -> Any:
    """Return text with "�" for letters that HTML cannot hold; other values unchanged. jinja2 escapes it."""
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return UNSHOWABLE.sub("\ufffd", value) if plain else value


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON in ASCII that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _view(table: Table) -> TableView:
    return table_view(table, _data_uri("text/csv", table.csv().encode("utf-8", "replace")))


def _facts(report: Report, kinds: dict[str, list[Kind]]) -> list[RunFacts]:
    return [
        run_facts(run, found.label, kinds)
        for group in report.study.groups
        for found in group.configurations
        for run in found.runs
    ]


def _section(report: Report, place: int, plots: list[View]) -> View:
    section, number = report.sections[place], len(report.sections)
    labels = [f"{row.configuration.label}:" for row in section.comparison.rows]
    verdicts = [_headed(sentence, labels) for sentence in section.sentences()]
    return {
        "key": section.comparison_table.name,  # of its anchor
        "title": "Comparison" if number == 1 else f"Comparison {place + 1} of {number}",
        "embedded": section.comparison.group.embedded,
        "basis": section.comparison.group.basis.words(),
        "answer": section.answer(),
        "explanations": explanations(section.comparison),
        "general": [text for label, text in verdicts if not label],
        "labelled": [verdict for verdict in verdicts if verdict[0]],
        "comparison": _view(section.comparison_table),
        "pairs": _view(section.pairs_table),
        "plots": plots,
        "experts": section.experts.sentences() if section.experts else [],
        "experts_table": section.experts_table and _view(section.experts_table),
        "matching": section.matching_table and _view(section.matching_table),
        "weights": [_headed(one.sentence(), [one.configuration.label]) for one in section.weights],
    }


def _headed(sentence: str, labels: Sequence[str]) -> tuple[str, str]:
    """Return the longest label with which a sentence begins, else an empty text; and the rest."""
    head = max((label for label in labels if sentence.startswith(label)), key=len, default="")
    return head, sentence[len(head) :]


def _plots(report: Report, files: Mapping[str, bytes]) -> dict[int, list[View]]:
    """Return the plots by the place of their section in the report."""
    places = {section.suffix: place for place, section in enumerate(report.sections)}
    found: dict[int, list[View]] = {}
    for file, svg in files.items():
        name, dot, ending = file.rpartition(".")
        if dot and ending == "svg":
            base, suffix = _parts(name, places)
            view = _plot(name, base, svg, files.get(f"{name}.csv"))
            found.setdefault(places[suffix], []).append(view)
    return found


def _parts(name: str, suffixes: Mapping[str, int]) -> tuple[str, str]:
    """Return the kind of a plot and the suffix of its section."""
    suffix = next((found for found in suffixes if found and name.endswith(found)), "")
    return name.removesuffix(suffix), suffix


def _plot(name: str, base: str, svg: bytes, table: bytes | None) -> View:
    title, what = TITLES.get(
        base, (base.capitalize().replace("_by_", " by "), "perplexity by a swept number")
    )
    alt = f"{title}: {what}. The figures are in {name}.csv." if what else title
    csv_uri = None if table is None else _data_uri("text/csv", table)
    return {
        "name": name,
        "kind": base,
        "title": title,
        "alt": alt,
        "svg": _data_uri("image/svg+xml", svg),
        "table": csv_uri,
    }


SORTED_BY = {found.title: (found.name,) for found in QUANTITIES if found.title} | {
    "n": ("n",),
    "seed": ("seed",),
    "seeds": ("seeds_paired",),
    "table": ("table",),
    "seconds": ("seconds",),
    "largest rise (nats)": ("largest_rise_nats",),
    "experts that matter": ("experts_that_matter",),
    "difference (nats)": ("difference_nats",),
    "difference": ("difference_nats",),
    "p": ("p_holm",),
    "cost relative to mean": ("step_time_ratio_to_mean_coupler",),
    "batch requested / found / used": ("batch_size",),
}
"""Heading → the columns of figures that it is sorted by; the first column that the table has counts."""
PARTS = re.compile(r" (?=\[)|(?<=,) (?!.*\])")
IN_FULL = {"error": "error"}
"""Heading → the column of figures with the whole text, where the shown text is cut."""


class Cell(NamedTuple):
    """One cell: the shown text, the number to sort by, and the whole text if the shown text is cut."""

    text: str
    value: str | None
    full: str | None

    @property
    def parts(self) -> list[str]:
        """The text in parts that may stand in lines of their own: a mean and its interval, two costs."""
        return [self.text] if self.value is None else PARTS.split(self.text)


@dataclass(frozen=True)
class TableView:
    """One table, ready for the template."""

    name: str
    caption: str
    columns: list[tuple[str, bool]]
    """Each heading, and whether its column holds numbers."""
    rows: list[list[Cell]]
    bold: frozenset[int]
    notes: list[str]
    csv: str
    """All figures as csv in a data: URI."""


def table_view(table: Table, csv: str) -> TableView:
    """Return a table with the raw figure of each text."""
    titles = [title for title in table.shown.columns if title != "name" or any(table.shown[title])]
    raw = {
        title: next((name for name in SORTED_BY.get(title, ()) if name in table.figures), None)
        for title in titles
    }
    columns = [_cells(table, title, raw[title]) for title in titles]
    headings = [(title, raw[title] is not None) for title in titles]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return TableView(table.name, table.caption, headings, rows, table.bold, table.notes, csv)


def plain(value: Any) -> Any:
    """Return a figure as a JSON value."""
    if value is None or value is pd.NA:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _cells(table: Table, title: str, raw: str | None) -> list[Cell]:
    texts = table.shown[title].tolist()
    values = [None] * len(texts) if raw is None else [_value(value) for value in table.figures[raw]]
    whole = table.figures[IN_FULL[title]].tolist() if title in IN_FULL else texts
    fulls = [
        str(full) if full is not pd.NA and full and full != text else None
        for full, text in zip(whole, texts, strict=True)
    ]
    return [Cell(*found) for found in zip(texts, values, fulls, strict=True)]


def _value(value: Any) -> str | None:
    """Return a figure as a text that JavaScript's Number reads."""
    found = plain(value)
    if found is None or not isinstance(found, str):
        return None if found is None else repr(found)
    return found.replace("inf", "Infinity")
