"""What a readout does with its experts, in numbers: float64, a few tokens, every parameter perturbed.

A readout f is looked at through its Jacobians J_e = ∂f/∂x_e of each token. Relative numbers are
over the largest value of what they compare. Shapes: B batch, L length, N = B·L tokens, E experts,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gate.isolation import value_leak
from bench.gate.subject import TOLERANCE, Inputs, Subject, relative_difference
from bench.portrait.readout import Readout

BATCH, LENGTH = 2, 6
MANY = 64  # sequences, for what must hold for every token
DRAWS = 3
SCALES = (1.0, 0.1, 1e3)  # of the inputs: a kink or a saturation may show at one of them only
NEARLY_NOTHING = 1e-3  # of the inputs, in place of 0, where a norm may have no value
FLOOR = 1e-5  # of the largest value: a readout that moves less is compared with this, not with rounding


class NoMixing(Exception):
    """Raised where a readout has no mixing of a token's own; the text says why."""


@dataclass(frozen=True)
class Mixing:
    """The numbers of one readout."""

    num_experts: int
    width: int
    """The width it was looked at; costs are those of the real one."""
    why_output: str
    """Why the coupler's output was looked at in place of its readout; empty where it was not."""
    nonlinearity: dict[float, float]
    """Deviation from an affine function of the experts at one layer input, by scale of the inputs."""
    beyond_mean: float
    """Deviation from its value where each expert is replaced by their mean: the worst scale."""
    token_dependence: float
    """Largest difference between two tokens' Jacobians."""
    effective_rank: float
    """exp(entropy) of the normalised singular values of the E rows vec(J_e), mean over tokens (Roy
    and Vetterli 2007): 1 where all experts pass through one map up to a factor, 0 where none passes."""
    reads_layer_input: bool
    unequal: float
    """Deviation of J_e from its mean over experts."""
    not_proportional: float
    """Deviation of J_e from c_e A, with one A for all experts and tokens and c_e a token's own."""
    not_identity: float
    """Deviation of that A from a multiple of the identity."""
    weights: tuple[tuple[float, ...], ...]
    """c_e of each token (N, E): of the map itself where A is the identity, else of mean sum 1."""
    offset: float
    """Size of what is left at no expert outputs; 0 without a constant term."""
    offset_dependence: float
    """Largest difference between two tokens' offsets."""
    gradient_gap: float
    """Deviation of the values from those that the Jacobians predict; means something if linear."""
    ignored: tuple[int, ...]
    """Experts that no token's readout moves with."""


def measure_mixing(subject: Subject) -> Mixing:
    """Measure the readout of the perturbed coupler in eval mode, at the width of ``subject``.

    Raises:
        NoMixing: it mixes tokens.
        CheckFailed: its output is not finite, or of another shape.
    """
    coupler = subject.perturbed_coupler().eval()
    inputs, others = _inputs(subject), _inputs(subject)
    readout = Readout(coupler, inputs)
    if any(value_leak(coupler, inputs, others, [which]) for which in (0, 1)):
        raise NoMixing("it mixes tokens, so that none has a mixing of its own")
    J_NEDD = jacobians(readout, inputs)
    size = float(J_NEDD.abs().max()) or 1.0
    offset_ND, scale, gap = _offset(readout, J_NEDD, inputs, others)
    not_proportional, not_identity, weights = _one_map(J_NEDD)
    return Mixing(
        num_experts=subject.config.num_experts,
        width=subject.config.embed_dim,
        why_output=readout.why_output,
        nonlinearity={factor: nonlinearity(readout, subject, factor) for factor in SCALES},
        beyond_mean=max(_beyond_mean(readout, inputs, factor) for factor in SCALES),
        token_dependence=_spread(J_NEDD) / size,
        effective_rank=effective_rank(J_NEDD),
        reads_layer_input=_reads_layer_input(readout, inputs, others),
        unequal=float((J_NEDD - J_NEDD.mean(1, keepdim=True)).abs().max()) / size,
        not_proportional=not_proportional,
        not_identity=not_identity,
        weights=weights,
        offset=float(offset_ND.abs().max()) / scale,
        offset_dependence=_spread(offset_ND) / scale,
        gradient_gap=gap,
        ignored=_ignored(readout, subject, J_NEDD),
    )


def _inputs(subject: Subject, batch: int = BATCH) -> Inputs:
    return subject.inputs(batch, min(subject.config.max_seq_length, LENGTH))


def _spread(values: Tensor) -> float:
    """Return the largest difference along the first axis."""
    return float((values.amax(0) - values.amin(0)).max())


def jacobians(readout: Readout, inputs: Inputs) -> Tensor:
    """Return ∂f/∂x_e for each token and expert: (N, E, D, D), the output's axis before the input's.

    D backward passes: tokens do not see each other, so a sum over tokens gives each its own.
    """
    x = inputs[0].detach().clone().requires_grad_(True)
    output_ND = readout(x, inputs[1]).flatten(0, 1)
    rows = [torch.zeros_like(x)] * output_ND.shape[1]
    if output_ND.requires_grad:
        rows = [
            torch.autograd.grad(column, x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for column in output_ND.sum(0).unbind()
        ]
    return torch.stack(rows, dim=3).flatten(0, 1)


@torch.no_grad()
def nonlinearity(readout: Readout, subject: Subject, scale: float) -> float:
    """Return how far f(x + z) is from f(x) + f(z) − f(0), over the largest f(x) − f(0): the worst draw."""
    worst = 0.0
    for _ in range(DRAWS):
        (x, layer_input), (z, _), (zero, _) = (_inputs(subject) for _ in range(3))
        x, z, zero = scale * x, scale * z, scale * NEARLY_NOTHING * zero
        at_x, at_z, at_zero = (readout(point, layer_input) for point in (x, z, zero))
        gap = readout(x + z - zero, layer_input) - at_x - at_z + at_zero
        size = float((torch.stack([at_x, at_z]) - at_zero).abs().max())
        size = max(size, FLOOR * float(at_zero.abs().max()))
        worst = max(worst, float(gap.abs().max()) / (size or 1.0))
    return worst


@torch.no_grad()
def _beyond_mean(readout: Readout, inputs: Inputs, scale: float) -> float:
    x, layer_input = scale * inputs[0], inputs[1]
    mean = x.mean(2, keepdim=True).expand_as(x)
    return relative_difference(readout(mean, layer_input), readout(x, layer_input))


def effective_rank(J_NEDD: Tensor) -> float:
    """Return the mean over tokens of exp(entropy) of the experts' normalised singular values."""
    singular = torch.linalg.svdvals(J_NEDD.flatten(2))
    share = singular / singular.sum(-1, keepdim=True).clamp_min(torch.finfo(singular.dtype).tiny)
    ranks = torch.special.entr(share).sum(-1).exp() * (share.sum(-1) > 0.5)
    return float(ranks.mean())


def _one_map(J_NEDD: Tensor) -> tuple[float, float, tuple[tuple[float, ...], ...]]:
    """Fit J_e = c_e A by the largest singular value of all tokens' and experts' Jacobians at once.

    Returns ``not_proportional``, ``not_identity`` and ``weights`` of ``Mixing``.
    """
    N, E, D, _ = J_NEDD.shape
    rows = J_NEDD.reshape(N * E, D * D)
    U, singular, Vh = torch.linalg.svd(rows, full_matrices=False)
    c_NE, A_DD = (singular[0] * U[:, 0]).view(N, E), Vh[0].view(D, D)
    left = rows - c_NE.view(-1, 1) * Vh[0]
    identity = A_DD.trace() / D
    not_identity = relative_difference(identity * torch.eye(D, dtype=A_DD.dtype), A_DD)
    total = c_NE.sum(1).mean()
    c_NE = c_NE * identity if not_identity <= TOLERANCE else c_NE / total if total != 0 else c_NE
    not_proportional = float(left.abs().max() / (rows.abs().max() or 1.0))
    return not_proportional, not_identity, tuple(map(tuple, c_NE.tolist()))


@torch.no_grad()
def _offset(readout: Readout, J_NEDD: Tensor, inputs: Inputs, others: Inputs) -> tuple[Tensor, float, float]:
    """Return f(x) − Σ J_e x_e (N, D), the size of f, and how well both predict f at other outputs."""

    def linear(x_BLED: Tensor) -> Tensor:
        return torch.einsum("neij,nej->ni", J_NEDD, x_BLED.flatten(0, 1))

    here, there = (readout(x, inputs[1]).flatten(0, 1) for x in (inputs[0], others[0]))
    size = max(float(here.abs().max()), float(there.abs().max())) or 1.0
    offset_ND = here - linear(inputs[0])
    gap = (linear(others[0]) + offset_ND - there).abs().max()
    return offset_ND, size, float(gap) / size


@torch.no_grad()
def _reads_layer_input(readout: Readout, inputs: Inputs, others: Inputs) -> bool:
    before = readout(*inputs)
    return any(
        relative_difference(readout(inputs[0], scale * others[1]), before) > TOLERANCE for scale in SCALES
    )


@torch.no_grad()
def _ignored(readout: Readout, subject: Subject, J_NEDD: Tensor) -> tuple[int, ...]:
    """Return the experts without a Jacobian at any token that move no other token's readout either."""
    sizes = J_NEDD.abs().amax((0, 2, 3)).tolist()
    silent = [expert for expert, size in enumerate(sizes) if size <= TOLERANCE * max(sizes)]
    if not silent:
        return ()
    x, layer_input = _inputs(subject, MANY)
    before = readout(x, layer_input)
    ignored = []
    for expert in silent:
        moved = x.clone()
        moved[:, :, expert] = subject.normal(*layer_input.shape)
        if relative_difference(readout(moved, layer_input), before) <= TOLERANCE:
            ignored.append(expert)
    return tuple(ignored)
