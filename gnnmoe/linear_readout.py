"""The mean over the experts of a linear stack, without computing the stack for each expert.

Shapes: N tokens, E experts, D width, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gnnmoe.mixing import mix


def linear_readout(
    x_NED: Tensor, P_EE: Tensor, maps: Sequence[tuple[Tensor, Tensor]], *, residual: bool
) -> Tensor:
    r"""Return the mean over the experts (N, D) of :math:`X_K`, from :math:`X_0` = ``x``.

    .. math:: X_{k+1} = [X_k +]\; P X_k \Theta_k + 1 b_k^\top

    ``maps`` holds :math:`\Theta_k` as ``nn.Linear`` stores it, and :math:`b_k`. A row r of weights over the
    experts gives :math:`r X_{k+1} = [r X_k +]\; (r P) X_k \Theta_k + (r \cdot 1)\, b_k`: the same of the rows
    :math:`r` and :math:`r P` one layer before. So the mean needs the rows :math:`1^\top P^j / E` of the
    input alone: the last of them, or with ``residual`` all K + 1, of which each layer uses up one.
    """
    rows = [P_EE.new_full((1, len(P_EE)), 1 / len(P_EE))]
    with torch.autocast(x_NED.device.type, enabled=False):  # few numbers, in every token's sum
        for _ in maps:
            rows.append(rows[-1] @ P_EE)
    totals = [row.sum() for row in rows]
    if not residual:
        mixed = mix(rows[-1], x_NED)[:, 0]
        for (weight, bias), total in zip(maps, reversed(totals[:-1]), strict=True):
            mixed = F.linear(mixed, weight, total * bias)
        return mixed
    heard = list(mix(torch.cat(rows), x_NED).unbind(1))
    for weight, bias in maps:
        heard = [
            own + F.linear(other, weight, total * bias)
            for own, other, total in zip(heard[:-1], heard[1:], totals, strict=False)
        ]
    return heard[0]


def linear_readout_flops(
    tokens: int, num_experts: int, embed_dim: int, layers: int, *, residual: bool
) -> int:
    """Return the FLOPs of ``linear_readout``: the rows, their mixtures, and the maps of those."""
    E, D, K = num_experts, embed_dim, layers
    mixtures, maps = (K + 1, K * (K + 1) // 2) if residual else (1, K)
    return 2 * (K * E * E + mixtures * tokens * E * D + maps * tokens * D * D)
