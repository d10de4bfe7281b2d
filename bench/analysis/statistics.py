"""Is a difference between couplers larger than the noise between seeds?

The quantity is the paired difference d = candidate − reference of a validation loss, one value a seed, in
nats a token: lower is better, and exp(d) is the ratio of the perplexities.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from bench.analysis.significance import (
    CONFIDENCE,
    Interval,
    bca_interval,
    finite,
    holm,
    sign_flip_p,
    sign_flip_ps,
    t_interval,
)
from bench.study.hypotheses import ALPHA, seeds_needed

__all__ = [
    "CONFIDENCE",
    "MINIMUM_EFFECT_NATS",
    "Answer",
    "Paired",
    "Verdict",
    "answer_claims",
    "bca_interval",
    "compare_family",
    "holm",
    "judge",
    "paired",
    "sign_flip_p",
    "sign_flip_ps",
    "t_interval",
]

MINIMUM_EFFECT_NATS = 0.01
"""The smallest difference of interest, fixed before the runs: one percent of perplexity."""
POWER = 0.8
MAX_SEEDS = 9_999


@dataclass(frozen=True)
class Paired:
    """What n paired differences say about their mean, in the differences' unit."""

    n: int
    mean: float
    standard_deviation: float | None
    """With n − 1 in the denominator; this and both intervals are None for one pair."""
    interval: Interval | None
    """Student's, 95 %."""
    interval_90: Interval | None
    """Student's, 90 %: inside ±δ where two one-sided tests at 5 % reject a difference of δ or more."""
    p: float
    """Sign-flip, two-sided, not adjusted."""


def paired(differences: np.ndarray | Sequence[float]) -> Paired:
    """Return the statistics of paired differences, one a seed.

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    return _paired(finite(differences), sign_flip_p(differences))


def _paired(differences_n: np.ndarray, p: float) -> Paired:
    n = len(differences_n)
    deviation = float(differences_n.std(ddof=1)) if n > 1 else None
    intervals = t_interval(differences_n), t_interval(differences_n, 1 - 2 * ALPHA)
    return Paired(n, float(differences_n.mean()), deviation, *intervals, p)


@dataclass(frozen=True)
class Verdict:
    """What may be said about a candidate and its reference."""

    kind: Literal["better", "worse", "equivalent", "not resolved"]
    below_minimum: bool = False
    """Better or worse, but by less than the minimum effect of interest."""
    seeds: int | None = None
    """About how many seeds would resolve it: None where it is resolved, or where one seed shows no spread;
    ``MAX_SEEDS`` + 1 stands for more."""

    def words(self) -> str:
        """Return the verdict as a table shows it."""
        if self.kind != "not resolved":
            return f"{self.kind} (below the minimum effect)" if self.below_minimum else self.kind
        if self.seeds is None:
            return "not resolved (one seed decides nothing)"
        about = f"about {self.seeds:,}" if self.seeds <= MAX_SEEDS else f"more than {MAX_SEEDS:,}"
        return f"not resolved (needs {about} seeds)"


def judge(paired: Paired, p_adjusted: float, comparisons: int) -> Verdict:
    """Return the verdict on candidate − reference of a loss in nats, one of ``comparisons`` in a family.

    In this order: better or worse where the adjusted p ≤ 0.05 and the 95 % interval is off 0; equivalent
    where the 90 % interval lies inside ±0.01 nats (two one-sided tests: Schuirmann 1987; each at 5 %, not
    adjusted over the family); else not resolved.
    """
    side = _significant_side(paired, p_adjusted)
    if side:
        return Verdict("worse" if side > 0 else "better", abs(paired.mean) < MINIMUM_EFFECT_NATS)
    if paired.interval_90 is None or paired.standard_deviation is None:
        return Verdict("not resolved")
    low, high = paired.interval_90
    if low > -MINIMUM_EFFECT_NATS and high < MINIMUM_EFFECT_NATS:
        return Verdict("equivalent")
    effect = max(abs(paired.mean), MINIMUM_EFFECT_NATS)
    first = max(paired.n + 1, seeds_needed(comparisons))
    return Verdict("not resolved", seeds=_seeds_for(effect, paired.standard_deviation, comparisons, first))


def _significant_side(paired: Paired, p_adjusted: float) -> int:
    """Return the sign of the mean where adjusted p and interval both say it is not 0, else 0."""
    if paired.interval is None or p_adjusted > ALPHA:
        return 0
    low, high = paired.interval
    return int(low > 0) - int(high < 0)


def _seeds_for(effect: float, deviation: float, comparisons: int, first: int) -> int:
    """Return the smallest n from ``first`` on that is enough for ``effect``; ``MAX_SEEDS`` + 1 for none."""
    counts = range(first, MAX_SEEDS + 1)
    enough = bisect.bisect_left(
        counts, True, key=lambda n: _power(n, effect, deviation, comparisons) >= POWER
    )
    return max(first, MAX_SEEDS + 1) if enough == len(counts) else counts[enough]


def _power(n: int, effect: float, deviation: float, comparisons: int) -> float:
    """Return the power of a two-sided paired t test of n seeds at level 0.05 / ``comparisons`` (Bonferroni).

    1 − F(t*; n − 1, δ√n / σ) with F of the noncentral t; the other tail is too small to count. The sign-flip
    test has about this power once it has the seeds that its smallest p asks for.
    """
    # At 30 the power is 1 for any number of seeds that is asked about; from 37 on scipy may return NaN.
    noncentrality = min(30.0, effect * math.sqrt(n) / deviation) if deviation > 0 else 30.0
    critical = special.stdtrit(n - 1, 1 - ALPHA / comparisons / 2)
    return float(1 - special.nctdtr(n - 1, noncentrality, critical))


def compare_family(differences: Sequence[np.ndarray]) -> list[tuple[Paired, float, Verdict]]:
    """Return the statistics, Holm-adjusted p and verdict of every comparison in a family.

    ``differences``: of each candidate, (n,) candidate − reference in nats, one a seed that both ran; n may
    vary. A comparison of one seed has an adjusted p of 1 and does not count into the family.

    Raises:
        ValueError: a comparison has no differences, or one that is not finite.
    """
    family, adjusted = _family(differences)
    comparisons = sum(member.n > 1 for member in family)
    return [(member, p, judge(member, p, comparisons)) for member, p in zip(family, adjusted, strict=True)]


@dataclass(frozen=True)
class Answer:
    """What the runs say about one hypothesis."""

    kind: Literal["supported", "refuted", "inconclusive"]
    paired: Paired
    """Of the shifted differences."""
    p_adjusted: float


def answer_claims(shifted: Sequence[np.ndarray]) -> list[Answer]:
    """Return the answers to the hypotheses "a is better than b by at least a margin" of one file.

    ``shifted``: of each, (n,) d + margin in nats, with d = a − b of a loss and margin ≥ 0; for "at least
    1 % better" the margin is −ln 0.99. Supported where it is significantly below 0, refuted where above:
    adjusted p ≤ 0.05 (two-sided, Holm over the claims) and 95 % interval off 0.

    Raises:
        ValueError: as ``compare_family``.
    """
    kinds: dict[int, Literal["supported", "refuted", "inconclusive"]]
    kinds = {-1: "supported", 0: "inconclusive", 1: "refuted"}
    family, adjusted = _family(shifted)
    return [
        Answer(kinds[_significant_side(member, p)], member, p)
        for member, p in zip(family, adjusted, strict=True)
    ]


def _family(differences: Sequence[np.ndarray]) -> tuple[list[Paired], list[float]]:
    """Return each member's statistics and its p, adjusted over those with a spread, and 1 without."""
    samples = [finite(values) for values in differences]
    p_values = np.empty(len(samples))
    for n in {len(sample_n) for sample_n in samples}:
        members = [index for index, sample_n in enumerate(samples) if len(sample_n) == n]
        p_values[members] = sign_flip_ps(np.stack([samples[index] for index in members], axis=1))
    family = [_paired(sample_n, float(p)) for sample_n, p in zip(samples, p_values, strict=True)]
    adjusted = iter(holm([member.p for member in family if member.n > 1]))
    return family, [next(adjusted) if member.n > 1 else 1.0 for member in family]
