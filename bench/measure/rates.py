"""Rates from raw step times: the one place that computes them. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def tokens_per_second(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Return Σ tokens / Σ seconds over timed steps; step k had ``tokens[k]`` and took ``seconds[k]``.

    Raises:
        ValueError: the two lists are not equally long, or no time has passed.
    """
    if len(tokens) != len(seconds):
        raise ValueError(f"tokens of {len(tokens)} steps, but seconds of {len(seconds)}: they are no pairs.")
    if sum(seconds) <= 0:
        raise ValueError(f"{len(seconds)} steps took {sum(seconds)} s; there is no rate.")
    return sum(tokens) / sum(seconds)


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours/theirs of each round of two things that were timed alternating."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def difference_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of ``ours`` minus the median of ``theirs``."""
    return statistics.median(ours) - statistics.median(theirs)


def utilisation(flops_per_second: float, matrix_flops_per_second: float) -> float:
    """Return the share of the matrix rate that a model's FLOPs reach: its MFU.

    The share can be over 1, if the timed products are not the fastest products of the machine.

    Source: Chowdhery et al., "PaLM", 2022, appendix B: FLOPs of the model, without recomputation.
    """
    return flops_per_second / matrix_flops_per_second


def over_the_rate(utilisation: float) -> str:
    """Return a remark on an MFU over 100%; an empty text for any other MFU."""
    if utilisation <= 1:
        return ""
    return (
        f"MFU {utilisation:.1%}: the steps did more FLOP/s than the matrix products they are held against, "
        "which are not the fastest ones here"
    )
