"""Evaluation noise: how far a difference of two losses depends on which articles were evaluated."""

from __future__ import annotations

import numpy as np
from scipy import stats

from bench.analysis.significance import CONFIDENCE, Interval, finite

RESAMPLED_AT_ONCE = 2**22  # articles drawn; 32 MiB of float64


def article_interval(
    difference_nll_A: np.ndarray,
    tokens_A: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile bootstrap interval over articles of Σ difference / Σ tokens, in nats per token.

    Whole articles are drawn, since the tokens of one are alike; each brings its tokens, and the mean is a
    ratio. It leaves out the noise between seeds. None with fewer than two articles that have tokens.
    Source: Koehn 2004, EMNLP (paired bootstrap of two systems on one test set); Efron & Tibshirani 1993,
    chapter 13.

    Args:
        difference_nll_A: (A,) of each article, the sum over its tokens of the difference in nats of two
            models' losses (each the mean over its seeds, where it has several).
        tokens_A: (A,) the tokens scored in each; an article without any is left out.
        confidence: Of the interval.
        resamples: How many times A articles are drawn.
        seed: Of the draws.

    Raises:
        ValueError: the two differ in length, or a value is not finite.
    """
    difference_nll_A, tokens_A = finite(difference_nll_A), finite(tokens_A)
    if difference_nll_A.shape != tokens_A.shape:
        raise ValueError(f"{difference_nll_A.shape} differences of articles, but {tokens_A.shape} lengths.")
    scored = tokens_A > 0
    if scored.sum() < 2:
        return None
    found = stats.bootstrap(
        (difference_nll_A[scored], tokens_A[scored]),
        _ratio,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, RESAMPLED_AT_ONCE // int(scored.sum())),
        method="percentile",
        random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]  (rng from scipy 1.15 on)
    ).confidence_interval
    return float(found.low), float(found.high)


def _ratio(difference_nll: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return difference_nll.sum(axis=axis) / tokens.sum(axis=axis)
