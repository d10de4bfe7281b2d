"""A study on a page: between its marks, and what committed records say and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.report.__main__ import main
from bench.report.contents import TABLE, WHOLE, load_report, marks, study_markdown, with_study
from bench.study.hypotheses import Hypothesis, state
from tests._records import SHA
from tests.report._made_studies import made_study
from tests.study.test_study import change, runs_of

REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY / "results" / "reference"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def page_of(name: str) -> str:
    begin, end = marks(name)
    return f"above\n{begin}\nold\n{end}\nbelow\n"


def test_the_small_study_on_a_page(tmp_path, capsys):
    """Also of what --publish makes of it: what is published says the same."""
    published = tmp_path / "small"
    assert main([str(REFERENCE / "small"), "--publish", str(published)]) == 0
    pages = []
    for number, study in enumerate((REFERENCE / "small", published)):
        page = tmp_path / f"{number}.md"
        page.write_text(page_of("small"))
        assert main([str(study), "--page", str(page)]) == 0
        pages.append(page.read_text())
    assert pages[0] == pages[1]
    text = pages[0]
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    cells = {row[0]: row for row in rows}
    assert rows[0][3] == "difference from mean"
    assert cells["mean"][1:6] == ["8", "546.5 [537.6, 555.6]", "", "", "baseline"]
    assert cells["HGNN · all_pairs"][3:6] == ["+2.25%", "0.047", "worse"]
    assert cells["Kneser-Ney trigram"][2:6] == ["221.9", "", "", "n-gram baseline"]
    assert "48 runs (48 ok), 6 configurations, 8 seeds." in text
    assert not (published / "report").exists()


def test_a_page_may_have_the_table_alone_or_both(tmp_path):
    """The answers to hypotheses are of the whole only."""
    study = made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.03}, seeds=6, history=2)
    state([Hypothesis("GNN is better", {"coupler_type": "GNN"}, {"coupler_type": "mean"})], study)
    report = load_report(study)
    (begin, end), (whole_begin, whole_end) = marks("made", TABLE), marks("made")
    table = f"{begin}\nold\n{end}\n"
    alone = with_study(table, report)
    assert "| GNN" in alone
    assert "old" not in alone
    assert "GNN is better" not in alone
    both = with_study(f"{table}between\n{whole_begin}\nold\n{whole_end}\n", report)
    assert both.startswith(alone + "between")
    assert both.count("| GNN") == 2
    assert both.count("GNN is better") == 1
    assert "old" not in both


def test_several_states_of_the_code_are_named(tmp_path):
    study = made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.03}, seeds=6, history=2)
    assert "Versions of the code" not in study_markdown(load_report(study))
    first, second, *_ = runs_of(study, "GNN")
    change(first, environment__project_sha256="5" * 64)
    text = study_markdown(load_report(study))
    assert f"Versions of the code: {SHA[:12]} (11 runs), {'5' * 12} (1 run)." in text
    change(second, environment__project_sha256=None)
    assert "(1 run), 1 run does not say which code made them." in study_markdown(load_report(study))


def test_written_again_it_is_the_same(tmp_path):
    report = load_report(REFERENCE / "small")
    once = with_study(page_of("small"), report)
    assert with_study(once, report) == once


def test_failed_runs_hypotheses_and_warnings_are_on_it(tmp_path):
    study = made_study(tmp_path / "made", {"mean": 0.0, "a|b": 0.2, "GNN": 0.03}, seeds=6, history=2,
                       failed={"GNN": "oom"}, embedded=True)  # fmt: skip
    text = study_markdown(load_report(study))
    assert "**NOT WIKITEXT-2: figures of the embedded text.**" in text
    assert "**Failed runs, which do not count: 6 oom.**" in text
    [line] = [line for line in text.splitlines() if line.startswith("| GNN")]
    assert "6 oom" in line
    assert "| a\\|b" in text


def test_a_page_without_the_marks_is_wrong_input(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(page_of("another"))
    for path, message in ((page, "\n".join(marks("small"))), (tmp_path / "no.md", "cannot be read")):
        with pytest.raises(SystemExit) as stopped:
            main([str(REFERENCE / "small"), "--page", str(path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert page.read_text() == page_of("another")


def test_one_thing_at_a_time(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["small", "--verify", "--page", str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_study_on_a_page_of_ours_follows_from_its_committed_records(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"<!-- begin of (?:{WHOLE}|{TABLE}) bench\.report (\S+) --page writes -->", text):
        again = f"python -m bench.report {name} --results-dir results/reference --page {path.name}"
        assert with_study(text, load_report(REFERENCE / name)) == text, f"write it again: {again}"


def test_the_reference_study_is_on_the_page_of_findings():
    begin, end = marks("reference-cpu")
    found = (
        (REPOSITORY / "docs/findings.md").read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    )
    assert found.count("\n| ") == 1 + 13 + 2  # headings, arms, n-gram baselines
