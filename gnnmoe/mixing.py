"""Sums over the experts of a token: the few operations from which all couplers and layers are built.

Expert outputs are a view (N, E, D) of memory that is expert-major, as the experts write it, or token-major.
No function here copies one order into the other. The result may be in either order too.

Without a compiler, experts and hyperedges are mixed by matrix products. A compiler fuses a written-out sum
with the operations before and after it, but not a matrix product of four columns. So under
``torch.compile`` up to ``FEW`` experts or hyperedges are summed in a written-out sum.

Shapes: N tokens, E experts, M mixtures (experts, hyperedges, or one), D width, K scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8
"""Inductor writes out sums of up to eight terms."""


def fuses(*counts: int) -> bool:
    """Return whether a compiler is at work and the counts are small enough for written-out sums."""
    return torch.compiler.is_compiling() and max(counts) <= FEW


def mix(weights_ME: Tensor, x_NED: Tensor) -> Tensor:
    """Return Σ_e w_me x_e for every token (N, M, D): one product (M, E) × (E, N·D)."""
    (M, E), (N, _, D) = weights_ME.shape, x_NED.shape
    if fuses(M, E):  # by token: each row is read once, and the gradient of w is summed in two steps
        return mix_by_token(weights_ME.expand(N, M, E), x_NED)
    columns = x_NED.transpose(0, 1).reshape(E, N * D)
    return torch.mm(weights_ME, columns).view(M, N, D).transpose(0, 1)


def mix_by_token(weights_NME: Tensor, x_NED: Tensor) -> Tensor:
    """Return Σ_e w_nme x_e (N, M, D) in the type of ``x``: each token has its own weights."""
    if fuses(*weights_NME.shape[1:]):
        return (weights_NME[..., None] * x_NED[:, None]).sum(2).to(x_NED.dtype)
    return torch.bmm(weights_NME.to(x_NED.dtype).contiguous(), x_NED)  # strided weights are slow on CPUs


def scores(weights_KD: Tensor, x_NED: Tensor) -> Tensor:
    """Return the dot products of every expert's features with a few vectors (N, E, K)."""
    if fuses(len(weights_KD)):
        return (weights_KD * x_NED[:, :, None]).sum(-1)
    return rowwise(lambda x: F.linear(x, weights_KD), x_NED)


def rowwise(function: Callable[[Tensor], Tensor], x_NED: Tensor) -> Tensor:
    """Apply a function of rows (…, D) in memory order: in another order a linear map copies its input."""
    if x_NED.is_contiguous():
        return function(x_NED)
    return function(x_NED.transpose(0, 1)).transpose(0, 1)


def mean_over_experts(x_NED: Tensor) -> Tensor:
    """Return the mean over the second-last axis (…, D). Its gradient is one row for all experts."""
    return x_NED.sum(-2) / x_NED.shape[-2]
