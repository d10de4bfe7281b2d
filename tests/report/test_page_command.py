"""The page's command makes the report again, and its runs say which table they are in."""

from __future__ import annotations

import shlex
from pathlib import Path

from bench.report.__main__ import main
from bench.report.contents import make_report
from bench.report.page import render_page
from bench.study.runs import load_study
from tests.report._made_studies import made_study
from tests.report._parsed_page import Page


def test_the_command_finds_the_study_from_where_it_was_made(tmp_path, monkeypatch):
    study = made_study(tmp_path / "results" / "my study", {"mean": 0.0}, seeds=1, history=2)
    for folder, given in ((tmp_path, "results/my study"), (tmp_path / "results", "my study"), (study, ".")):
        monkeypatch.chdir(folder)
        page = Page(render_page(make_report(load_study(Path(given))), {}))
        assert page.all("h1")[0].words == "my study"
        words = shlex.split(page.all("code", page.all("footer")[0])[0].text)
        assert words[:3] == ["python", "-m", "bench.report"]
        assert main([*words[3:], "--no-plots"]) == 0


def test_runs_of_several_tables_say_in_which_they_are(tmp_path):
    folder = made_study(tmp_path / "two", {"mean": 0.0}, seeds=2)
    path = next(folder.glob("*/record.json"))
    path.write_text(path.read_text().replace("a made processor", "another processor"))
    page = Page(render_page(make_report(load_study(folder)), {}))
    assert [row[2].attributes.get("data-value") for row in page.rows("runs")] == ["1", "2"]
