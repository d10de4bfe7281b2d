"""Do seeds learn the same hyperedge weights? Letters: S seeds, M members (hyperedges), R permutations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from bench.analysis.significance import finite
from bench.study.hypotheses import ALPHA

SUBSTANTIAL_TAU = 1 / 3
PERMUTATIONS = 2_000
MAX_KENDALL_MEMBERS = 64
RANKS_AT_ONCE = 2**20  # 8 MiB of float64


@dataclass(frozen=True)
class Agreement:
    """How alike the seeds of a configuration order their hyperedges by weight."""

    tau: float
    """Mean Kendall τ-b over the pairs of seeds; with a seed whose weights are all equal it counts as 0."""
    pairs: int
    p: float
    """Of so large an agreement, one-sided, where each seed orders the hyperedges at random."""
    seeds: int
    members: int

    @property
    def reproducible(self) -> bool:
        """Whether the order is shown to be there (p ≤ 0.05) and is worth reading (τ ≥ 1/3).

        Two seeds order a pair of hyperedges alike with probability (1 + τ) / 2: at τ = 1/3 twice as often as
        not. Many seeds or hyperedges make a much smaller τ significant, of which a reader of the weights of
        one seed learns next to nothing.
        """
        return self.p <= ALPHA and self.tau >= SUBSTANTIAL_TAU

    def words(self) -> str:
        """Return what a figure's caption says."""
        if self.reproducible:
            verdict = "reproducible"
        elif self.tau >= SUBSTANTIAL_TAU:
            verdict = "undecided"  # too few seeds or hyperedges to tell it from chance
        else:
            verdict = "weakly reproducible" if self.p <= ALPHA else "not reproducible"
        pairs = f"{self.pairs} pair{'s' if self.pairs > 1 else ''} of seeds"
        tau = f"{self.tau:z.2f}".replace("-", "−")
        return f"{verdict}: Kendall τ {tau} over {pairs} (p {self.p:.2g})"


def agreement(weights_SM: np.ndarray) -> Agreement | None:
    """Return how far S seeds agree on the order of M hyperedge weights, named alike in every seed.

    τ-b of two seeds is (concordant − discordant pairs of hyperedges) / √(pairs untied in the one · in the
    other); p comes from 2,000 seeded permutations, each seed's weights shuffled independently, the observed
    counted once. Above 64 hyperedges p is Friedman's χ² approximation, which is good for so many: a test of
    the mean rank correlation, or of Kendall's W, whose cost does not grow with the square of M.

    None for fewer than two seeds or hyperedges, and where no two seeds have weights that differ.
    Source: Kendall 1945, Biometrika 33 (τ-b); Friedman 1937; Kendall & Babington Smith 1939 (W).

    Raises:
        ValueError: a weight is not finite.
    """
    weights_SM = finite(weights_SM)
    if (weights_SM != weights_SM[:, :1]).any(axis=1).sum() < 2:
        return None
    seeds, members = weights_SM.shape
    pairs = list(combinations(weights_SM, 2))
    method = "auto" if members <= MAX_KENDALL_MEMBERS else "asymptotic"  # of its p, which is not used
    taus = [stats.kendalltau(one, other, method=method)[0] for one, other in pairs]
    tau = float(np.nan_to_num(taus).mean())  # NaN: a seed without an order agrees with none
    many = members > MAX_KENDALL_MEMBERS
    p = float(stats.friedmanchisquare(*weights_SM.T)[1]) if many else _permutation_p(weights_SM)
    return Agreement(tau, len(pairs), p, seeds, members)


def _permutation_p(weights_SM: np.ndarray) -> float:
    """Return p of the mean correlation over the pairs of seeds, (1 + #{shuffled ≥ observed}) / (1 + R).

    With a unit vector u per seed whose inner products are the correlations, their mean over the pairs of
    seeds grows with ‖Σ u‖², so no pair of seeds is ever looked at.
    """
    random = np.random.default_rng(0)
    ranks_SM1 = stats.rankdata(weights_SM, axis=1)[:, :, None]
    observed = _kendall(ranks_SM1)[0]
    at_once = max(1, RANKS_AT_ONCE // weights_SM.size)
    larger, tolerance = 0, 1e-9 * len(weights_SM) ** 2  # equal on paper differs by rounding
    for start in range(0, PERMUTATIONS, at_once):
        copies = min(at_once, PERMUTATIONS - start)
        shuffled_SMR = random.permuted(np.repeat(ranks_SM1, copies, axis=2), axis=1)
        larger += int((_kendall(shuffled_SMR) >= observed - tolerance).sum())
    return (1 + larger) / (1 + PERMUTATIONS)


def _kendall(ranks_SMR: np.ndarray) -> np.ndarray:
    """Return ‖Σ over seeds of u‖², (R,), with u the signs of the M(M − 1) / 2 differences: u·v is τ-b."""
    first_SM = ranks_SMR[:, :, 0]  # a shuffle changes no norm
    untied_S = (first_SM[:, :, None] != first_SM[:, None, :]).sum(axis=(1, 2)) / 2
    scale_S = 1 / np.sqrt(np.where(untied_S > 0, untied_S, np.inf))
    concordance_R = np.zeros(ranks_SMR.shape[2])
    for member in range(ranks_SMR.shape[1] - 1):  # one at a time stays in the cache
        total = sum(
            scale * np.sign(ranks_MR[member] - ranks_MR[member + 1 :])
            for scale, ranks_MR in zip(scale_S, ranks_SMR, strict=True)
        )
        concordance_R += np.square(total).sum(axis=0)
    return concordance_R
