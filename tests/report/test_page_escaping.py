"""What a user typed stays text on the page of a report: names, commands, errors, places."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.record import Record
from bench.report.charts import charts
from bench.report.contents import make_report
from bench.report.page import UNSHOWABLE, render_page
from bench.study.runs import Run, Study, grouped, load_study
from tests.report._made_studies import made_study
from tests.report._parsed_page import CHARTS, Page, charts_of_page

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"`&amp; ☃ \r\n--x=1"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("page") / "couplers"
    return load_study(made_study(folder, {"mean": 0.0, "GNN": 0.02}, seeds=1, failed={"GNN": "oom"}))


def with_text(study: Study, text: str) -> Study:
    """Return two runs of a study with ``text`` wherever a user can have typed it, under another name."""
    runs = []
    for run in study.runs:
        record = run.record.model_dump(mode="json")
        record |= {"run_name": text, "command": f"python --name={text}", "error": text}
        record["config"]["model"]["coupler_type"] = f"{record['config']['model']['coupler_type']}{text}"
        record["check"]["checks"]["causality"]["detail"] = record["environment"]["device_name"] = text
        record["data"]["name"] = text
        runs.append(Run(run.folder, Record.model_validate(record)))
    return Study(text, study.path, grouped(runs), [(Path("broken"), text)])


@pytest.fixture(scope="module")
def expected(study) -> Counter[str]:
    """How often each element is there with a harmless text."""
    page = Page(render_page(make_report(with_text(study, "x")), {}))
    return Counter(element.tag for element in page.elements)


def test_nothing_is_fetched_and_only_our_script_may_run(study):
    html = render_page(make_report(with_text(study, HOSTILE)), {"a.svg": b"<svg/>", "a.csv": b"a\n1\n"})
    page = Page(html)
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert element.attributes.get(name, "#").startswith(("#", "data:"))
    assert "url(" not in html
    assert "@import" not in html
    assert "innerHTML" not in html
    scripts = page.all("script")
    assert [script.attributes.get("type") for script in scripts] == ["application/json", None, None]
    digests = [
        base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode() for script in scripts[1:]
    ]
    policy = next(meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {hashes};" in policy
    assert "Copyright (c) 2022 Leon Sorokin" in scripts[1].text


@settings(max_examples=8, deadline=None)
@given(text=st.text(min_size=1, max_size=40) | st.text("<>&\"'`/=!-\\{}%#\r\n\t ☃x", min_size=1, max_size=30))
def test_whatever_a_user_types_stays_text(study, expected, text):
    check_harmless(study, expected, text)


@pytest.mark.parametrize(
    "text", [HOSTILE, "<!--", "]]>", "{{ 7*7 }}{% raw %}", "\u2028\u202e</td>", "\x00\x7f"]
)
def test_hostile_texts_stay_text(study, expected, text):
    check_harmless(study, expected, text)


def check_harmless(study: Study, expected: Counter[str], text: str) -> None:
    made = make_report(with_text(study, text))
    html = render_page(made, {})
    assert charts_of_page(html) == json.loads(
        json.dumps([charts(text, section.comparison) for section in made.sections])
    )
    embedded = CHARTS.search(html)
    assert embedded
    assert not set("<>&") & set(embedded[1])  # else "</script x" and "<!--<script" mean something there
    assert "\r" not in html  # a parser makes LF of it
    page = Page(html)
    kinds = ("script", "img", "a", "button", "tr", "td", "input", "section", "style", "iframe", "b", "svg")
    counts = Counter(element.tag for element in page.elements)
    assert {kind: counts[kind] for kind in kinds} == {kind: expected[kind] for kind in kinds}
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert page.all("h1")[0].text == UNSHOWABLE.sub("\ufffd", text)
    for cells in page.rows("runs"):
        assert cells[-1].text == UNSHOWABLE.sub("\ufffd", f"python --name={text}")
