"""Hypotheses answered from made records whose truth is known."""

from __future__ import annotations

import math

import pytest

from bench.report.comparison import answer_hypotheses
from bench.study.hypotheses import Hypothesis
from bench.study.runs import load_study
from tests.report._made_studies import made_study
from tests.study.test_study import change, runs_of


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    couplers = {"mean": 0.0, "gate": 0.0, "GNN": 0.05, "HGNN all_pairs": -0.05, "HGNN all_triplets": -0.052}
    path = made_study(tmp_path_factory.mktemp("studies") / "made", couplers, seeds=8, noise=0.003, history=2,
                      costs={"GNN": 1.0})  # fmt: skip
    return load_study(path).groups


def asked(better, than, by=0.0, quantity="perplexity"):
    return Hypothesis("one is better", better, than, by, quantity)


HGNN, GNN, MEAN, GATE = ({"coupler_type": name} for name in ("HGNN", "GNN", "mean", "gate"))
PAIRS = {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_pairs"}


@pytest.mark.parametrize(
    ("hypothesis", "kind"),
    [
        (asked(PAIRS, MEAN), "supported"),
        (asked(MEAN, PAIRS), "refuted"),
        (asked(PAIRS, MEAN, by=0.02), "supported"),
        (asked(PAIRS, MEAN, by=0.10), "refuted"),
        (asked(MEAN, GATE), "inconclusive"),
        (asked(MEAN, GNN, by=0.05, quantity="tokens_per_second"), "supported"),
        (asked(GNN, MEAN, quantity="tokens_per_second"), "refuted"),
        (asked(MEAN, GNN, by=0.10, quantity="peak_memory"), "supported"),
        (asked(MEAN, GNN, by=0.30, quantity="peak_memory"), "refuted"),
        (asked(GNN, MEAN, quantity="peak_memory"), "refuted"),
        (asked(PAIRS, HGNN, quantity="peak_memory"), "inconclusive"),
    ],
)
def test_answers(groups, hypothesis, kind):
    [found] = answer_hypotheses([hypothesis], groups)
    assert found.kind == kind
    words = {"perplexity": "perplexity", "tokens_per_second": "tokens/s", "peak_memory": "peak memory"}
    assert found.words().startswith(f"{kind}: {words[hypothesis.quantity]}")


def test_the_evidence_is_the_ratio_itself_not_the_shifted_one(groups):
    """The margin moves the test, not the figure that is told."""
    plain, shifted = answer_hypotheses([asked(PAIRS, MEAN), asked(PAIRS, MEAN, by=0.02)], groups)
    (ratio, ends), other = plain.effect() or (0.0, None), shifted.effect()
    assert other is not None
    assert ratio == pytest.approx(other[0])
    assert ends == pytest.approx(other[1])
    assert ends is not None
    low, high = ends
    assert low < ratio < high
    assert ratio == pytest.approx(math.exp(sum(plain.differences) / 8))


def test_a_side_of_several_configurations_counts_by_their_mean(groups):
    [both] = answer_hypotheses([asked(HGNN, MEAN)], groups)
    assert both.better == ("HGNN · all_pairs", "HGNN · all_triplets")
    ones = [answer_hypotheses([asked({**HGNN, "static_hyperedge_strategy": name}, MEAN)], groups)[0]
            for name in ("all_pairs", "all_triplets")]  # fmt: skip
    for seed, value in enumerate(both.differences):
        assert value == pytest.approx((ones[0].differences[seed] + ones[1].differences[seed]) / 2)
    assert "the mean of HGNN · all_pairs, HGNN · all_triplets" in both.words()


def test_p_is_adjusted_over_all_hypotheses(groups):
    alone = answer_hypotheses([asked(PAIRS, MEAN)], groups)[0].answer
    among = answer_hypotheses([asked(PAIRS, MEAN), asked(MEAN, GNN), asked(MEAN, GATE)], groups)[0].answer
    assert alone is not None
    assert among is not None
    assert alone.p_adjusted == pytest.approx(2 / 2**8)
    assert among.p_adjusted == pytest.approx(3 * 2 / 2**8)


def test_what_no_run_answers_is_said(groups):
    [found] = answer_hypotheses([asked({"coupler_type": "attention"}, MEAN)], groups)
    assert found.kind == "inconclusive"
    assert found.words() == "inconclusive: no run is selected by better."


def test_a_side_that_selects_what_no_flag_tells_apart_is_not_answered(tmp_path):
    """Two hyperedge files of one name: the mean of both would answer for neither."""
    path = made_study(tmp_path / "made", {"mean": 0.1, "HGNN file:e.json": 0.0, "HGNN file:f.json": 0.0},
                      seeds=8, noise=0.001, history=2)  # fmt: skip
    pairs = Hypothesis("pairs are better", {"coupler_type": "HGNN"}, {"coupler_type": "mean"})
    [found] = answer_hypotheses([pairs], load_study(path).groups)
    assert found.kind == "supported", "settings that differ are averaged, as they were asked for"
    for run in runs_of(path, "HGNN"):
        change(run, config__model__static_hyperedge_strategy="file:e.json")
    [found] = answer_hypotheses([pairs], load_study(path).groups)
    assert found.answer is None
    one, other = found.better
    assert found.words() == f"inconclusive: no flag tells {one} from {other}."
