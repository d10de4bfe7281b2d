"""How large a difference is, each output coordinate by its own measure.

A coordinate that is small beside the others counts as much as they do, so that nothing hides behind
large ones. Shapes: D width; the output's coordinates are the last axis, of Jacobians the last but one.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-14  # of the largest coordinate: a small one may be a difference of numbers of that size


def deviation(gap: Tensor, size: Tensor, beside: Tensor | None = None) -> float:
    """Return the largest ``gap`` over the largest ``size`` of the same coordinate, all (…, D).

    A gap that may be rounding, of the largest of all sizes or of ``beside``, is over that instead.
    """
    gap_D, size_D = (x.abs().flatten(0, -2).amax(0) for x in (gap, size))
    largest = size_D.max() if beside is None else torch.maximum(size_D.max(), beside.abs().max())
    size_D = torch.where(gap_D > ROUNDING * largest, size_D, largest)
    return float((gap_D / size_D.clamp_min(torch.finfo(size_D.dtype).tiny)).max())


def largest_entries(J: Tensor) -> Tensor:
    """Return the largest entry of each output coordinate of Jacobians (…, D, D) as a column (D, 1).

    One that may be rounding only, beside the largest, counts as that. Divided by them, Jacobians that are
    multiples of each other stay so.
    """
    size_D = J.abs().amax(-1).flatten(0, -2).amax(0)
    size_D = torch.where(size_D > ROUNDING * size_D.max(), size_D, size_D.max())
    return torch.where(size_D > 0, size_D, 1.0)[:, None]


def spread(values: Tensor) -> Tensor:
    """Return the differences between the largest and the smallest along the first axis."""
    return values.amax(0) - values.amin(0)
