"""The bootstrap over articles: against its asymptotic error, its own definition, and what it is not."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from bench.report import statistics
from bench.report.statistics import article_interval


def noisy_articles(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return differences and tokens of articles of very different lengths, whose rates differ by article."""
    random = np.random.default_rng(2)
    tokens = random.integers(50, 5000, size=count)
    return tokens * random.normal(-0.02, 0.05, size=count), tokens


def test_the_interval_has_the_width_of_a_ratio_estimator():
    """The delta method: the variance of Σd / Σt is Σ(d − r t)² / (Σt)². A mean of ratios has another."""
    difference, tokens = noisy_articles(400)
    ratio = difference.sum() / tokens.sum()
    error = math.sqrt(((difference - ratio * tokens) ** 2).sum()) / tokens.sum()
    low, high = article_interval(difference, tokens, resamples=20_000) or (0, 0)
    assert (low - ratio) / error == pytest.approx(-1.96, abs=0.1)
    assert (high - ratio) / error == pytest.approx(1.96, abs=0.1)
    per_article = (difference / tokens).std() / 20
    assert abs(error / per_article - 1) > 0.1  # so a mean of ratios would be seen
    narrow = article_interval(difference, tokens, confidence=0.5) or (0, 0)
    assert (narrow[1] - ratio) / error == pytest.approx(0.674, abs=0.12)


def test_two_articles_by_hand():
    """Drawn: both the first (1/4), one of each (1/2), both the second (1/4)."""
    difference, tokens = np.array([3.0, -1.0]), np.array([10, 90])
    assert article_interval(difference, tokens) == pytest.approx((-1 / 90, 0.3))
    assert article_interval(difference, tokens, confidence=0.4) == pytest.approx((0.02, 0.02))


def test_an_article_brings_its_own_tokens():
    """Where every token differs by the same, the draws cannot matter, however long the articles are."""
    tokens = np.array([1, 10, 100, 1000])
    assert article_interval(0.03 * tokens, tokens) == pytest.approx((0.03, 0.03), rel=1e-12)


def test_an_article_without_tokens_changes_nothing():
    difference, tokens = noisy_articles(20)
    padded = article_interval(np.r_[0.0, difference, 0.0], np.r_[0, tokens, 0])
    assert padded == article_interval(difference, tokens)


def test_it_is_repeatable_and_stays_in_memory(monkeypatch):
    difference, tokens = noisy_articles(30)
    found = article_interval(difference, tokens)
    assert found == article_interval(difference, tokens)
    assert found != article_interval(difference, tokens, seed=1)
    monkeypatch.setattr(statistics, "AT_ONCE", 1000)
    low, high = article_interval(difference, tokens) or (0, 0)
    assert (low, high) == pytest.approx(found, abs=0.1 * (high - low))


@pytest.mark.parametrize(("difference", "tokens"), [([], []), ([0.1], [7]), ([0.1, 0, 0], [7, 0, 0])])
def test_one_article_shows_no_noise(difference, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert article_interval(np.array(difference), np.array(tokens)) is None


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) differences of articles, but \(2,\) lengths"):
        article_interval(np.zeros(3), np.ones(2))
    with pytest.raises(ValueError, match="not finite"):
        article_interval(np.array([0.1, math.nan]), np.ones(2))
