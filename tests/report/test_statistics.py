"""Verdicts on paired differences and answers to hypotheses, from numbers made by hand."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.report.statistics import (
    MINIMUM_EFFECT_NATS,
    Paired,
    Verdict,
    answer_claims,
    compare_family,
    holm,
    judge,
    paired,
    sign_flip_p,
    t_interval,
)
from bench.study.hypotheses import ALPHA, seeds_needed

ZIGZAG = np.array([1.0, -1.0] * 5)
"""Ten values with mean 0 and a standard deviation of √(10/9)."""


def made(
    mean: float, interval: tuple[float, float], interval_90: tuple[float, float], deviation: float = 0.01
) -> Paired:
    return Paired(10, mean, deviation, interval, interval_90, 0.001)


def standardised(n: int, mean: float, deviation: float) -> np.ndarray:
    """Return n differences with exactly this mean and standard deviation."""
    values = np.arange(n) - (n - 1) / 2
    return mean + deviation * values / values.std(ddof=1)


@pytest.mark.parametrize(
    ("comparisons", "seeds"), [(1, 6), (2, 7), (3, 7), (4, 8), (8, 9), (12, 9), (13, 10), (25, 10), (26, 11)]
)
def test_seeds_needed_are_the_fewest_whose_smallest_p_is_enough(comparisons, seeds):
    assert seeds_needed(comparisons) == seeds
    assert comparisons * sign_flip_p([0.1] * seeds) <= ALPHA < comparisons * sign_flip_p([0.1] * (seeds - 1))


def test_paired_statistics_of_students_sleep_data():
    found = paired([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (found.n, found.mean) == (10, pytest.approx(1.58))
    assert found.standard_deviation == pytest.approx(1.229995, abs=1e-6)
    assert found.interval == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    half = 1.833113 * 1.229995 / math.sqrt(10)  # t of 0.95 at 9 degrees of freedom, from its table
    assert found.interval_90 == pytest.approx((1.58 - half, 1.58 + half), abs=1e-6)
    assert found.p == 4 / 2**10  # nine of one sign, and a 0


def test_one_pair_has_a_mean_and_nothing_else():
    assert paired([-0.5]) == Paired(1, -0.5, None, None, None, 1.0)
    with pytest.raises(ValueError, match="no differences"):
        paired([])


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        (-0.03 + 0.005 * ZIGZAG, "better"),
        (0.03 + 0.005 * ZIGZAG, "worse"),
        # significant goes before equivalent: its 90% interval is inside ±0.01 as well
        (-0.003 + 0.001 * ZIGZAG, "better (below the minimum effect)"),
        (0.003 + 0.001 * ZIGZAG, "worse (below the minimum effect)"),
        (0.001 + 0.005 * ZIGZAG, "equivalent"),
        (np.zeros(10), "equivalent"),
        ([0.02], "not resolved (one seed decides nothing)"),
        ([-0.02] * 5, "not resolved (needs about 6 seeds)"),  # no spread at all, but p cannot fall below 2/32
        (5.0 * ZIGZAG, "not resolved (needs more than 9,999 seeds)"),
    ],
)
def test_a_verdict_in_words(differences, words):
    assert compare_family([np.array(differences)])[0][2].words() == words


def test_better_needs_both_the_test_and_the_interval():
    clear = made(-0.03, (-0.04, -0.02), (-0.039, -0.021))
    assert judge(clear, 0.05, 1).kind == "better"
    assert judge(clear, 0.0501, 1).kind == "not resolved"
    outlier = paired([0.01] * 9 + [0.5])  # ten of one sign: p 2/1024, but t is 1.2
    assert outlier.p == 2 / 1024
    assert judge(outlier, outlier.p, 1).kind == "not resolved"
    touching = made(-0.03, (-0.06, 0.0), (-0.055, -0.005))
    assert judge(touching, 0.001, 1).kind == "not resolved"


def test_equivalent_is_the_90_percent_interval_inside_the_minimum_effect():
    assert judge(made(0.004, (-0.003, 0.011), (-0.002, 0.00999)), 0.3, 3).kind == "equivalent"
    assert judge(made(0.004, (-0.003, 0.011), (-0.002, 0.01)), 0.3, 3).kind == "not resolved"
    assert judge(made(-0.004, (-0.011, 0.003), (-0.01, 0.002)), 0.3, 3).kind == "not resolved"
    assert judge(made(-0.009, (-0.0099, -0.008), (-0.0098, -0.0081)), 0.2, 9) == Verdict("equivalent")
    assert judge(made(-0.01, (-0.02, -0.001), (-0.02, -0.001)), 0.01, 1) == Verdict("better")
    assert judge(made(-0.00999, (-0.02, -0.001), (-0.02, -0.001)), 0.01, 1) == Verdict("better", True)


@pytest.mark.parametrize(
    ("mean", "deviation", "comparisons", "seeds"),
    [
        # R: power.t.test(delta = …, power = 0.8, type = "paired"), rounded up; G*Power says the same
        (0.01, 0.02, 1, 34), (-0.01, 0.02, 1, 34), (0.01, 0.05, 1, 199), (0.02, 0.025, 1, 15),
        (0.0, 0.02, 1, 34),  # an effect smaller than the minimum is not looked for
        (0.04, 0.02, 1, 6),  # 5 by the t test, but a sign flip needs 6
        (0.04, 0.02, 13, 10),
    ],
)  # fmt: skip
def test_how_many_seeds_it_would_take(mean, deviation, comparisons, seeds):
    seen = paired(standardised(3, mean, deviation))
    assert judge(seen, 1.0, comparisons).seeds == seeds


@pytest.mark.parametrize(("deviation", "comparisons"), [(0.01, 1), (0.02, 5), (0.1, 25)])
def test_the_seeds_it_would_take_are_the_fewest_with_that_power(deviation, comparisons):
    def power(n: int) -> float:
        critical = stats.t.ppf(1 - 0.05 / comparisons / 2, n - 1)
        return float(stats.nct.sf(critical, n - 1, 0.01 * math.sqrt(n) / deviation))

    seeds = judge(paired(standardised(4, 0.0, deviation)), 1.0, comparisons).seeds
    assert seeds is not None
    assert power(seeds) >= 0.8 > power(seeds - 1)


def test_more_seeds_than_were_run():
    """Also where luck, and not their number, was what they lacked."""
    assert judge(paired(standardised(60, 0.03, 0.03)), 0.06, 1).seeds == 61
    assert (
        judge(paired(standardised(60, 0.03, 0.03)), 0.06, 1).words() == "not resolved (needs about 61 seeds)"
    )
    assert Verdict("not resolved", seeds=1234).words() == "not resolved (needs about 1,234 seeds)"
    many = replace(paired(standardised(60, 0.03, 0.03)), n=12_000)
    assert judge(many, 0.06, 1).words() == "not resolved (needs more than 9,999 seeds)"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=10), st.integers(1, 30))
def test_a_verdict_mirrors_with_the_sides(thousandths, comparisons):
    forth = paired(np.array(thousandths) / 1000)
    back = paired(-np.array(thousandths) / 1000)
    p = min(1.0, comparisons * forth.p)
    there, again = judge(forth, p, comparisons), judge(back, p, comparisons)
    mirror = {"better": "worse", "worse": "better"}
    assert again.kind == mirror.get(there.kind, there.kind)
    assert (again.below_minimum, again.seeds) == (there.below_minimum, there.seeds)
    assert there.seeds is None or there.seeds > forth.n
    assert (there.seeds is None) == (there.kind != "not resolved")


def test_a_family_is_adjusted_over_those_with_a_spread():
    random = np.random.default_rng(11)
    sizes, means = [10, 8, 1, 10, 2], [-0.03, 0.02, -0.5, 0.0, 0.0]
    differences = [random.normal(mean, 0.01, size=n) for n, mean in zip(sizes, means, strict=True)]
    found = compare_family(differences)
    raw = [sign_flip_p(values) for values in differences]
    adjusted = holm([raw[i] for i in (0, 1, 3, 4)])
    for (member, p, verdict), values, p_raw in zip(found, differences, raw, strict=True):
        assert member == paired(values)
        assert member.p == p_raw
        assert verdict == judge(member, p, 4)
    assert [p for _, p, _ in found] == pytest.approx([*adjusted[:2], 1.0, *adjusted[2:]])
    assert [verdict.kind for _, _, verdict in found[:3]] == ["better", "worse", "not resolved"]
    assert raw[1] == 2 / 2**8
    assert compare_family([]) == []
    unresolved, *_ = compare_family([standardised(4, 0.0, 0.02), *[np.array([0.01])] * 9])
    assert unresolved[2].seeds == 34  # as alone


def test_eight_seeds_are_enough_for_four_comparisons_but_not_for_seven():
    clear = -0.03 + 0.001 * ZIGZAG[:8]
    for comparisons, kind in ((4, "better"), (6, "better"), (7, "not resolved")):
        verdicts = [verdict for _, _, verdict in compare_family([clear] * comparisons)]
        assert {verdict.kind for verdict in verdicts} == {kind}
    assert verdicts[0].words() == "not resolved (needs about 9 seeds)"


def test_a_comparison_without_pairs_is_refused():
    for values in (np.empty(0), np.array([0.1, math.nan])):
        with pytest.raises(ValueError, match=r"no differences|not finite"):
            compare_family([np.zeros(5), values])


def test_claims_are_supported_refuted_or_neither():
    margin = -math.log(1 - 0.01)  # "at least 1 % better"
    observed = [-0.03, 0.03, -0.005, -margin]  # the third is better, but not by so much
    answers = answer_claims([mean + margin + 0.001 * ZIGZAG for mean in observed])
    assert [answer.kind for answer in answers] == ["supported", "refuted", "refuted", "inconclusive"]
    assert answers[0].paired.mean == pytest.approx(margin - 0.03)
    assert answers[0].p_adjusted == pytest.approx(4 * 2 / 2**10)
    assert answers[3].p_adjusted == 1.0


def test_claims_of_one_file_are_adjusted_together():
    six = -0.03 + 0.001 * ZIGZAG[:6]  # p 2/64, enough for one claim and not for two
    assert [answer.kind for answer in answer_claims([six])] == ["supported"]
    assert [answer.kind for answer in answer_claims([six, six])] == ["inconclusive"] * 2
    lone = answer_claims([six, np.array([-0.4])])
    assert [answer.kind for answer in lone] == ["supported", "inconclusive"]
    assert lone[1].p_adjusted == 1.0


def test_a_made_study_from_losses_to_words(capsys):
    """Nothing is printed and nothing warned of on the way."""
    random = np.random.default_rng(7)
    trunk = 5 + random.normal(0, 0.1, size=10)  # what a seed brings to every coupler
    effects = {"mean": 0.0, "mean_again": 0.0, "HGNN": -0.03, "broken": 0.4}
    losses = {name: trunk + effect + random.normal(0, 0.003, size=10) for name, effect in effects.items()}
    losses["mean_again"] = losses["mean"]
    candidates = [name for name in losses if name != "mean"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare_family([losses[name] - losses["mean"] for name in candidates])
    words = {name: verdict.words() for name, (_, _, verdict) in zip(candidates, found, strict=True)}
    assert words == {"mean_again": "equivalent", "HGNN": "better", "broken": "worse"}
    interval = t_interval(losses["HGNN"])
    assert interval is not None
    assert interval[0] < losses["mean"].mean() < interval[1]  # unpaired, nothing is to be seen
    assert MINIMUM_EFFECT_NATS == 0.01
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_statistics_need_neither_torch_nor_pandas():
    script = "import sys, bench.report.statistics; sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60).returncode == 0
