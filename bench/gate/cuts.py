"""Where the inputs of a batch are replaced, so that no loss before may move.

Shapes: B rows (windows or sequences), L positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def starts(scored: Tensor, reported: Tensor, draw: np.random.Generator) -> list[Tensor]:
    """Return, for each forward that an audit does, the first position of each row that changes, (B,).

    0 replaces a whole row, L leaves it as it is. A cut lies behind a scored position, drawn evenly in every
    other row, and else with the probability that the model gave its target: a leak shows where the model
    is sure. Of three rows or more, one is whole, the one before it is left, and the others are cut. Two
    rows take two forwards.

    Args:
        scored: Which positions are scored, (B, L).
        reported: Their losses in nats, (B, L).
        draw: Where random numbers come from.
    """
    B, L = scored.shape
    cut = torch.full((B,), L)
    for row in range(B):
        candidates = scored[row, : L - 1].nonzero().flatten()
        if len(candidates):
            chances = np.exp(-reported[row, candidates].double().numpy()) if row % 2 else None
            total = 0.0 if chances is None else chances.sum()
            chances = chances / total if chances is not None and 0 < total < np.inf else None
            cut[row] = 1 + int(draw.choice(candidates.numpy(), p=chances))
    if B == 1:
        return [cut]
    whole = int(draw.integers(1, B))
    together = cut.clone() if B > 2 else torch.full((B,), L)
    together[whole - 1], together[whole] = L, 0
    return [together] if B > 2 else [cut, together]


def replaced(ids: Tensor, others: Tensor, start: Tensor, words: int) -> Tensor:
    """Return ``ids`` (B, L) with ``others`` from ``start`` (B,) on, each another token than before."""
    others = torch.where(others == ids, (others + 1) % words, others)
    return torch.where(positions(ids) < start.to(ids.device)[:, None], ids, others)


def positions(ids: Tensor) -> Tensor:
    """Return the numbers of the positions, (L,), where ``ids`` (B, L) lies."""
    return torch.arange(ids.shape[1], device=ids.device)
