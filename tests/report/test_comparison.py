"""Configurations against each other: the figures are those of the records."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
from scipy import stats

from bench.report.comparison import compare
from bench.report.contents import answer, explanations, verdict_sentences
from bench.report.quantities import PARAMETERS
from bench.study.runs import load_study
from tests.report._made_studies import made_study


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    couplers = {"mean": 0.0, "gate": 0.0005, "GNN": 0.03, "HGNN all_pairs": -0.03}
    return made_study(tmp_path_factory.mktemp("studies") / "made", couplers, seeds=8, noise=0.004, history=2,
                      failed={("gate", 7): "oom"})  # fmt: skip


@pytest.fixture(scope="module")
def comparison(path):
    return compare(load_study(path).groups[0])


def losses(path, coupler):
    records = [json.loads(file.read_text()) for file in path.glob("*/record.json")]
    counted = [r for r in records
               if r["config"]["model"]["coupler_type"] == coupler and r["status"] == "ok"]  # fmt: skip
    scored = {r["seed"]: r["quality"]["validation"] for r in counted}
    return {seed: found["nll_sum"] / found["tokens"] for seed, found in scored.items()}


def row(comparison, label):
    return next(row for row in comparison.rows if row.configuration.label == label)


def test_differences_are_paired_by_seed_and_equal_scipys(comparison, path):
    ours, theirs = losses(path, "GNN"), losses(path, "mean")
    found = row(comparison, "GNN").against
    differences = [ours[seed] - theirs[seed] for seed in range(8)]
    assert found.paired.mean == pytest.approx(statistics.fmean(differences), abs=1e-12)
    expected = stats.ttest_rel(
        [ours[s] for s in range(8)], [theirs[s] for s in range(8)]
    ).confidence_interval(0.95)
    assert found.paired.interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_verdicts_and_their_family(comparison):
    assert comparison.reference.label == "mean"
    assert comparison.comparisons == 3
    verdicts = {row.configuration.label: row.against.verdict.kind for row in comparison.rows if row.against}
    assert verdicts == {"GNN": "worse", "HGNN": "better", "gate": "equivalent"}
    assert len(comparison.pairs) == 6
    # the smallest possible p of 8 seeds, times what Holm makes of it in both families
    assert row(comparison, "GNN").against.p_adjusted == pytest.approx(3 * 2 / 2**8)
    among = [pair for pair in comparison.pairs if comparison.reference is not pair.reference]
    assert len(among) == 3
    assert min(pair.p_adjusted for pair in among) >= 3 * 2 / 2**8 - 1e-12


def test_there_is_one_verdict_a_pair(comparison):
    """Pairs with the reference are judged with the reference's family, wherever they are shown."""
    with_reference = [row.against for row in comparison.rows if row.against]
    found = [pair for pair in comparison.pairs if pair.reference is comparison.reference]
    assert [id(pair) for pair in found] == [id(pair) for pair in with_reference]


def test_no_best_is_denied_where_none_could_be_named(tmp_path):
    """With 8 seeds the 10 comparisons among the 5 others cannot reach p ≤ 0.05."""
    couplers = {"mean": 0.0, "gate": 0.1, "topk": 0.2, "GNN": 0.3, "attention": 0.4, "HGNN": -0.1}
    path = made_study(tmp_path / "six", couplers, seeds=8, noise=0.003, history=2)
    sentences = verdict_sentences(compare(load_study(path).groups[0]))
    assert sentences[0] == (
        "8 seeds are enough to compare each configuration with mean, but not with each other "
        "(9 seeds are needed for 10 comparisons)."
    )


def test_failed_runs_leave_their_seed_out_of_the_pairs(comparison):
    gate = row(comparison, "gate")
    assert gate.loss.n == 7
    assert sorted(gate.against.by_seed) == list(range(7))


def test_the_reference_comes_first_then_the_best(comparison):
    assert [row.configuration.label for row in comparison.rows] == ["mean", "HGNN", "gate", "GNN"]


def test_another_reference_and_an_unknown_one(path):
    group = load_study(path).groups[0]
    turned = compare(group, "GNN")
    against = row(turned, "mean").against
    assert against is not None
    assert against.verdict.kind == "better"
    with pytest.raises(ValueError, match=r"unknown configuration 'GNM'.*Did you mean 'GNN'"):
        compare(group, "GNM")


def test_best_needs_to_beat_every_other_one(comparison, tmp_path):
    best = comparison.best()
    assert best is not None
    assert best.label == "HGNN"
    even = made_study(
        tmp_path / "even", {"mean": 0.0, "HGNN": -0.03, "GNN": -0.03}, seeds=8, noise=0.004, history=2
    )
    assert compare(load_study(even).groups[0]).best() is None


def test_cost_is_beside_the_same_model_with_mean(comparison, path):
    gnn = row(comparison, "GNN")
    assert gnn.cost.mean.label == "mean"
    assert gnn.cost.parameters == gnn.model[PARAMETERS] - row(comparison, "mean").model[PARAMETERS]
    step = {label: {seed: statistics.median(run.record.speed.step_seconds)
                    for seed, run in row(comparison, label).configuration.counted.items()}
            for label in ("GNN", "mean")}  # fmt: skip
    ratios = [step["GNN"][seed] / step["mean"][seed] for seed in range(8)]
    assert gnn.cost.step_time_ratio() == pytest.approx(statistics.geometric_mean(ratios))
    low, high = gnn.cost.step_time_interval()
    assert 0 < low <= gnn.cost.step_time_ratio() <= high
    assert row(comparison, "mean").cost is None


def test_cost_needs_a_mean_of_the_same_size(tmp_path):
    path = made_study(tmp_path / "sizes", {"mean": 0.0, "GNN": 0.0}, experts=(2, 4), seeds=2, history=2)
    comparison = compare(load_study(path).groups[0])
    costs = {
        row.configuration.label: row.cost.mean.label for row in comparison.rows if row.cost and row.cost.mean
    }
    assert costs == {
        "GNN · num_experts 2": "mean · num_experts 2",
        "GNN · num_experts 4": "mean · num_experts 4",
    }


def test_article_interval_is_about_the_paired_difference(comparison):
    found = row(comparison, "GNN").against
    low, high = found.articles
    assert low < found.paired.mean < high


def test_sentences_say_verdict_ratio_interval_seeds_and_cost(comparison):
    text = "\n".join(verdict_sentences(comparison))
    assert answer(comparison).startswith("HGNN is better than every other configuration, and than mean: ")
    gnn = next(line for line in text.splitlines() if line.startswith("GNN: worse than mean"))
    found = row(comparison, "GNN").against
    assert f"{100 * (math.exp(found.paired.mean) - 1):+.2f}%" in gnn
    assert "8 paired seeds, p 0.023" in gnn
    assert "Cost relative to mean, timed in separate runs: " in gnn
    assert "gate: equivalent to mean (within ±0.01 nats)" in text


def test_what_may_surprise_in_a_table_is_explained(tmp_path):
    """p at its floor; an interval without 0 that is no verdict; seeds that are needed for a family."""
    couplers = {"mean": 0.0, "GNN": 0.4, "gate": 0.0012, "topk": 0.3, "attention": 0.2}
    path = made_study(tmp_path / "five", couplers, seeds=8, noise=0.02, history=2)
    found = compare(load_study(path).groups[0])
    said = explanations(found)
    assert said[0] == "p = 0.031 is the smallest possible p here (4 comparisons × 2/2^8, 8 seeds)."
    assert min(row.against.p_adjusted for row in found.rows if row.against) == pytest.approx(4 * 2 / 2**8)
    assert said[-1].startswith("The needed seeds are for 4 comparisons; compare tests a single pair")
    assert (
        answer(found)
        == "No configuration is better than mean: of 4 configurations, 3 are worse and 1 is not resolved."
    )
    assert not [text for text in said if "An interval without 0" in text]
    against = row(found, "gate").against
    assert against is not None
    paired = dataclasses.replace(against.paired, interval=(0.001, 0.02))
    rows = [dataclasses.replace(one, against=dataclasses.replace(against, paired=paired))
            if one.configuration.label == "gate" else one for one in found.rows]  # fmt: skip
    assert [
        text for text in explanations(dataclasses.replace(found, rows=rows)) if "interval without 0" in text
    ]


def test_too_few_seeds_are_said(tmp_path):
    path = made_study(tmp_path / "few", {"mean": 0.0, "GNN": 0.5}, seeds=3, history=2)
    comparison = compare(load_study(path).groups[0])
    assert answer(comparison) == (
        "3 seeds cannot show a significant difference: 1 comparison at p ≤ 0.05 needs at least 6 seeds."
    )
    assert explanations(comparison) == []
    assert "GNN: no significant difference from mean" in verdict_sentences(comparison)[0]


def test_one_run_and_a_study_of_failures(tmp_path):
    one = made_study(tmp_path / "one", {"HGNN": 0.0}, seeds=1, history=2)
    comparison = compare(load_study(one).groups[0])
    assert comparison.rows[0].loss.interval is None
    assert verdict_sentences(comparison) == []
    crashed = {(name, seed): "crashed" for name in ("mean", "GNN") for seed in (0, 1)}
    failed = made_study(tmp_path / "failed", {"mean": 0.0, "GNN": 0.0}, seeds=2, history=2, failed=crashed)
    comparison = compare(load_study(failed).groups[0])
    assert [row.loss.n for row in comparison.rows] == [0, 0]
    assert verdict_sentences(comparison) == ["Not compared with mean, because no common seed counts: GNN."]


@pytest.mark.parametrize("how", ["failed", "apart"])
def test_no_pair_with_a_seed_in_common_is_said(tmp_path, how):
    """All but one failed, or each has another seed: no comparison is there to say which one is best."""
    names = ("mean", "gate", "GNN")
    lost = {(name, seed): "diverged" for place, name in enumerate(names) for seed in range(3)
            if (name != "mean" if how == "failed" else seed != place)}  # fmt: skip
    path = made_study(tmp_path / how, dict.fromkeys(names, 0.0), seeds=3, history=2, failed=lost)
    comparison = compare(load_study(path).groups[0])
    assert comparison.pairs == []
    [said] = verdict_sentences(comparison)
    assert said.startswith("Not compared with mean, because no common seed counts: ")
    assert {"gate", "GNN"} == set(said.removesuffix(".").partition(": ")[2].split(", "))
