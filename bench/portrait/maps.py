"""The maps by which experts reach a readout: its Jacobians J_e = ∂f/∂x_e of each token.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gate.report import CheckFailed
from bench.gate.subject import TOLERANCE, Inputs
from bench.portrait.deviation import deviation, largest_entries, spread
from bench.portrait.readout import Readout


@dataclass(frozen=True)
class OneMap:
    """The fit J_e = c_e A, with one A for all experts and tokens and c_e a token's own."""

    not_proportional: float
    """Deviation of J_e from it."""
    not_identity: float
    """Deviation of A from a multiple of the identity."""
    weights: tuple[tuple[float, ...], ...]
    """c_e of each token (N, E): of the map itself where A is the identity, else of mean sum 1."""


@dataclass(frozen=True)
class Offset:
    """What is left at no expert outputs, as the Jacobians have it: f(x) − Σ J_e x_e."""

    size: float
    """Its size; 0 without a constant term."""
    dependence: float
    """Largest difference between two tokens' offsets."""
    gradient_gap: float
    """Deviation of the values from those that the Jacobians predict; means something if linear."""


def jacobians(readout: Readout, inputs: Inputs) -> Tensor:
    """Return ∂f/∂x_e for each token and expert: (N, E, D, D), the output's axis before the input's.

    D backward passes: tokens do not see each other, so a sum over tokens gives each its own.

    Raises:
        CheckFailed: a gradient is not finite.
    """
    x = inputs[0].detach().clone().requires_grad_(True)
    output_ND = readout(x, inputs[1]).flatten(0, 1)
    rows = [torch.zeros_like(x)] * output_ND.shape[1]
    if output_ND.requires_grad:
        rows = [
            torch.autograd.grad(column, x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for column in output_ND.sum(0).unbind()
        ]
    J_NEDD = torch.stack(rows, dim=3).flatten(0, 1)
    if not J_NEDD.isfinite().all():
        raise CheckFailed("the gradients at the expert outputs are not finite")
    return J_NEDD


def effective_rank(J_NEDD: Tensor) -> float:
    """Return the mean over tokens of exp(entropy) of the experts' normalised singular values."""
    singular = torch.linalg.svdvals(J_NEDD.flatten(2))
    share = singular / singular.sum(-1, keepdim=True).clamp_min(torch.finfo(singular.dtype).tiny)
    ranks = torch.special.entr(share).sum(-1).exp() * (share.sum(-1) > 0.5)
    return float(ranks.mean())


def token_dependence(J_NEDD: Tensor) -> float:
    """Return the largest difference between two tokens' Jacobians."""
    return float(spread(J_NEDD / largest_entries(J_NEDD)).max())


def unequal(J_NEDD: Tensor) -> float:
    """Return the deviation of the Jacobians from their mean over experts."""
    J = J_NEDD / largest_entries(J_NEDD)
    return float((J - J.mean(1, keepdim=True)).abs().max())


def fit_one_map(J_NEDD: Tensor) -> OneMap:
    """Fit J_e = c_e A by the largest singular value of all tokens' and experts' Jacobians at once."""
    N, E, D, _ = J_NEDD.shape
    sizes_D1 = largest_entries(J_NEDD)
    rows = (J_NEDD / sizes_D1).reshape(N * E, D * D)
    U, singular, Vh = torch.linalg.svd(rows, full_matrices=False)
    c_NE, A_DD = (singular[0] * U[:, 0]).view(N, E), sizes_D1 * Vh[0].view(D, D)
    not_proportional = float((rows - c_NE.view(-1, 1) * Vh[0]).abs().max())
    identity = A_DD.trace() / D
    off = A_DD - identity * torch.eye(D, dtype=A_DD.dtype)
    not_identity = deviation(off.T, A_DD.T)
    total = c_NE.sum(1).mean()
    c_NE = c_NE * identity if not_identity <= TOLERANCE else c_NE / total if total != 0 else c_NE
    return OneMap(not_proportional, not_identity, tuple(map(tuple, c_NE.tolist())))


@torch.no_grad()
def offset(readout: Readout, J_NEDD: Tensor, inputs: Inputs, others: Inputs) -> Offset:
    """Measure the offset, and how well it and the Jacobians predict the readout of other outputs."""

    def linear(x_BLED: Tensor) -> Tensor:
        return torch.einsum("neij,nej->ni", J_NEDD, x_BLED.flatten(0, 1))

    here, there = (readout(x, inputs[1]).flatten(0, 1) for x in (inputs[0], others[0]))
    offset_ND = here - linear(inputs[0])
    values, gap = torch.stack([here, there]), linear(others[0]) + offset_ND - there
    return Offset(
        size=deviation(offset_ND, values),
        dependence=deviation(spread(offset_ND)[None], values),
        gradient_gap=deviation(gap, there - here, beside=values),
    )
