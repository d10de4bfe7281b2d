"""Reports and listings on a terminal that is narrower than 80 columns: folded, and never cut."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from bench.report.contents import make_report
from bench.report.terminal import print_report, runs_listing, studies_listing
from bench.study.runs import load_study
from tests.report._made_studies import made_study


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
    for width in (30, 60, 79):
        lines = shown(study, width)
        assert max(map(len, lines)) <= width
        assert letters(lines) == letters(wide)
    assert "HGNN·all_triplets" in "".join(wide).replace(" ", "")


def test_a_long_name_of_the_reference_is_shown_whole(study):
    assert "nats to HGNN ·" in "\n".join(reported(study, 80))
    assert letters(reported(study, 80))["…"] == 0
