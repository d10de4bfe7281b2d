"""Kendall's τ over seeds: scipy's values, p by enumeration, and what cannot be ordered."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.report import statistics
from bench.report.statistics import Agreement, agreement


def found(weights) -> Agreement:
    result = agreement(np.array(weights, float))
    assert result is not None
    return result


def mean_tau(weights) -> float:
    taus: list[Any] = [stats.kendalltau(a, b)[0] for a, b in itertools.combinations(weights, 2)]
    return float(np.nan_to_num(taus).mean())


def enumerated_p(weights) -> float:
    """Return the share of all orders of every seed but the first whose mean τ is at least the observed."""
    first, *others = [tuple(row) for row in weights]
    orders = itertools.product(*(itertools.permutations(row) for row in others))
    return float(np.mean([mean_tau([first, *rows]) >= mean_tau(weights) - 1e-9 for rows in orders]))


def test_a_hand_count():
    """Of six pairs of members five stand alike in the two seeds, and one does not: τ 4/6."""
    result = found([[1, 2, 3, 4], [0.1, 0.3, 0.2, 0.9]])
    assert result.tau == pytest.approx(4 / 6)
    assert (result.seeds, result.members) == (2, 4)
    assert found([[1, 2], [1, 2], [2, 1]]).tau == pytest.approx(-1 / 3)  # 1, −1 and −1
    assert found([[1, 2, 2], [1, 2, 3]]).tau == pytest.approx(2 / math.sqrt(2 * 3))  # τ-b, with a tie


@pytest.mark.parametrize(
    "weights",
    [
        [[1, 2, 3, 4], [1, 2, 3, 4]],
        [[1, 2, 3, 4], [1, 2, 4, 3]],
        [[1, 2, 3, 4], [4, 1, 2, 3]],
        [[1, 2, 3], [1, 3, 2], [1, 2, 3]],
        [[1, 2, 2], [1, 2, 3], [1, 1, 3]],
        [[1, 2], [1, 2], [1, 2], [2, 1]],
        [[2, 3, 3, 2], [3, 3, 3, 0], [1, 2, 1, 1]],  # equal sums differ by rounding
    ],
)
def test_p_is_the_share_of_orders_that_agree_as_much(weights):
    expected = enumerated_p(weights)
    error = math.sqrt(expected * (1 - expected) / 2000)
    assert found(weights).p == pytest.approx(expected, abs=3 * error + 1 / 2001)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(2, 7), st.randoms(use_true_random=False))
def test_the_fast_statistic_is_the_mean_tau(seeds, members, random):
    """‖Σ u‖² = S + S (S − 1) · τ; only a seed without an order is not of length 1."""
    weights = np.array([[random.randint(0, 3) for _ in range(members)] for _ in range(seeds)], float)
    lengths = (np.ptp(weights, axis=1) > 0).sum()
    expected = lengths + seeds * (seeds - 1) * mean_tau(weights)
    assert statistics._kendall(weights[:, :, None]) == pytest.approx(expected, abs=1e-9)
    result = agreement(weights)
    if lengths < 2:
        assert result is None
    else:
        assert result is not None
        assert result.tau == pytest.approx(mean_tau(weights), abs=1e-12)


def test_only_the_order_of_the_weights_counts_and_not_that_of_seeds_and_members():
    weights = np.random.default_rng(0).normal(size=(6, 9))
    weights += 0.3 * np.arange(9)
    result = found(weights)
    assert found(np.exp(weights) * np.arange(1, 7)[:, None]) == result
    shuffled = found(weights[::-1, ::-1])
    assert shuffled.tau == pytest.approx(result.tau)
    assert found(weights) == result


def test_a_shared_order_is_found_and_noise_is_not():
    random = np.random.default_rng(1)
    common = random.normal(size=28)
    shared = found(common + random.normal(size=(8, 28)))
    assert shared.reproducible
    assert shared.p == 1 / 2001  # none of 2,000 agrees as much
    assert 0.2 < shared.tau < 0.5
    noise = found(random.normal(size=(8, 28)))
    assert not noise.reproducible
    assert abs(noise.tau) < 0.1


@pytest.mark.parametrize("members", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 70))])
def test_p_is_uniform_where_there_is_nothing(members, monkeypatch):
    """About one in ten is below 0.1, by τ as by ranks."""
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    random = np.random.default_rng(4)
    p_values = [found(random.normal(size=(4, members))).p for _ in range(150)]
    assert 0.03 < np.mean(np.array(p_values) <= 0.1) < 0.18
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.1)


def test_ranks_stand_in_where_there_are_many_members(monkeypatch):
    weights = np.random.default_rng(7).normal(size=(5, 40)) + 0.012 * np.arange(40)
    by_tau = found(weights).p
    monkeypatch.setattr(statistics, "MAX_KENDALL_MEMBERS", 39)
    by_rank = found(weights).p
    assert 0.2 < by_tau < 0.5
    assert by_rank == pytest.approx(by_tau, abs=0.1)
    assert by_rank != by_tau
    monkeypatch.setattr(statistics, "MAX_KENDALL_MEMBERS", 64)
    monkeypatch.setattr(statistics, "RANKS_AT_ONCE", 40 * 5 * 300)  # six parts, and a rest
    assert found(weights).p == pytest.approx(by_tau, abs=0.05)


def test_what_has_no_order():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nothing in (np.ones((4, 6)), np.ones((4, 1)), np.ones((4, 0)), np.arange(6.0)[None]):
            assert agreement(nothing) is None
        learned = np.arange(6.0)
        assert agreement(np.array([learned, np.ones(6)])) is None
        half = found([learned, learned, np.ones(6)])  # one pair agrees; two have nothing to agree on
    assert half.tau == pytest.approx(1 / 3)
    assert half.p < 0.02  # 1 / 720, by chance
    with pytest.raises(ValueError, match="not finite"):
        agreement(np.array([[1, 2], [1, math.nan]]))


@pytest.mark.parametrize(
    ("tau", "p", "words"),
    [
        (0.03, 0.41, "8 seeds do not agree on the order (mean Kendall τ 0.03, p 0.41)"),
        (-0.001, 0.5, "8 seeds do not agree on the order (mean Kendall τ 0.00, p 0.5)"),
        (-0.1, 0.9, "8 seeds do not agree on the order (mean Kendall τ −0.10, p 0.9)"),
        (0.2, 0.0005, "8 seeds agree only weakly on the order (mean Kendall τ 0.20, p 0.0005)"),
        (0.62, 1 / 2001, "8 seeds agree on the order (mean Kendall τ 0.62, p 0.0005)"),
        (1 / 3, 0.05, "8 seeds agree on the order (mean Kendall τ 0.33, p 0.05)"),
        (0.62, 0.051, "8 seeds may agree on the order (mean Kendall τ 0.62, p 0.051)"),
    ],
)
def test_in_words(tau, p, words):
    result = Agreement(tau, p, seeds=8, members=6)
    assert result.words() == words
    assert result.reproducible == words.startswith("8 seeds agree on the")


def test_on_partners_that_are_the_names_everything_is_as_by_name():
    weights = np.random.default_rng(3).normal(size=(5, 6)) + 0.3 * np.arange(6)
    names = dict.fromkeys(itertools.combinations(range(5), 2), tuple(range(6)))
    assert agreement(weights, names) == agreement(weights)
    tied = weights.round(0)
    assert agreement(tied, names) == agreement(tied)


def test_partners_undo_a_permutation_of_the_hyperedges():
    random = np.random.default_rng(8)
    learned, orders = random.normal(size=6), [random.permutation(6) for _ in range(4)]
    weights = np.stack([learned[order] for order in orders])  # hyperedge m of a seed is order[m]
    partners = {
        (s, t): np.argsort(orders[t])[orders[s]].tolist() for s, t in itertools.combinations(range(4), 2)
    }
    result = agreement(weights, partners)
    assert result is not None
    assert (result.tau, result.p) == (pytest.approx(1), 1 / 2001)
    assert found(weights).tau < 0.5


def test_p_on_partners_is_the_share_of_orders_that_agree_as_much():
    weights = np.array([[1, 2, 3], [1, 3, 2], [3, 1, 2]], float)
    partners = {(0, 1): [1, 2, 0], (0, 2): [2, 1, 0], (1, 2): [0, 1, 2]}  # not transitive

    def tau(rows) -> float:
        taus: list[Any] = [stats.kendalltau(rows[s], rows[t][to])[0] for (s, t), to in partners.items()]
        return float(np.mean(taus))

    orders = itertools.product(itertools.permutations(range(3)), repeat=3)
    shuffled = [tau([row[list(order)] for row, order in zip(weights, own, strict=True)]) for own in orders]
    expected = np.mean(np.array(shuffled) >= tau(weights) - 1e-9)
    result = agreement(weights, partners)
    assert result is not None
    assert result.tau == pytest.approx(tau(weights))
    assert result.p == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 2000))


@pytest.mark.parametrize("members", [6, pytest.param(70, marks=pytest.mark.slow)])
def test_p_on_partners_is_uniform_where_there_is_nothing(members, monkeypatch):
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    random = np.random.default_rng(5)
    p_values = []
    for _ in range(150):
        partners = {
            pair: random.permutation(members).tolist() for pair in itertools.combinations(range(4), 2)
        }
        result = agreement(random.normal(size=(4, members)), partners)
        assert result is not None
        p_values.append(result.p)
    assert 0.03 < np.mean(np.array(p_values) <= 0.1) < 0.18
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.1)
