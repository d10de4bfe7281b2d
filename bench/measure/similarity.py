"""How alike the experts of a layer are, and which experts of two seeds correspond.

``debiased_cka`` and ``hsic`` take arrays of torch or of numpy. The matching needs numpy and scipy alone, so
reports compute it without torch. Letters: N tokens, E experts, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from bench.record import FEATURE_BYTES

Array = Any
"""A tensor of torch or an array of numpy; a function returns the kind that it was given."""
TOKENS_PER_DIMENSION = 4
PROJECTION_SEED = 20_260_407


def hsic(x_ND: Array, y_ND: Array) -> Array:
    """Return the unbiased estimate of HSIC of two sets of features with linear kernels, a scalar.

    .. math:: \\frac{1}{N (N - 3)} \\Big[\\mathrm{tr}(\\tilde K \\tilde L)
              + \\frac{1^T \\tilde K 1 \\; 1^T \\tilde L 1}{(N - 1)(N - 2)}
              - \\frac{2}{N - 2} 1^T \\tilde K \\tilde L 1\\Big]

    with K = X Xᵀ and L = Y Yᵀ whose diagonals are set to 0. No matrix of N × N is made.

    Source: Song et al., "Feature selection via dependence maximization", 2012, equation 5.
    """
    N = len(x_ND)
    x_N, y_N = (x_ND * x_ND).sum(1), (y_ND * y_ND).sum(1)  # the diagonals of K and L
    rows_x_N, rows_y_N = x_ND @ x_ND.sum(0) - x_N, y_ND @ y_ND.sum(0) - y_N
    trace = ((x_ND.T @ y_ND) ** 2).sum() - (x_N * y_N).sum()
    sums = rows_x_N.sum() * rows_y_N.sum() / ((N - 1) * (N - 2))
    return (trace + sums - 2 / (N - 2) * (rows_x_N * rows_y_N).sum()) / (N * (N - 3))


def debiased_cka(x: list[Array], y: list[Array]) -> list[list[float]]:
    """Return the debiased linear CKA of each of ``x`` with each of ``y``, all (N, D) and centred over N.

    It is HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) from the unbiased estimates: about 0 for independent features
    (plain CKA of two random 256 × 256 matrices is 0.51), and 1 for features that differ by a rotation and a
    scale. It is 0 where one of the two shows no structure at all.

    Source: Kornblith et al., 2019 (arXiv:1905.00414); unbiased in Nguyen, Raghu and Kornblith, 2021
    (arXiv:2010.15327).
    """
    same = x is y
    own_x = [float(hsic(one, one)) for one in x]
    own_y = own_x if same else [float(hsic(one, one)) for one in y]
    found = [[0.0] * len(y) for _ in x]
    for i, one in enumerate(x):
        for j, other in enumerate(y):
            if same and j < i:
                found[i][j] = found[j][i]
            elif own_x[i] > 0 and own_y[j] > 0:
                both = own_x[i] if same and i == j else float(hsic(one, other))
                found[i][j] = both / math.sqrt(own_x[i] * own_y[j])
    return found


def matched(similarity_EE: np.ndarray) -> tuple[int, ...]:
    """Return for each expert (row) the expert of the other run (column) that corresponds to it.

    The permutation has the largest total similarity (the Hungarian algorithm).
    """
    rows, columns = linear_sum_assignment(similarity_EE, maximize=True)
    return tuple(int(column) for _, column in sorted(zip(rows, columns, strict=True)))


def feature_shape(experts: int, tokens: int, width: int) -> tuple[int, int]:
    """Return how many tokens and dimensions of each expert are kept, for ``experts`` of all layers.

    As many as ``FEATURE_BYTES`` hold in half precision, with about four tokens per dimension.
    """
    numbers = FEATURE_BYTES // (2 * experts)
    kept = max(1, min(width, math.isqrt(numbers // TOKENS_PER_DIMENSION)))
    return min(tokens, numbers // kept), kept


def projection(width: int, kept: int) -> np.ndarray | None:
    """Return the random projection (``width``, ``kept``) that all runs share; None where none is needed.

    Its entries are drawn from N(0, 1 / kept), so that inner products keep their expectation.
    """
    if kept == width:
        return None
    drawn = np.random.default_rng(PROJECTION_SEED).standard_normal((width, kept))
    return (drawn / math.sqrt(kept)).astype(np.float32)
