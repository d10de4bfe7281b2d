"""How a coupler mixes its experts, in numbers: float64, a few tokens, every parameter perturbed.

The *readout* f is the part of a coupler that mixes the experts: its output before the combiner that all
couplers share. This module looks at the values of f and at its Jacobians J_e = ∂f/∂x_e. A relative number
is a share of the largest value of the same output coordinate (``deviation``).

Shapes: B batch, L length, N = B·L tokens, E experts, D width. The last axis holds the coordinates of the
output; for Jacobians it is the last axis but one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.check.isolation import value_leak
from bench.check.subject import TOLERANCE, CheckFailed, Inputs, Subject, call
from gnnmoe.couplers.base import Coupler, combiner

FEW = 2  # sequences whose tokens are checked for leaks; the leak check looks at more
LENGTH = 6
SCALES = (1.0, 0.1, 1e3)  # of the inputs: a kink, threshold or saturation may show at one scale only
BATCH = 2 * len(SCALES)
MANY = 64  # sequences, for a property that must hold for every token
MANY_SCALES = (*SCALES, 3.0)
DRAWS = 2
NEARLY_NOTHING = 1e-3  # of the inputs, in place of 0, where a norm may have no value
ROUNDING = 1e-14  # of the largest coordinate: a smaller one may be a difference of numbers of that size
NOT_USED = "it does not use the shared combiner"
NOT_LAST = "the shared combiner is not its last step"


class NoMixing(Exception):
    """Raised for a coupler that mixes tokens: no token has a mixing of its own."""


@dataclass(frozen=True)
class OneMap:
    """The fit J_e = c_e A, with one A for all experts and tokens, and c_e of each token."""

    not_proportional: float
    """Deviation of J_e from the fit."""
    not_identity: float
    """Deviation of A from a multiple of the identity."""
    weights: tuple[tuple[float, ...], ...]
    """c_e of each token (N, E). If A is the identity, the map's own weights; else scaled to mean sum 1."""


@dataclass(frozen=True)
class Offset:
    """The part of the readout that the Jacobians leave: f(x) − Σ J_e x_e."""

    size: float
    """Size of the offset; 0 without a constant term."""
    dependence: float
    """Largest difference between two tokens' offsets."""
    gradient_gap: float
    """Deviation of the values from the Jacobians' prediction; only meaningful for a linear readout."""


@dataclass(frozen=True)
class ManyTokens:
    """The values of a static linear readout at many tokens: the worst of several input scales."""

    tokens: int
    beyond_map: float
    """Deviation of the change of the values from the change that the Jacobians predict."""
    bends: float
    """Deviation from an affine function of the layer input, at fixed expert outputs."""
    reads_layer_input: bool


@dataclass(frozen=True)
class Mixing:
    """The numbers of one readout."""

    num_experts: int
    width: int
    """The width at which the readout was measured; costs are measured at the real width."""
    why_output: str
    """Why the coupler's output stands in for its readout; empty if the readout was measured."""
    nonlinearity: dict[float, float]
    """Deviation from an affine function of the experts, by scale of the experts' outputs.

    Each number is for one layer input: the worst scale of the layer input.
    """
    beyond_mean: float
    """Deviation from the value with each expert replaced by the experts' mean: the worst scale."""
    token_dependence: float
    """Largest difference between two tokens' Jacobians."""
    effective_rank: float
    """exp(entropy) of the normalised singular values of the E rows vec(J_e), mean over tokens.

    1 if all experts pass through one map up to a factor; 0 if no expert passes (Roy and Vetterli 2007).
    """
    reads_layer_input: bool
    unequal: float
    """Deviation of J_e from its mean over experts."""
    one_map: OneMap
    offset: Offset
    ignored: tuple[int, ...]
    """Experts that move no token's readout."""
    many: ManyTokens | None
    """The values at many more tokens, if the readout is linear and static at the few; else None."""


def measure_mixing(subject: Subject) -> Mixing:
    """Measure the readout of the perturbed coupler in eval mode, at the width of ``subject``.

    Raises:
        NoMixing: the coupler mixes tokens.
        CheckFailed: its output or a gradient is not finite, or has another shape.
    """
    coupler = subject.perturbed_coupler().eval()
    inputs, others = draw(subject), draw(subject)
    readout = Readout(coupler, inputs)
    few, few_others = ((x[:FEW], layer_input[:FEW]) for x, layer_input in (inputs, others))
    if any(value_leak(coupler, few, few_others, [which]) for which in (0, 1)):
        raise NoMixing("it mixes tokens, so that none has a mixing of its own")
    by_scale = {scale: nonlinearity(readout, subject, scale) for scale in SCALES}
    J_NEDD = jacobians(readout, inputs)
    dependence, offset = token_dependence(J_NEDD), measure_offset(readout, J_NEDD, inputs, others)
    reads, many = reads_layer_input(readout, inputs, others), None
    if max(*by_scale.values(), offset.gradient_gap, dependence) <= TOLERANCE:
        many = at_many_tokens(readout, subject, J_NEDD.mean(0))
    return Mixing(
        num_experts=subject.config.num_experts,
        width=subject.config.embed_dim,
        why_output=readout.why_output,
        nonlinearity=by_scale,
        beyond_mean=max(beyond_mean(readout, inputs, scale) for scale in SCALES),
        token_dependence=dependence,
        effective_rank=effective_rank(J_NEDD),
        reads_layer_input=reads or (many is not None and many.reads_layer_input),
        unequal=unequal(J_NEDD),
        one_map=fit_one_map(J_NEDD),
        offset=offset,
        ignored=ignored(readout, subject, J_NEDD),
        many=many,
    )


# --- the readout -------------------------------------------------------------------------------------


class Readout:
    """A coupler up to its combiner, as a function (B, L, E, D), (B, L, D) → (B, L, D).

    The readout is the combiner's input, if the coupler calls the shared combiner exactly once and returns the
    combiner's output. Otherwise it is the coupler's own output, and ``why_output`` states the reason.
    """

    def __init__(self, coupler: Coupler, inputs: Inputs) -> None:
        self.coupler = coupler
        self.why_output = NOT_USED
        if _is_shared(getattr(coupler, "combiner", None), inputs[1].shape[-1]):
            with torch.no_grad():
                output, calls = self._observed_call(inputs)
            if len(calls) == 1 and calls[0][0].numel() == output.numel():
                returned = torch.equal(calls[0][1].reshape(output.shape), output)
                self.why_output = "" if returned else NOT_LAST

    def __call__(self, expert_outputs: Tensor, layer_input: Tensor) -> Tensor:
        """Return the readout (B, L, D), with its gradients.

        Raises:
            CheckFailed: the coupler's output is not finite, or has another shape.
        """
        if self.why_output:
            return call(self.coupler, (expert_outputs, layer_input))
        output, calls = self._observed_call((expert_outputs, layer_input))
        return calls[0][0].view_as(output)

    def _observed_call(self, inputs: Inputs) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the output, and the input and output of each call of the combiner."""
        calls: list[tuple[Tensor, Tensor]] = []

        def observe(_: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
            calls.append((taken[0], given))

        handle = self.coupler.combiner.register_forward_hook(observe)
        try:
            return call(self.coupler, inputs), calls
        finally:
            handle.remove()


def _is_shared(module: object, embed_dim: int) -> bool:
    """Return whether ``module`` has the structure that ``gnnmoe.couplers.base.combiner`` builds."""
    return isinstance(module, nn.Sequential) and str(module) == str(combiner(embed_dim))


def draw(subject: Subject, batch: int = BATCH) -> Inputs:
    """Draw inputs; the layer inputs of successive sequences alternate between the scales."""
    x, layer_input = subject.inputs(batch, min(subject.config.max_seq_length, LENGTH))
    factors = torch.tensor([SCALES[b % len(SCALES)] for b in range(batch)], dtype=layer_input.dtype)
    return x, layer_input * factors.to(layer_input.device)[:, None, None]


# --- differences: a small coordinate counts as much as a large one -----------------------------------


def deviation(gap: Tensor, size: Tensor, beside: Tensor | None = None) -> float:
    """Return the largest ``gap`` over the largest ``size`` of the same coordinate, all (…, D).

    A gap that may be rounding of the largest ``size`` or of ``beside`` is divided by that value instead.
    """
    gap_D, size_D = (x.abs().flatten(0, -2).amax(0) for x in (gap, size))
    largest = size_D.max() if beside is None else torch.maximum(size_D.max(), beside.abs().max())
    size_D = torch.where(gap_D > ROUNDING * largest, size_D, largest)
    return float((gap_D / size_D.clamp_min(torch.finfo(size_D.dtype).tiny)).max())


def largest_entries(J: Tensor) -> Tensor:
    """Return the largest entry of each output coordinate of Jacobians (…, D, D), as a column (D, 1).

    An entry that may be rounding of the largest one counts as the largest one. Jacobians that are multiples
    of each other are still multiples after the division by this column.
    """
    size_D = J.abs().amax(-1).flatten(0, -2).amax(0)
    size_D = torch.where(size_D > ROUNDING * size_D.max(), size_D, size_D.max())
    return torch.where(size_D > 0, size_D, 1.0)[:, None]


def spread(values: Tensor) -> Tensor:
    """Return the difference between the largest and the smallest value along the first axis."""
    return values.amax(0) - values.amin(0)


# --- what the values show, without gradients ---------------------------------------------------------


@torch.no_grad()
def nonlinearity(readout: Readout, subject: Subject, scale: float) -> float:
    """Return the deviation of f(x + z) from f(x) + f(z) − f(0): the worst draw and layer input."""
    worst = 0.0
    for _ in range(DRAWS):
        (x, layer_input), (z, _), (zero, _) = (draw(subject) for _ in range(3))
        x, z, zero = scale * x, scale * z, scale * NEARLY_NOTHING * zero
        points = (zero, x, z, x + z - zero)
        at_zero, at_x, at_z, at_both = (readout(point, layer_input) for point in points)
        gap, moves = at_both - at_x - at_z + at_zero, torch.stack([at_x, at_z, at_both]) - at_zero
        for which in range(len(SCALES)):
            part = slice(which, None, len(SCALES))
            worst = max(worst, deviation(gap[part], moves[:, part], beside=at_zero[part]))
    return worst


@torch.no_grad()
def beyond_mean(readout: Readout, inputs: Inputs, scale: float) -> float:
    """Return the deviation of the readout from its value with each expert replaced by the mean."""
    x, layer_input = scale * inputs[0], inputs[1]
    mean, values = x.mean(2, keepdim=True).expand_as(x), readout(x, layer_input)
    return deviation(readout(mean, layer_input) - values, values)


@torch.no_grad()
def reads_layer_input(readout: Readout, inputs: Inputs, others: Inputs) -> bool:
    """Return whether the readout changes with the layer inputs of ``others``."""
    before, after = (readout(inputs[0], layer_input) for layer_input in (inputs[1], others[1]))
    return deviation(after - before, before) > TOLERANCE


@torch.no_grad()
def at_many_tokens(readout: Readout, subject: Subject, J_EDD: Tensor) -> ManyTokens:
    """Compare the values at many tokens with the values of one linear map per expert, ``J_EDD``."""
    beyond, bends, reads, tokens = [], [], [], 0
    for scale in MANY_SCALES:
        length = min(subject.config.max_seq_length, LENGTH)
        drawn = [subject.inputs(MANY, length) for _ in range(3)]
        (x, u), (z, v), (_, w) = ((scale * outputs, scale * layer) for outputs, layer in drawn)
        base, moved = readout(x, u), readout(z, u)
        expected = torch.einsum("eij,blej->bli", J_EDD, z - x)
        beyond.append(deviation(moved - base - expected, moved - base, beside=base))
        at_v, at_w, at_all = (readout(x, layer) for layer in (v, w, u + v - w))
        moves = torch.stack([at_v, at_w, at_all]) - base
        bends.append(deviation(at_all - base - at_v + at_w, moves, beside=base))
        reads.append(deviation(moves, base) > TOLERANCE)
        tokens += MANY * length
    return ManyTokens(tokens, max(beyond), max(bends), any(reads))


@torch.no_grad()
def ignored(readout: Readout, subject: Subject, J_NEDD: Tensor) -> tuple[int, ...]:
    """Return the experts that have no Jacobian at any token and do not move any other token either."""
    sizes_ED = J_NEDD.abs().amax((0, 3))
    silent = (sizes_ED <= TOLERANCE * sizes_ED.amax(0)).all(1).nonzero().flatten().tolist()
    if not silent:
        return ()
    x, layer_input = draw(subject, MANY)
    before = readout(x, layer_input)
    found = []
    for expert in silent:
        values = subject.normal(*layer_input.shape)
        for scale in SCALES:
            moved = x.clone()
            moved[:, :, expert] = scale * values
            if deviation(readout(moved, layer_input) - before, before) > TOLERANCE:
                break
        else:
            found.append(expert)
    return tuple(found)


# --- what the Jacobians show -------------------------------------------------------------------------


def jacobians(readout: Readout, inputs: Inputs) -> Tensor:
    """Return ∂f/∂x_e for each token and expert: (N, E, D, D), the output's axis before the input's.

    This takes D backward passes: no token sees another, so a sum over tokens gives each token's own gradient.

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
    """Fit J_e = c_e A by the largest singular value of the Jacobians of all tokens and experts together."""
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
def measure_offset(readout: Readout, J_NEDD: Tensor, inputs: Inputs, others: Inputs) -> Offset:
    """Measure the offset, and how well the offset and the Jacobians predict the readout of ``others``."""

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
