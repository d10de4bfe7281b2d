"""How many paired seeds a family of comparisons needs before a sign-flip test can decide anything."""

from __future__ import annotations

import math

ALPHA = 0.05
"""The rate at which a family of comparisons may find a difference where there is none."""


def seeds_needed(comparisons: int) -> int:
    """Return the smallest n ≥ 1 + log₂(m / 0.05) for m ≥ 1 comparisons that share one error rate.

    With n paired seeds the two-sided p of a sign-flip test is 2 / 2ⁿ at least; by Holm or Bonferroni
    the smallest of m must be 0.05 / m at most. 6 seeds for one comparison, 7 for 3, 10 for 13 to 25.
    """
    return math.ceil(1 + math.log2(comparisons / ALPHA))
