"""Intervals of a mean, the sign-flip test, and Holm's adjustment. Letters: n seeds, m comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from bench.analysis.numbers import Interval

CONFIDENCE = 0.95
FLIPS = 100_000  # all of 16 seeds' signs are fewer
FLIPPED_AT_ONCE = 2**22  # differences; 32 MiB of float64


def t_interval(values: np.ndarray | Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return Student's interval of the mean, x̄ ± t₍₁₊c₎⸝₂,ₙ₋₁ · s / √n, in the unit of the values.

    None for fewer than two values, which have no spread. Source: "Student" 1908, Biometrika 6.

    Raises:
        ValueError: a value is not finite.
    """
    sample_n = finite(values)
    n = len(sample_n)
    if n < 2:
        return None
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2) * sample_n.std(ddof=1) / math.sqrt(n))
    mean = float(sample_n.mean())
    return mean - half, mean + half


def bca_interval(
    values: np.ndarray | Sequence[float],
    confidence: float = CONFIDENCE,
    resamples: int = 9_999,
    seed: int = 0,
) -> Interval | None:
    """Return the bias-corrected and accelerated bootstrap interval of the mean, in the unit of the values.

    It describes and decides nothing: of 5 to 10 values it covers less than it says. None for fewer than
    two values. Source: Efron 1987, JASA 82.

    Raises:
        ValueError: a value is not finite.
    """
    sample_n = finite(values)
    if len(sample_n) < 2:
        return None
    low, width = float(sample_n.min()), float(np.ptp(sample_n))
    if width == 0:
        return low, low
    # Scaled to 0..1, so that the cubes of a spread of the size of rounding errors do not vanish into NaN.
    found = stats.bootstrap(
        ((sample_n - low) / width,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]  (rng from scipy 1.15 on)
    ).confidence_interval
    return low + width * float(found.low), low + width * float(found.high)


def sign_flip_p(differences: np.ndarray | Sequence[float]) -> float:
    """Return the two-sided p of the mean difference of n pairs under flips of their signs.

    p = #{s ∈ {−1, 1}ⁿ : |Σ sᵢ dᵢ| ≥ |Σ dᵢ|} / 2ⁿ, exact up to 16 pairs and never below 2 / 2ⁿ; above
    that, from 100,000 random flips with a fixed seed. Assumes no more than that without an effect each
    difference is as likely to be −d as d. Source: Fisher 1935, The Design of Experiments, §21; the
    random flips count the observed signs once: Phipson & Smyth 2010.

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    return float(sign_flip_ps(finite(differences)[:, None])[0])


def sign_flip_ps(differences_nm: np.ndarray) -> np.ndarray:
    """Return ``sign_flip_p`` of every column of (n, m) differences, as (m,).

    Raises:
        ValueError: as ``sign_flip_p``.
    """
    differences_nm = finite(differences_nm)
    n, m = differences_nm.shape
    if n == 0:
        raise ValueError("there are no differences to test; a comparison needs a seed that both sides ran.")
    if n == 1 or m == 0:
        return np.ones(m)
    found = stats.permutation_test(
        (differences_nm,),
        _absolute_sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,  # all of them, where there are no more
        batch=max(1, FLIPPED_AT_ONCE // differences_nm.size),
        random_state=np.random.default_rng(0),  # pyright: ignore[reportCallIssue]  (rng from scipy 1.15 on)
    )
    # Sums that are equal on paper differ by rounding; taking them for equal errs towards a larger p.
    tolerance = 1e-10 * np.abs(differences_nm).sum(axis=0)
    larger_m = (found.null_distribution >= found.statistic - tolerance).sum(axis=0)
    return larger_m / 2**n if 2**n <= FLIPS else (1 + larger_m) / (1 + FLIPS)


def _absolute_sum(values: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(values.sum(axis=axis))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in the order of ``p_values``.

    p̃₍ᵢ₎ = max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎): rejecting where p̃ ≤ α finds anything false in
    a family of m with a probability of α at most, however the tests depend on each other.
    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    m, largest = len(p_values), 0.0
    adjusted = [0.0] * m
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return the values as float64.

    Raises:
        ValueError: one is not finite; NaN would be larger than nothing, and make a p of 0.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"a value is not finite: {array[~np.isfinite(array)][0]}.")
    return array
