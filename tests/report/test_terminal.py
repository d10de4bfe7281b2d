"""Reports and listings on a terminal: at most 40 lines, and folded, never cut, on a narrow one."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from bench.record import is_measured
from bench.report.contents import load_report, make_report
from bench.report.terminal import MOST_LINES, print_report, runs_listing, studies_listing
from bench.study.hypotheses import Hypothesis
from bench.study.runs import Run, Study, grouped, load_study
from tests.report._made_studies import made_study

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
PLACES = ["page: results/made/report/report.html", "tables, plots, summary.md: results/made/report"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    couplers = {"mean": 0.0, "HGNN all_pairs": 0.02, "HGNN all_triplets": 0.1}
    return made_study(tmp_path_factory.mktemp("studies") / "made", couplers, seeds=6, history=2)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def letters(lines: list[str]) -> Counter[str]:
    """Return what is printed, however it is folded."""
    return Counter("".join("".join(lines).split()))


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def listed(study: Path, width: int) -> list[str]:
    where = console(width)
    where.print(studies_listing([study], study.parent))
    where.print(runs_listing(study))
    return printed(where)


def reported(study: Path, width: int) -> list[str]:
    where = console(width)
    print_report(make_report(load_study(study), "HGNN · all_pairs"), where)
    return printed(where)


@pytest.mark.parametrize("shown", [listed, reported])
def test_nothing_is_wider_than_the_terminal_or_80_columns_and_nothing_is_cut(study, shown):
    wide = shown(study, 200)
    assert max(map(len, wide)) <= 80
    for width in (40, 60, 79):
        lines = shown(study, width)
        assert max(map(len, lines)) <= width
        assert letters(lines) == letters(wide)
    assert "HGNN·all_triplets" in "".join(wide).replace(" ", "")


def many(study: Path, count: int, bases: int = 1) -> Study:
    """Return a study of ``count`` configurations with three seeds, on ``bases`` devices."""
    runs = []
    for place in range(count):
        for run in load_study(study).runs[:3]:
            record = run.record.model_copy(deep=True)
            record.run_id, record.configuration = f"{place:011x}{run.seed}", f"{place:012x}"
            record.config.training["learning_rate"] = 0.001 * (1 + place)
            assert is_measured(record.environment)
            record.environment.device_name = f"device {place % bases}"
            runs.append(Run(run.folder, record))
    return Study("made", study, grouped(runs), [(Path(f"{n}"), "cannot be read") for n in range(30)],
                 [(Path(f"{n}"), "its record is of another run: a copy") for n in range(30)])  # fmt: skip


@pytest.mark.parametrize(("count", "bases"), [(13, 1), (60, 1), (20, 2), (40, 20)])
def test_a_report_of_any_study_has_40_lines_at_most(study, count, bases):
    hypotheses = [Hypothesis(f"statement {n}", {"coupler_type": "mean"}, {"seed": 1}) for n in range(50)]
    where = console(200)
    made = make_report(many(study, count, bases), None, hypotheses, "2024-12-31T00:00:00Z")
    print_report(made, where, PLACES)
    lines = printed(where)
    assert len(lines) <= MOST_LINES == 40
    assert lines[-2:] == PLACES
    text = " ".join(" ".join(lines).split())
    shown = sum(" baseline" in line or "not resolved" in line for line in lines if "n-gram" not in line)
    assert shown >= min(bases, 2)
    assert "hypotheses: 50 inconclusive" in text
    assert re.search(r"! .* … and \d+ more, see the page", text), "warnings that are left out are counted"
    if count == 200:
        left_out = count - sum(line.startswith("mean · learning_rate") for line in lines)
        assert f"… and {left_out} more configurations, see the page or tables/comparison.csv" in text
    if bases == 20:
        assert "18 more tables: see the page" in text


def test_the_answer_comes_before_the_table_and_each_configuration_of_a_reference_study_is_shown():
    made = load_report(REFERENCE / "reference-cpu")
    where = console(80)
    print_report(made, where, PLACES)
    lines = printed(where)
    assert len(lines) <= MOST_LINES
    text = " ".join(" ".join(lines).split())
    assert text.index(made.sections[0].answer()) < text.index("configuration n perplexity")
    assert not [line for line in lines if line.startswith("…")]
    assert sum(" 9 " in line for line in lines) >= 13
