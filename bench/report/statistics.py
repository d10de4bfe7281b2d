"""Statistics: is a difference between couplers larger than the noise between seeds?

The quantity is the paired difference d = candidate − reference of a validation loss, one value per seed, in
nats per token: lower is better, and exp(d) is the ratio of the perplexities.

1. Intervals of a mean, the sign-flip test, Holm's correction.
2. Verdicts on differences and on hypotheses.
3. Evaluation noise: a bootstrap over articles.
4. Agreement: do the seeds learn the same hyperedge weights?

Letters: n seeds, m comparisons; A articles; S seeds, M members (hyperedges), R permutations.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import special, stats

from bench.report.quantities import Interval
from bench.study.hypotheses import ALPHA, seeds_needed

CONFIDENCE = 0.95
FLIPS = 100_000
"""Random flips of signs; 16 seeds have fewer flips in all, so their p is exact."""
AT_ONCE = 2**22
"""Numbers that a resampling holds at once: 32 MiB of float64."""


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

    It is only descriptive: with 5 to 10 values it contains the mean less often than its level states. None
    for fewer than two values. Source: Efron 1987, JASA 82.

    Raises:
        ValueError: a value is not finite.
    """
    sample_n = finite(values)
    if len(sample_n) < 2:
        return None
    low, width = float(sample_n.min()), float(np.ptp(sample_n))
    if width == 0:
        return low, low
    # Scaled to 0..1: the cubes of a spread as small as rounding errors would otherwise become NaN.
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

    p = #{s ∈ {−1, 1}ⁿ : |Σ sᵢ dᵢ| ≥ |Σ dᵢ|} / 2ⁿ. It is exact for up to 16 pairs, and never below 2 / 2ⁿ. For
    more pairs it comes from 100,000 random flips with a fixed seed. The only assumption is that without an
    effect −d is as likely as d. Sources: Fisher 1935, The Design of Experiments, §21; Phipson & Smyth 2010
    (random flips count the observed signs once).

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
        n_resamples=FLIPS,  # all flips, where there are fewer
        batch=max(1, AT_ONCE // differences_nm.size),
        random_state=np.random.default_rng(0),  # pyright: ignore[reportCallIssue]  (rng from scipy 1.15 on)
    )
    # Sums that are equal on paper differ by rounding; counting them as equal can only make p larger.
    tolerance = 1e-10 * np.abs(differences_nm).sum(axis=0)
    larger_m = (found.null_distribution >= found.statistic - tolerance).sum(axis=0)
    return larger_m / 2**n if 2**n <= FLIPS else (1 + larger_m) / (1 + FLIPS)


def _absolute_sum(values: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(values.sum(axis=axis))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in the order of ``p_values``.

    p̃₍ᵢ₎ = max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎). Rejecting where p̃ ≤ α makes a false finding in a
    family of m tests with probability α at most, however the tests depend on each other.
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
        ValueError: a value is not finite; NaN compares as false and would make p 0.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"a value is not finite: {array[~np.isfinite(array)][0]}.")
    return array


MINIMUM_EFFECT_NATS = 0.01
"""The smallest difference of interest, fixed before the runs: one percent of perplexity."""
POWER = 0.8
MAX_SEEDS = 9_999


@dataclass(frozen=True)
class Summary:
    """One quantity by seed: mean, standard deviation and 95% t interval."""

    values: dict[int, float]

    @property
    def n(self) -> int:
        """The number of seeds with a value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """The mean; None without a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def standard_deviation(self) -> float | None:
        """The sample's standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    @property
    def interval(self) -> Interval | None:
        """The 95% t interval of the mean; None for fewer than two seeds."""
        return t_interval(list(self.values.values()))


@dataclass(frozen=True)
class Paired:
    """The statistics of n paired differences, in the unit of the differences."""

    n: int
    mean: float
    standard_deviation: float | None
    """With n − 1 in the denominator. It and both intervals are None for one pair."""
    interval: Interval | None
    """Student's, 95%."""
    interval_90: Interval | None
    """Student's, 90%. Inside ±δ where two one-sided tests at 5% reject a difference of δ or more."""
    p: float
    """Sign-flip, two-sided, not adjusted."""


def paired(differences: np.ndarray | Sequence[float]) -> Paired:
    """Return the statistics of paired differences, one per seed.

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
    """The verdict on a candidate and its reference."""

    kind: Literal["better", "worse", "equivalent", "not resolved"]
    below_minimum: bool = False
    """Better or worse, but by less than the minimum effect of interest."""
    seeds: int | None = None
    """About how many seeds would resolve it; ``MAX_SEEDS`` + 1 means more.

    None where it is resolved, or where there is one seed, which has no spread.
    """

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

    1. Better or worse: the adjusted p ≤ 0.05 and the 95% interval does not contain 0.
    2. Equivalent: the 90% interval lies inside ±0.01 nats. These are two one-sided tests (Schuirmann 1987),
       each at 5%, not adjusted over the family.
    3. Not resolved: all else.
    """
    side = significant_side(paired, p_adjusted)
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


def significant_side(paired: Paired, p_adjusted: float) -> int:
    """Return the sign of the mean if the adjusted p and the interval both say that it is not 0, else 0."""
    if paired.interval is None or p_adjusted > ALPHA:
        return 0
    low, high = paired.interval
    return int(low > 0) - int(high < 0)


def _seeds_for(effect: float, deviation: float, comparisons: int, first: int) -> int:
    """Return the smallest n ≥ ``first`` that is enough for ``effect``; ``MAX_SEEDS`` + 1 if there is none."""
    counts = range(first, MAX_SEEDS + 1)
    enough = bisect.bisect_left(
        counts, True, key=lambda n: _power(n, effect, deviation, comparisons) >= POWER
    )
    return max(first, MAX_SEEDS + 1) if enough == len(counts) else counts[enough]


def _power(n: int, effect: float, deviation: float, comparisons: int) -> float:
    """Return the power of a two-sided paired t test of n seeds at level 0.05 / ``comparisons`` (Bonferroni).

    1 − F(t*; n − 1, δ√n / σ), where F is the noncentral t; the other tail is negligible. The sign-flip test
    has about this power once it has the seeds that its smallest p needs.
    """
    # At 30 the power is 1 for every number of seeds here; from 37 on scipy may return NaN.
    noncentrality = min(30.0, effect * math.sqrt(n) / deviation) if deviation > 0 else 30.0
    critical = special.stdtrit(n - 1, 1 - ALPHA / comparisons / 2)
    return float(1 - special.nctdtr(n - 1, noncentrality, critical))


def compare_family(differences: Sequence[np.ndarray]) -> list[tuple[Paired, float, Verdict]]:
    """Return the statistics, Holm-adjusted p and verdict of every comparison in a family.

    ``differences`` holds for each candidate (n,) candidate − reference in nats, one per seed that both ran; n
    may vary. A comparison of one seed has an adjusted p of 1 and does not count in the family.

    Raises:
        ValueError: a comparison has no differences, or a difference is not finite.
    """
    family = paired_family(differences)
    comparisons = sum(member.n > 1 for member, _ in family)
    return [(member, p, judge(member, p, comparisons)) for member, p in family]


@dataclass(frozen=True)
class Answer:
    """The answer of the runs to one hypothesis."""

    kind: Literal["supported", "refuted", "inconclusive"]
    paired: Paired
    """The statistics of the shifted differences."""
    p_adjusted: float


def answer_claims(shifted: Sequence[np.ndarray]) -> list[Answer]:
    """Return the answers to the hypotheses "a is better than b by at least a margin" of one file.

    ``shifted`` holds for each (n,) d + margin in nats, with d = a − b of a loss and margin ≥ 0; for "at least
    1% better" the margin is −ln 0.99. Supported: significantly below 0. Refuted: significantly above 0.
    Significant: adjusted p ≤ 0.05 (two-sided, Holm over the claims), and a 95% interval without 0.

    Raises:
        ValueError: as ``compare_family``.
    """
    kinds: dict[int, Literal["supported", "refuted", "inconclusive"]]
    kinds = {-1: "supported", 0: "inconclusive", 1: "refuted"}
    return [Answer(kinds[significant_side(member, p)], member, p) for member, p in paired_family(shifted)]


def paired_family(differences: Sequence[np.ndarray]) -> list[tuple[Paired, float]]:
    """Return each member's statistics and p by Holm; a member of one seed has p 1, outside the family."""
    samples = [finite(values) for values in differences]
    p_values = np.empty(len(samples))
    for n in {len(sample_n) for sample_n in samples}:
        members = [index for index, sample_n in enumerate(samples) if len(sample_n) == n]
        p_values[members] = sign_flip_ps(np.stack([samples[index] for index in members], axis=1))
    family = [_paired(sample_n, float(p)) for sample_n, p in zip(samples, p_values, strict=True)]
    adjusted = iter(holm([member.p for member in family if member.n > 1]))
    return [(member, next(adjusted) if member.n > 1 else 1.0) for member in family]


def article_interval(
    difference_nll_A: np.ndarray,
    tokens_A: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile bootstrap interval over articles of Σ difference / Σ tokens, in nats per token.

    Whole articles are drawn, since the tokens of an article depend on each other; so the mean is a ratio. The
    noise between seeds is not in it. None with fewer than two articles that have tokens.
    Source: Koehn 2004, EMNLP (paired bootstrap of two systems on one test set); Efron & Tibshirani 1993,
    chapter 13.

    Args:
        difference_nll_A: (A,) for each article, the sum over its tokens of the difference of two models'
            losses in nats (each model's loss is the mean over its seeds).
        tokens_A: (A,) the scored tokens of each article; articles without tokens are left out.
        confidence: The confidence of the interval.
        resamples: The number of draws of A articles.
        seed: The seed of the draws.

    Raises:
        ValueError: the two arrays differ in length, or a value is not finite.
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
        batch=max(1, AT_ONCE // int(scored.sum())),
        method="percentile",
        random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]  (rng from scipy 1.15 on)
    ).confidence_interval
    return float(found.low), float(found.high)


def _ratio(difference_nll: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return difference_nll.sum(axis=axis) / tokens.sum(axis=axis)


SUBSTANTIAL_TAU = 1 / 3
PERMUTATIONS = 2_000
MAX_KENDALL_MEMBERS = 64
RANKS_AT_ONCE = 2**20  # 8 MiB of float64


@dataclass(frozen=True)
class Agreement:
    """How far the seeds of a configuration agree on the order of their hyperedges by weight."""

    tau: float
    """Mean Kendall τ-b over the pairs of seeds; 0 for a pair with a seed whose weights are all equal."""
    p: float
    """One-sided p of such an agreement if each seed orders the hyperedges at random."""
    seeds: int
    members: int

    @property
    def reproducible(self) -> bool:
        """Whether the order is significant (p ≤ 0.05) and large enough to be read (τ ≥ 1/3).

        Two seeds order a pair of hyperedges alike with probability (1 + τ) / 2: at τ = 1/3 twice as often as
        not. With many seeds or hyperedges a much smaller τ is significant, but it says almost nothing about
        the weights of one seed.
        """
        return self.p <= ALPHA and self.tau >= SUBSTANTIAL_TAU

    def words(self) -> str:
        """Return whether the seeds agree on the order of the hyperedges, in words."""
        if self.reproducible:
            verdict = "agree"
        elif self.tau >= SUBSTANTIAL_TAU:
            verdict = "may agree"  # too few seeds or hyperedges
        else:
            verdict = "agree only weakly" if self.p <= ALPHA else "do not agree"
        tau = f"{self.tau:z.2f}".replace("-", "−")
        return f"{self.seeds} seeds {verdict} on the order (mean Kendall τ {tau}, p {self.p:.2g})"


Partners = Mapping[tuple[int, int], Sequence[int]]
"""For each two seeds, by their places s < t: the hyperedge of t that corresponds to each hyperedge of s."""


def agreement(weights_SM: np.ndarray, partners: Partners | None = None) -> Agreement | None:
    """Return how far S seeds agree on the order of M hyperedge weights.

    Without ``partners`` the hyperedges of two seeds correspond if they have the same name.

    τ-b of two seeds is (concordant − discordant pairs of hyperedges) / √(untied pairs of the first · of the
    second). p comes from 2,000 permutations with a fixed seed, which shuffle each seed's weights
    independently; the observed order counts once. ``partners`` stay as they are, since they do not depend on
    the weights. Above 64 hyperedges p is Friedman's χ² approximation, whose cost does not grow with the
    square of M. It tests the mean rank correlation, or Kendall's W. With ``partners`` the permutations test
    the mean rank correlation.

    None for fewer than two seeds or hyperedges, and where fewer than two seeds have weights that differ.
    Source: Kendall 1945, Biometrika 33 (τ-b); Friedman 1937; Kendall & Babington Smith 1939 (W).

    Raises:
        ValueError: a weight is not finite.
    """
    weights_SM = finite(weights_SM)
    if (weights_SM != weights_SM[:, :1]).any(axis=1).sum() < 2:
        return None
    seeds, members = weights_SM.shape
    many = members > MAX_KENDALL_MEMBERS
    taus = [
        stats.kendalltau(
            weights_SM[s],
            weights_SM[t] if partners is None else weights_SM[t][list(partners[s, t])],
            method="asymptotic" if many else "auto",  # for its p, which is not used
        )[0]
        for s, t in combinations(range(seeds), 2)
    ]
    tau = float(np.nan_to_num(taus).mean())  # NaN: a seed whose weights are all equal
    if partners is not None:
        p = _permutation_p(weights_SM, partial(_matched, partners=partners, by_rank=many))
    else:
        p = float(stats.friedmanchisquare(*weights_SM.T)[1]) if many else _permutation_p(weights_SM, _kendall)
    return Agreement(tau, p, seeds, members)


def _permutation_p(weights_SM: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return p of the mean correlation over the pairs of seeds, (1 + #{shuffled ≥ observed}) / (1 + R).

    ``statistic`` grows with the mean correlation, from ranks (S, M, R) to (R,).
    """
    random = np.random.default_rng(0)
    ranks_SM1 = stats.rankdata(weights_SM, axis=1)[:, :, None]
    observed = statistic(ranks_SM1)[0]
    at_once = max(1, RANKS_AT_ONCE // weights_SM.size)
    larger, tolerance = 0, 1e-9 * len(weights_SM) ** 2  # equal values differ by rounding
    for start in range(0, PERMUTATIONS, at_once):
        copies = min(at_once, PERMUTATIONS - start)
        shuffled_SMR = random.permuted(np.repeat(ranks_SM1, copies, axis=2), axis=1)
        larger += int((statistic(shuffled_SMR) >= observed - tolerance).sum())
    return (1 + larger) / (1 + PERMUTATIONS)


def _kendall(ranks_SMR: np.ndarray) -> np.ndarray:
    """Return ‖Σ over seeds of u‖², (R,), with u the signs of the M(M − 1) / 2 differences: u·v is τ-b.

    The mean of u·v over the pairs of seeds grows with it, so no loop over the pairs is needed.
    """
    scale_S = _kendall_scale(ranks_SMR)
    concordance_R = np.zeros(ranks_SMR.shape[2])
    for member in range(ranks_SMR.shape[1] - 1):  # one at a time fits in the cache
        total = sum(
            scale * np.sign(ranks_MR[member] - ranks_MR[member + 1 :])
            for scale, ranks_MR in zip(scale_S, ranks_SMR, strict=True)
        )
        concordance_R += np.square(total).sum(axis=0)
    return concordance_R


def _kendall_scale(ranks_SMR: np.ndarray) -> np.ndarray:
    """Return 1 / √(untied pairs of hyperedges) of each seed (S,); 0 where all weights are equal."""
    first_SM = ranks_SMR[:, :, 0]  # a shuffle changes no norm
    untied_S = (first_SM[:, :, None] != first_SM[:, None, :]).sum(axis=(1, 2)) / 2
    return 1 / np.sqrt(np.where(untied_S > 0, untied_S, np.inf))


def _matched(ranks_SMR: np.ndarray, partners: Partners, by_rank: bool) -> np.ndarray:
    """Return 2 Σ over the pairs of seeds of τ-b, (R,), on hyperedges that correspond by ``partners``.

    ``by_rank``: of the rank correlation in place of τ-b, whose cost grows with the square of M.
    """
    total_R = np.zeros(ranks_SMR.shape[2])
    if by_rank:
        units_SMR = ranks_SMR - ranks_SMR.mean(axis=1, keepdims=True)
        norms_SR = np.linalg.norm(units_SMR, axis=1)
        units_SMR /= np.where(norms_SR > 0, norms_SR, np.inf)[:, None]
        for (s, t), partner in partners.items():
            total_R += 2 * (units_SMR[s] * units_SMR[t][list(partner)]).sum(axis=0)
        return total_R
    scale_S = _kendall_scale(ranks_SMR)
    for (s, t), partner in partners.items():
        one_MR, other_MR = ranks_SMR[s], ranks_SMR[t][list(partner)]
        for member in range(len(one_MR) - 1):
            alike = np.sign(one_MR[member] - one_MR[member + 1 :])
            alike *= np.sign(other_MR[member] - other_MR[member + 1 :])
            total_R += 2 * scale_S[s] * scale_S[t] * alike.sum(axis=0)
    return total_R
