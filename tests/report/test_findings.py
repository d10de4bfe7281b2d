"""docs/findings.md says what its commands say: the figures it quotes are recomputed."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from bench.report.contents import load_report, study_markdown
from bench.report.files import text_files
from bench.speed.record import FILE, SpeedRow, read_speed_record
from examples import five_facts

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "findings.md").read_text(encoding="utf-8")
REFERENCE = REPOSITORY / "results" / "reference"
SPEED = REFERENCE / "speed"


@pytest.mark.parametrize("number", [2, 3])
def test_the_facts_print_what_the_page_pastes(number, capsys):
    assert five_facts.main([str(number)]) == 0
    pasted = PAGE.split(f"$ python -m examples.five_facts {number}\n")[1].split("```")[0].split("\n$ ")[0]
    rounding = re.compile(r"\d\.\de-1\d|0\.0e\+00")  # of float64, by the machine
    shown = [rounding.sub("ε", line) for line in capsys.readouterr().out.strip().splitlines()]
    assert shown == [rounding.sub("ε", line) for line in pasted.strip().splitlines()]


def test_the_couplers_timed_alone_are_those_of_the_records():
    """Of the records that timed both couplers: what is compared was measured in one process."""
    records = [read_speed_record(path)[1] for path in sorted(SPEED.glob(f"*/{FILE}"))]
    for device, form, what in (
        ("cpu", "vectorized", "ms"), ("cuda", "vectorized", "ms"), ("cuda", "compiled", "ms"),
        ("cpu", "vectorized", "MiB"), ("cuda", "vectorized", "MiB"),
    ):  # fmt: skip
        found = []
        for rows in records:
            cases = {row.case.removesuffix(" alone"): row for row in rows
                     if (row.device, row.form) == (device, form)}  # fmt: skip
            if {"HGNN", "GNN"} <= cases.keys():
                found += [shown(cases[name], what) for name in ("HGNN", "GNN")]
        assert len(found) == 2, "the records that the page quotes are gone"
        assert f"{found[0]} against {found[1]} {what}" in PAGE, (device, form, found)


def shown(row: SpeedRow, what: str) -> str:
    value = 1e3 * statistics.median(row.seconds) if what == "ms" else (row.saved_bytes or 0) / 2**20
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def test_the_table_by_the_number_of_experts_is_that_of_the_record():
    """Peak memory in MiB, then tokens/s, each for the mean, the gate, GNN and HGNN."""
    _, rows = read_speed_record(SPEED / "h100-experts")
    for experts in (2, 4, 8, 16, 32, 64):
        of = {row.form: row for row in rows if row.experts == experts}
        four = [of[name] for name in ("mean", "gate", "GNN", "HGNN all_pairs")]
        cells = [f"{(row.peak_bytes or 0) / 2**20:,.0f}" for row in four]
        cells += [f"{len(row.seconds) * row.tokens / sum(row.seconds):,.0f}" for row in four]
        assert f"| {experts} | {' | '.join(cells)} |" in PAGE


def test_every_figure_of_an_answer_is_in_a_committed_study():
    """Signed and decimal numbers: in a report's text, or one of those that the other tests here recompute."""
    answers = PAGE.split("## Answers")[1].split("## By the number of experts")[0]
    reports = [
        load_report(REFERENCE / name)
        for name in ("reference-cpu", "reference-tuned", "reference-experts", "baseline")
    ]
    said = "\n".join(text_files(report)["summary.md"] + study_markdown(report) for report in reports)
    [memory] = [found for found in reports[0].answers if found.hypothesis.quantity == "peak_memory"]
    assert "peak memory of a step −5.88%" in memory.words()  # 5.9 in the answer
    assert all(text in said for text in ("21.49 M", "22.01 M", "22.54 M", "23.59 M"))  # 21.5, 0.5, 0.5, 23.6
    elsewhere = {"92.0", "14.5", "21.3", "5.15", "8.00", "5.9", "0.5", "21.5", "23.6"}
    figures = set(re.findall(r"[+−]\d+(?:\.\d+)?|\d+\.\d+", answers))
    missing = {figure for figure in figures - elsewhere if figure not in said}
    assert len(figures) > 40
    assert not missing


def test_the_figures_of_experts_are_those_of_the_coupler_that_is_named():
    table = load_report(REFERENCE / "reference-experts").sections[0].experts_table
    assert table is not None
    of = table.figures.set_index("configuration")
    mean, gate, gnn = (of.loc[name] for name in ("mean", "gate", "GNN"))
    hgnn, hnhn = of.loc["HGNN · HypergraphConv"], of.loc["HGNN · HNHN"]
    page = " ".join(PAGE.split())
    for text in (
        f"of the mean have cosine {mean.expert_cosine:.2f} and CKA {mean.expert_cka:.2f}. "
        f"Their effective rank is {mean.effective_rank:.2f} of 4",
        f"With the gate the cosine is {gate.expert_cosine:.2f} (p {gate.expert_cosine_p_holm:.3f})",
        f"With GNN the cosine is {gnn.expert_cosine:.3f} and with HNHN {hnhn.expert_cosine:.3f}, against "
        f"{mean.expert_cosine:.3f} (p {gnn.expert_cosine_p_holm:.3f} for both)",
        f"With HGNN it is {hgnn.expert_cosine:.3f}",
        f"With the gate, too, it is {gate.expert_cka:.2f} (p {gate.expert_cka_p_holm:.3f})",
        f"rises by {mean.ablation_nats:.4f} nats on average with the mean, and by "
        f"{mean.largest_rise_nats:.4f} nats at most. "
        f"The largest rise is {of.largest_rise_nats.max():.4f} nats, with the gate",
        f"With HGNN and GNN it matters less: {hgnn.ablation_nats:.4f} and {gnn.ablation_nats:.4f} nats",
    ):
        assert text in page
    assert of.largest_rise_nats.idxmax() == "gate"
    assert of.expert_cka_p_holm.min() > 0.05


def test_the_table_of_learning_rates_is_that_of_the_records():
    found: dict[str, dict[float, str]] = {}
    for path in (REFERENCE / "reference-learning-rate").glob("*/record.json"):
        record = json.loads(path.read_text())
        scored, config = record["quality"]["validation"], record["config"]
        perplexity = f"{math.exp(scored['nll_sum'] / scored['tokens']):.1f}"
        by_rate = found.setdefault(config["model"]["coupler_type"], {})
        by_rate[config["training"]["learning_rate"]] = perplexity
    assert found.keys() == {"mean", "gate", "GNN", "HGNN", "attention"}
    for name, by_rate in found.items():
        assert f"| {name} | {by_rate[8e-3]} | {by_rate[4e-3]} | {by_rate[2e-3]} |" in PAGE
