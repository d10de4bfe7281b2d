"""The page of a report: what it shows equals the tables, nothing is fetched, everything is escaped."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections import Counter

import numpy as np
import pytest

from bench.report.charts import thinned
from bench.report.contents import Report, explanations, make_report
from bench.report.page import SORTED_BY, plain, render_page
from bench.report.plots.frame import Curve
from bench.report.quantities import STEP_SECONDS, TRAINING_FLOPS
from bench.study.hypotheses import Hypothesis
from bench.study.runs import Run, Study, grouped, load_study
from tests.report._made_studies import made_study
from tests.report._parsed_page import Page, charts_of_page, table_of_page

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><path d="M0 0h8v8z"/></svg>'
HYPOTHESES = [
    Hypothesis("HGNN is <b>better</b> than mean", {"coupler_type": "HGNN"}, {"coupler_type": "mean"}),
    Hypothesis("GNN is better than mean", {"coupler_type": "GNN"}, {"coupler_type": "mean"}),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = made_study(
        tmp_path_factory.mktemp("page") / "couplers", {"mean": 0.0, "HGNN all_pairs": -0.05, "GNN": 0.02},
        seeds=8, failed={("GNN", 1): "oom", ("GNN", 2): "check_failed"}, test=True,
    )  # fmt: skip
    (folder / "broken").mkdir()
    (folder / "broken" / "record.json").write_text("{")
    return load_study(folder)


@pytest.fixture(scope="module")
def report(study) -> Report:
    return make_report(study, None, HYPOTHESES, "2024-12-31T00:00:00Z")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    table = "configuration,weight\nHGNN · all_pairs,1\n".encode()
    names = ("loss_curves", "perplexity", "hyperedge_weights", "a_new_one")
    return {f"{name}.{end}": data for name in names
            for end, data in (("svg", SVG), ("png", b"png"), ("csv", table))}  # fmt: skip


@pytest.fixture(scope="module")
def html(report, files) -> str:
    return render_page(report, files)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_offers_the_csv_files(report, page):
    for table in report.tables:
        written = list(csv.DictReader(io.StringIO(table.files()[f"{table.name}.csv"])))
        assert table_of_page(page, table.name) == written


def test_the_answer_and_the_picture_come_first_and_the_rest_is_in_its_order(report, page):
    ids = [one.attributes["id"] for one in page.elements if one.attributes.get("id")]
    wanted = ["comparison", "plot-perplexity", "table-comparison", "hypotheses", "plots", "details", "runs"]
    assert [name for name in ids if name in wanted] == wanted
    shown = [one.attributes["id"] for one in page.all("figure") if one.attributes.get("id")]
    assert shown == ["plot-perplexity", "plot-hyperedge_weights", "plot-a_new_one"], (
        "a chart shows the losses"
    )
    assert page.all("header")[0].words.startswith(f"couplers {report.sections[0].answer()}")
    assert [one.attributes["data-chart"] for one in page.all("figure") if "data-chart" in one.attributes] == [
        "curves", "costs",
    ]  # fmt: skip


def test_charts_hold_the_losses_and_costs_of_the_records(report, html):
    [found] = charts_of_page(html)
    comparison = report.sections[0].comparison
    assert found["arms"][0]["name"] == comparison.reference.label
    rows = {row.configuration.label: row for row in comparison.rows}
    for arm in found["arms"]:
        row, runs = rows[arm["name"]], list(rows[arm["name"]].configuration.counted.values())
        assert arm["loss"] == row.loss.mean
        assert arm["costs"]["median_step_seconds"] == pytest.approx(1e3 * row.means[STEP_SECONDS].mean)
        curve = arm["curves"]["validation"]
        history = runs[0].data.validation
        assert curve["step"] == [one["step"] for one in history]
        last = [run.data.validation[-1]["nll_sum"] / run.data.validation[-1]["tokens"] for run in runs]
        assert curve["loss"][-1] == pytest.approx(sum(last) / len(last), abs=1e-5)
        tokens = sum(one["tokens"] for one in runs[0].data.train if one["step"] <= history[-1]["step"])
        assert curve["tokens"][-1] == tokens > 0
        assert curve["flops_per_token"] == row.model[TRAINING_FLOPS]
        bits = runs[0].record.quality.validation.bits_per_byte
        assert arm["bits"] * runs[0].loss() == pytest.approx(bits)
    assert found["costs"][0][0] == "median_step_seconds"


def test_long_curves_have_500_points():
    curve = thinned(Curve((0,), np.arange(1, 3001), np.zeros((1, 3000))))
    assert (len(curve.steps_T), curve.steps_T[0], curve.steps_T[-1]) == (500, 1, 3000)


def test_cells_show_the_tables_and_sort_by_their_raw_figures(report, page):
    for table in report.tables:
        rows, shown = page.rows(table.name), table.shown.drop(columns=["name"], errors="ignore")
        edge = slice(1, -1) if table.name == "runs" else slice(None)
        heads = [head for head in page.all("th", page.by_id(f"table-{table.name}"))
                 if head.attributes["scope"] == "col"][edge]  # fmt: skip
        assert [head.words for head in heads] == list(shown.columns)
        assert len(rows) == len(shown)
        for place, row in enumerate(cells[edge] for cells in rows):
            for cell, title in zip(row, shown.columns, strict=True):
                assert cell.words == " ".join(shown[title].iloc[place].split())
                raw = next((name for name in SORTED_BY.get(title, ()) if name in table.figures), None)
                value = plain(table.figures[raw].iloc[place]) if raw else None
                written = cell.attributes.get("data-value")
                assert (written is None) if value is None else (float(written or "nan") == value)


def test_columns_of_numbers_are_sorted_as_numbers(page):
    """A new column of numbers without its raw figures would be sorted as text."""
    for table in ("comparison", "pairs", "runs", "failures"):
        columns = zip(*page.rows(table), strict=True)
        for cells in columns:
            texts = [cell.words for cell in cells if cell.words]
            numeric = texts and all(text.lstrip("+−<[ ")[:1].isdigit() for text in texts)
            is_name = table == "runs" and all(len(text) == 12 for text in texts)  # hashes
            if numeric and not is_name and not texts[0].endswith(("ok", "oom", "failed")):
                assert all("number" in cell.attributes.get("class", "") for cell in cells), (table, texts[0])


def test_what_the_report_says_is_on_the_page(report, page):
    text = page.all("main")[0].words
    section = report.sections[0]
    said = [
        *section.sentences(),
        *explanations(section.comparison),
        section.comparison.group.basis.words(),
        report.stated,
    ]
    said += [reading.sentence() for reading in section.weights]
    said += [answered.words().removeprefix(f"{answered.kind}: ") for answered in report.answers]
    said += [answered.hypothesis.statement for answered in report.answers]
    said += [note for table in (section.comparison_table, section.pairs_table) for note in table.notes]
    assert section.weights
    assert [sentence for sentence in said if sentence not in text] == []
    [header] = page.all("header")
    assert report.headline() in header.words
    assert all(warning in header.words for warning in report.warnings())


def test_failed_runs_are_rows_and_say_why(report, page):
    statuses = Counter(body.attributes["data-status"] for body in page.all("tbody", page.by_id("table-runs")))
    assert statuses == {"ok": 22, "oom": 1, "check_failed": 1}
    failures = page.by_id("failures").words
    assert "made to end as oom" in failures
    assert "is cut short" in failures
    details = [row.words for row in page.all("tr") if row.attributes.get("class") == "more"]
    assert len(details) == len(report.study.runs)
    [failed] = [text for text in details if "error made to end as check_failed" in text]
    assert "FAILED: no check says why" in failed, failed
    assert "quality, speed, memory, communication: the run did not get this far" in failed
    assert all("Python 3.11.0" in text and "sha256" in text for text in details)


def test_rows_have_their_exact_command(report, page):
    cells = [cells[-1].text for cells in page.rows("runs")]
    assert cells == [run.record.command for group in report.study.groups for run in group.runs]
    assert len([button for button in page.all("button") if button.attributes.get("class") == "copy"]) == 24


def test_environment_code_and_data_are_named_once(report, page):
    text = page.by_id("provenance").words
    record = report.study.runs[0].record.model_dump()
    environment, data = record["environment"], record["data"]
    hashes = [environment["project_sha256"], data["sha256"], *data["files"].values()]
    assert all(text.count(value) for value in hashes)
    assert [element.attributes["id"] for element in page.all("details", page.by_id("provenance"))] == [
        "environment-1", "code-1", "data-1"]  # fmt: skip
    targets = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    links = [link.attributes["href"] for link in page.all("a") if link.attributes["href"].startswith("#")]
    assert {link[1:] for link in links} <= set(targets)
    assert len(targets) == len(set(targets))


def test_plots_are_shown_as_they_are_with_their_figures(files, page):
    images = {image.parents[-2].attributes["id"].removeprefix("plot-"): image for image in page.all("img")}
    assert list(images) == ["perplexity", "hyperedge_weights", "a_new_one"]
    for name, image in images.items():
        assert decoded(image.attributes["src"], "image/svg+xml") == files[f"{name}.svg"]
        assert len(image.attributes["alt"]) > 8
        [link] = page.all("a", image.parents[-2])
        assert link.attributes["download"] == f"{name}.csv"
        assert decoded(link.attributes["href"], "text/csv") == files[f"{name}.csv"]
    assert "by seed" in images["hyperedge_weights"].attributes["alt"]


def decoded(uri: str, kind: str) -> bytes:
    head, _, data = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(data)


def test_a_second_group_has_its_own_section_and_plots(tmp_path, files):
    folder = made_study(tmp_path / "two", {"mean": 0.0, "HGNN all_pairs": -0.05}, seeds=2)
    for path in sorted(folder.glob("*/record.json"))[:1]:
        record = json.loads(path.read_text())
        record["environment"]["device_name"] = "another processor"
        path.write_text(json.dumps(record))
    more = {name.replace(".", "_2."): data for name, data in files.items()}
    page = Page(render_page(make_report(load_study(folder)), files | more))
    of = {section: [figure.attributes["id"].removeprefix("plot-")
                    for figure in page.all("figure", page.by_id(section)) if "id" in figure.attributes]
          for section in ("comparison", "comparison_2", "plots")}  # fmt: skip
    names = ["hyperedge_weights", "a_new_one"]
    assert of == {"comparison": ["perplexity"], "comparison_2": ["perplexity_2"],
                  "plots": [*names, *(f"{name}_2" for name in names)]}  # fmt: skip
    assert "another processor" in page.by_id("comparison_2").words
    assert "Comparison 2 of 2" in page.by_id("comparison_2").words


def test_the_warning_cannot_be_missed(tmp_path, page):
    embedded = made_study(tmp_path / "small", {"mean": 0.0}, seeds=1, embedded=True, arrays=False)
    warned = Page(render_page(make_report(load_study(embedded)), {}))
    [body] = warned.all("body")
    first = next(element for element in warned.elements if element.parents[-1:] == [body])
    assert first.attributes["class"] == "alarm"
    assert first.words.startswith("NOT WIKITEXT-2")
    assert warned.all("title")[0].words.startswith("NOT WIKITEXT-2")
    assert "NOT WIKITEXT-2" in warned.all("h2", warned.by_id("comparison"))[0].words
    assert not [element for element in page.elements if element.attributes.get("class") == "alarm"]


@pytest.mark.parametrize("status", ["oom", "check_failed"])
def test_studies_in_which_nothing_counts(tmp_path, status):
    study = load_study(made_study(tmp_path / "none", {"mean": 0.0, "GNN": 0.1}, seeds=1,
                                  failed={"mean": status, "GNN": status}))  # fmt: skip
    page = Page(render_page(make_report(study), {}))
    assert len(page.rows("runs")) == len(page.rows("failures")) == 2
    assert "No plots" in page.by_id("plots").words


def test_what_json_has_not():
    assert [plain(value) for value in (math.inf, -math.inf, math.nan, None)] == ["inf", "-inf", None, None]


@pytest.mark.slow
def test_a_thousand_runs_make_a_page_of_a_few_megabytes(tmp_path):
    few = load_study(made_study(tmp_path / "few", {"mean": 0.0, "gate": 0.01, "GNN": 0.02}, seeds=4)).runs
    runs = [Run(run.folder, run.record.model_copy(
                update={"run_id": f"{place:012x}", "seed": 4 * place + run.seed}))
            for place in range(84) for run in few]  # fmt: skip
    made = make_report(Study("many", tmp_path, grouped(runs[:1000])))
    html = render_page(made, {})
    assert len(html) < 6e6
    assert len(table_of_page(Page(html), "runs")) == 1000
