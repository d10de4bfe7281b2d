"""What a report says of the experts, from made records whose truth is known."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from bench.record import Diagnostics, read_record
from bench.report.compare import compare_sides, print_differences, read_side
from bench.report.comparison import answer_hypotheses, compare
from bench.report.contents import Report, make_report, study_markdown, summary_markdown
from bench.report.experts import Ablation, ablation, read_experts
from bench.report.page import render_page
from bench.report.quantities import Rise
from bench.report.summary import print_summary
from bench.report.terminal import print_report
from bench.study.hypotheses import OF_EXPERTS, Hypothesis
from bench.study.runs import load_study
from tests._records import made_diagnostics
from tests.report._made_studies import made_study
from tests.report._parsed_page import Page
from tests.study.test_study import change, runs_of

SEEDS = 8
COSINES = {"mean": 0.41, "gate": 0.40, "GNN": 0.21, "HGNN": 0.83}
HEADING = "What the experts learned"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """HGNN is more alike in every seed, GNN less, gate in every second; attention has no diagnostics."""
    couplers = dict.fromkeys((*COSINES, "attention"), 0.0)
    folder = made_study(tmp_path_factory.mktemp("made") / "learned", couplers, seeds=SEEDS, history=2)
    for coupler, alike in COSINES.items():
        for seed, run in enumerate(runs_of(folder, coupler)):
            noise = 0.01 * seed + (0.03 * (-1) ** seed if coupler == "gate" else 0.0)
            rises = (0.05, 0.001, 0.0) if coupler == "gate" and seed == 3 else (0.001, -0.02, 0.0)
            found = made_diagnostics(alike + noise, rises, information=0.12 if coupler == "gate" else None)
            change(run, diagnostics=found)
    return folder


@pytest.fixture(scope="module")
def report(study) -> Report:
    return make_report(load_study(study))


MORE = "cosine of experts' updates"
UNKNOWN = "was not measured: the"


def asked(higher: str, than: str, quantity: str = "expert_cosine", by: float = 0.0) -> Hypothesis:
    return Hypothesis("so it is", {"coupler_type": higher}, {"coupler_type": than}, by, quantity)


def test_the_sentences_compare_each_coupler_with_the_mean(report):
    reading = report.sections[0].experts
    assert reading is not None
    text = reading.sentences()
    assert text[0].startswith("With mean the updates of two experts have cosine 0.44 and CKA 0.44. ")
    assert text[0].endswith(" Their effective rank is 2.56 of 3 (8 seeds).")
    # p: 3 comparisons × 2/2^8
    expected = [
        "With HGNN the experts are more alike than with mean: cosine 0.86 against 0.44, 8 seeds, p 0.023.",
        "With GNN the experts are less alike than with mean: cosine 0.24 against 0.44, 8 seeds, p 0.023.",
        "With GNN the experts have another CKA than with mean: 0.24 against 0.44, 8 seeds, p 0.023.",
        "The loss rises most without expert 0 of layer 0 (gate, seed 3): by 0.0500 nats, "
        "standard error 0.0020.",
        "In some seeds at least one expert matters with: gate (1 of 8).",
        "The effective number of experts is 3.00 with every configuration.",
        "The experts of attention were not measured: the run is older than this measurement.",
    ]
    assert [sentence for sentence in expected if sentence not in text] == []
    heads = ("With gate the experts are not significantly more or less alike than with mean: cosine ",
             "With gate the mutual information of token and expert is 0.120 nats of at most 1.099",
             "No expert matters with: ")  # fmt: skip
    for head in heads:
        assert sum(sentence.startswith(head) for sentence in text) == 1, head
    assert max(len(one.split()) for sentence in text for one in sentence.split(". ")) <= 25


def test_the_terminal_says_that_other_tables_have_experts_too(study, tmp_path):
    copy = Path(shutil.copytree(study, tmp_path / "learned"))
    for run in runs_of(copy, "gate"):
        change(run, data__sha256="0" * 64)
    console = Console(file=io.StringIO(), width=80)
    print_report(make_report(load_study(copy)), console)
    printed = " ".join(console.file.getvalue().split())  # pyright: ignore
    assert printed.count("experts: cosine of their updates") == 1
    assert "nats; 1 other table on the page" in printed


def test_a_run_without_diagnostics_is_named_beside_those_that_have_them(study, tmp_path):
    copy = Path(shutil.copytree(study, tmp_path / "learned"))
    for run in runs_of(copy, "GNN")[1:3]:
        change(run, diagnostics={"value": None, "reason": "left out by --no-diagnostics"})
    reading = read_experts(compare(load_study(copy).groups[0]))
    assert reading is not None
    text = reading.sentences()
    assert "The experts of GNN were not measured in 2 of 8 seeds: left out by --no-diagnostics." in text
    assert any(one.startswith("With GNN the experts") and ", 6 seeds, p " in one for one in text)
    assert any(one.startswith("No expert matters with: ") for one in text)


def test_an_expert_matters_where_its_rise_is_significant_among_all_experts():
    found = Diagnostics.model_validate(made_diagnostics(0.5, (0.05, 0.0045, 0.004, 0.0), error=0.002))
    # z is 25, 2.25, 2 and 0 in two layers: of eight tests, the third p is 6 × 0.012
    assert ablation(3, found) == Ablation(3, Rise(0.05, 0.002, 0, 0), 2, 8)
    none = Diagnostics.model_validate(made_diagnostics(1.0, (0.0, 0.0), error=0.0))
    assert ablation(0, none).significant == 0


def test_the_table_has_the_means_and_the_paired_p(report):
    table = report.sections[0].experts_table
    figures = table.figures.set_index("configuration")
    assert set(figures.index) == set(COSINES)
    assert figures.n.tolist() == [SEEDS] * 4
    assert figures.expert_cosine["HGNN"] == pytest.approx(0.865)
    assert figures.expert_cosine_difference["HGNN"] == pytest.approx(0.42)
    assert figures.expert_cosine_p_holm["HGNN"] == pytest.approx(3 * 2 / 2**SEEDS)
    assert figures.effective_experts_p_holm.isna().all()  # with the mean it is E by definition
    assert "all 3 experts have equal shares in every seed" in table.notes[-1]
    assert figures.mutual_information["gate"] == pytest.approx(0.12)
    assert figures[["expert_cosine_p_holm", "mutual_information"]].loc["mean"].isna().all()
    assert (figures.experts_that_matter["gate"], figures.experts_tested["gate"]) == (2, 6 * SEEDS)
    shown = table.shown.set_index("configuration")
    assert shown.cosine["HGNN"] == "0.86 (p 0.023)"
    assert shown["experts that matter"]["gate"] == "2 of 48"


def test_summary_page_and_markdown_say_it_and_the_terminal_in_three_lines(report):
    reading, table = report.sections[0].experts, report.sections[0].experts_table
    assert table in report.tables
    page = Page(render_page(report, {}))
    assert page.by_id("experts").words.startswith(HEADING)
    assert f"## {HEADING}\n" in summary_markdown(report)
    for text in (summary_markdown(report), study_markdown(report), page.by_id("experts").words):
        assert [sentence for sentence in reading.sentences() if sentence not in text] == []
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    printed = " ".join(console.file.getvalue().split())  # pyright: ignore
    assert reading.line() in printed
    assert len(reading.line()) <= 3 * 75
    assert "of 3 other configurations, 1 make them significantly more alike and 1 less alike" in printed


def test_a_study_without_diagnostics_says_nothing_of_experts(tmp_path):
    folder = made_study(tmp_path / "old", {"mean": 0.0, "GNN": 0.0}, seeds=2, history=2)
    made = make_report(load_study(folder))
    assert read_experts(compare(load_study(folder).groups[0])) is None
    assert HEADING not in summary_markdown(made) + render_page(made, {}) + study_markdown(made)
    assert "experts" not in [table.name for table in made.tables]


@pytest.mark.parametrize(
    ("hypothesis", "words"),
    [
        (asked("HGNN", "mean"), f"supported: {MORE} +0.42 (95% interval +0.42 to +0.42), HGNN against "),
        (asked("HGNN", "mean", by=0.4), f"supported: {MORE} +0.42 "),
        (asked("HGNN", "mean", by=0.5), f"refuted: {MORE} +0.42 "),
        (asked("mean", "HGNN"), f"refuted: {MORE} −0.42 "),
        (asked("mean", "HGNN", "effective_rank"), "supported: effective rank of experts' updates +0.42 "),
        (asked("gate", "mean"), f"inconclusive: {MORE} −0.01"),
        (asked("gate", "mean", "ablation_nats"),
         "inconclusive: rise of the loss without an expert +0.003 nats (95% interval"),
        (asked("attention", "mean"), f"inconclusive: {MORE} {UNKNOWN} run is older than this measurement."),
        (asked("gate", "mean", "mutual_information"),
         f"inconclusive: mutual information {UNKNOWN} coupler has no weights that depend on the token."),
        (asked("topk", "mean"), "inconclusive: no run is selected by higher."),
    ],
)  # fmt: skip
def test_hypotheses_on_experts_are_answered_by_the_difference(study, hypothesis, words):
    [found] = answer_hypotheses([hypothesis], load_study(study).groups)
    assert found.words().startswith(words)


def test_the_csv_of_runs_and_compare_have_the_quantities(study, report):
    runs = report.runs_table.figures
    assert runs[runs.coupler_type == "HGNN"].expert_cosine.tolist() == pytest.approx(
        [0.83 + 0.01 * seed for seed in range(SEEDS)]
    )
    assert runs[runs.coupler_type == "attention"][list(OF_EXPERTS)].isna().all().all()
    assert runs.diagnostics_share_of_run.dropna().unique().tolist() == [0.018]
    a, b = (read_side(f"learned:{label}", study.parent) for label in ("mean", "HGNN"))
    console = Console(file=io.StringIO(), width=80)
    print_differences(a, b, compare_sides(a, b), console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # pyright: ignore
    assert ["experts:", "cosine", "0.44", "0.86", "+0.4200"] in lines
    assert ["experts:", "mean", "rise", "(nats)", "−0.0063", "−0.0063", "+0.0000"] in lines


def test_the_end_of_a_run_has_two_lines_on_its_experts(study):
    run = runs_of(study, "gate")[3]
    console = Console(file=io.StringIO(), width=80)
    print_summary(read_record(run), run, console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # pyright: ignore
    place = next(at for at, line in enumerate(lines) if line.startswith("experts "))
    assert lines[place : place + 2] == [
        "experts      cosine 0.40, CKA 0.40, effective rank 2.60 of 3 (1.8% of the time)",
        "             largest rise of the loss +0.0500 ± 0.0020 nats (layer 0, E0)",
    ]
