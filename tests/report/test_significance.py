"""Intervals, sign flips and Holm: published examples, hand counts, and scipy where it has the same thing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.report import statistics
from bench.report.statistics import bca_interval, holm, sign_flip_p, sign_flip_ps, t_interval

DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
"""Crossed less self-fertilised maize, height in eighths of an inch (Fisher 1935, §17)."""
SLEEP = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
"""Hours of sleep gained with one drug over another ("Student" 1908; R's data set sleep)."""
TENTHS = st.integers(-50, 50).map(lambda number: number / 10)
P_VALUES = st.lists(st.floats(0, 1), max_size=12)


def test_students_interval_of_published_samples():
    assert t_interval(SLEEP) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)  # R: t.test(paired)
    inches = DARWIN / 8
    assert t_interval(inches) == pytest.approx((0.0039, 5.2295), abs=2e-4)  # Fisher: t 2.148, just beyond 5 %
    low, high = t_interval([1.0, 2.0, 3.0], confidence=0.9) or (0, 0)
    assert (low, high) == pytest.approx((2 - 2.919986 / math.sqrt(3), 2 + 2.919986 / math.sqrt(3)), abs=1e-6)


@pytest.mark.parametrize("interval", [t_interval, bca_interval])
def test_an_interval_needs_two_finite_values(interval):
    assert interval([]) is None
    assert interval([0.3]) is None
    assert interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3), abs=1e-15)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            interval([0.1, bad])


def test_bca_follows_its_formula():
    """z0 from the share of means below the mean, a from the jackknife; own draws differ by chance."""
    skewed = np.array([0.1, 0.2, 0.2, 0.4, 0.5, 0.9, 1.3, 4.0])
    random, n = np.random.default_rng(5), len(skewed)
    means = random.choice(skewed, size=(200_000, n)).mean(axis=1)
    z0 = stats.norm.ppf((means < skewed.mean()).mean() + (means == skewed.mean()).mean() / 2)
    pull = (skewed - skewed.mean()) / (n - 1)  # how much the mean loses without each
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    z = z0 + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(z0 + z / (1 - acceleration * z)))
    percentile = np.quantile(means, [0.025, 0.975])
    assert bca_interval(skewed) == pytest.approx(expected, rel=0.03)
    assert not np.allclose(percentile, expected, rtol=0.06)  # the correction is larger than what is allowed
    assert bca_interval(skewed) == bca_interval(skewed)
    assert bca_interval(skewed, seed=1) != bca_interval(skewed)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.sampled_from([2.0**-500, 2.0**-60, 2.0**20]))
def test_bca_has_the_unit_of_its_values(values, unit):
    """A spread of the size of a rounding error gives an interval as well, and no NaN; 2ᵏ scales exactly."""
    low, high = bca_interval(np.array(values) * unit, resamples=499) or (math.nan, math.nan)
    assert min(values) * unit <= low <= high <= max(values) * unit * (1 + 1e-15)
    expected = bca_interval(np.array(values, float), resamples=499)
    assert (low / unit, high / unit) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_counted_by_fisher():
    """863 of the 32,768 sums are at least Darwin's 314; one in either tail counts."""
    assert DARWIN.sum() == 314
    assert sign_flip_p(DARWIN) == 2 * 863 / 2**15
    assert sign_flip_p(DARWIN / 8 / 12) == 2 * 863 / 2**15  # in feet, where equal sums differ by rounding


def test_sign_flips_counted_by_hand():
    assert sign_flip_p([3, 2, 1]) == 2 / 8  # ±6
    assert sign_flip_p([3, 2, -1]) == 4 / 8  # ±6, ±4
    assert sign_flip_p([0.3, 0.2, -0.1]) == 4 / 8
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a mean of 0 on paper, 5e-17 in float
    assert sign_flip_p([1, 1, 0]) == 4 / 8  # a flip of 0 changes nothing, and counts twice
    assert sign_flip_p([0, 0, 0]) == sign_flip_p([0.02]) == 1.0
    assert sign_flip_p([-0.02] * 10) == 2 / 2**10


def test_no_pair_or_one_without_a_number_is_refused():
    with pytest.raises(ValueError, match="no differences to test"):
        sign_flip_p([])
    with pytest.raises(ValueError, match="no differences to test"):
        sign_flip_ps(np.empty((0, 3)))
    with pytest.raises(ValueError, match="not finite: nan"):
        sign_flip_p([0.1, math.nan])
    assert sign_flip_ps(np.empty((4, 0))).shape == (0,)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(TENTHS, min_size=2, max_size=9))
def test_sign_flips_by_enumeration(values):
    differences = np.array(values)
    flips = [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=len(values))]
    counted = sum(abs(total) >= abs(differences.sum()) - 1e-9 for total in flips) / len(flips)
    assert sign_flip_p(differences) == counted
    assert sign_flip_p(-differences[::-1]) == counted


def test_many_comparisons_are_as_one_by_one(monkeypatch):
    differences_nm = np.random.default_rng(0).normal(size=(10, 7)).round(1)
    expected = [sign_flip_p(column) for column in differences_nm.T]
    assert sign_flip_ps(differences_nm).tolist() == expected
    monkeypatch.setattr(statistics, "AT_ONCE", 7 * 10 * 300)  # three parts, and a rest
    assert sign_flip_ps(differences_nm).tolist() == expected
    assert len(set(expected)) == 7


def test_random_flips_stand_for_all_of_them(monkeypatch):
    """Above 16 pairs; at 12 both ways are at hand, and differ by chance only."""
    differences_n = np.random.default_rng(3).normal(0.3, 1, size=12)
    exact = sign_flip_p(differences_n)
    monkeypatch.setattr(statistics, "FLIPS", 4_000)
    assert 0.05 < exact < 0.95
    assert sign_flip_p(differences_n) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4e3))
    assert sign_flip_p(differences_n) != exact
    assert sign_flip_p(differences_n) == sign_flip_p(-differences_n)
    monkeypatch.undo()
    assert (
        sign_flip_p(np.full(21, 0.01) + np.arange(21) * 1e-4) == 1 / 100_001
    )  # the observed itself: never 0
    assert sign_flip_p(np.zeros(21)) == 1.0
    assert sign_flip_ps(np.ones((21, 9))).tolist() == [1 / 100_001] * 9


def test_holms_adjustment_worked_by_hand():
    # 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 raised to the 0.06 before it (Wikipedia's example)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(
        [0.05, 0.08, 0.09, 0.09, 0.09]
    )  # R: p.adjust
    assert holm([0.9, 0.6, 0.02]) == pytest.approx([1, 1, 0.06])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@settings(derandomize=True)
@given(P_VALUES, st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_lies_between_nothing_and_bonferroni(p_values, random):
    adjusted = holm(p_values)
    for p, larger in zip(p_values, adjusted, strict=True):
        assert p <= larger <= min(1, len(p_values) * p)
    for (p, p_adjusted), (q, q_adjusted) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert p_adjusted <= q_adjusted if p <= q else p_adjusted >= q_adjusted
    shuffled = list(range(len(p_values)))
    random.shuffle(shuffled)
    assert holm([p_values[i] for i in shuffled]) == [adjusted[i] for i in shuffled]


@settings(derandomize=True)
@given(P_VALUES)
def test_holm_is_the_step_down_procedure(p_values):
    """Reject from the smallest p on while p₍ᵢ₎ ≤ α / (m − i + 1), and stop at the first that is not."""
    m, rejected = len(p_values), set()
    for step, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if (m - step) * p_values[index] > 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected
