"""What a readout's values tell, without gradients: at inputs of several sizes, and at many tokens.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gate.subject import TOLERANCE, Inputs, Subject
from bench.portrait.deviation import deviation
from bench.portrait.readout import Readout

LENGTH = 6
SCALES = (1.0, 0.1, 1e3)  # of the inputs: a kink, a threshold or a saturation may show at one of them only
BATCH = 2 * len(SCALES)
MANY = 64  # sequences, for what must hold for every token
MANY_SCALES = (*SCALES, 3.0)
DRAWS = 2
NEARLY_NOTHING = 1e-3  # of the inputs, in place of 0, where a norm may have no value


@dataclass(frozen=True)
class ManyTokens:
    """The values of a static linear readout at many tokens; worst of the scales of all inputs."""

    tokens: int
    beyond_map: float
    """Deviation of what moves with the experts from what the Jacobians predict."""
    bends: float
    """Deviation from an affine function of the layer input, at one token's expert outputs."""
    reads_layer_input: bool


def draw(subject: Subject, batch: int = BATCH) -> Inputs:
    """Draw inputs whose layer inputs have each of the scales in turn, sequence by sequence."""
    x, layer_input = subject.inputs(batch, min(subject.config.max_seq_length, LENGTH))
    factors = torch.tensor([SCALES[b % len(SCALES)] for b in range(batch)], dtype=layer_input.dtype)
    return x, layer_input * factors.to(layer_input.device)[:, None, None]


@torch.no_grad()
def nonlinearity(readout: Readout, subject: Subject, scale: float) -> float:
    """Return how far f(x + z) is from f(x) + f(z) − f(0), over what moves: the worst draw and layer input."""
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
    """Return how far the readout is from its value where each expert is replaced by their mean."""
    x, layer_input = scale * inputs[0], inputs[1]
    mean, values = x.mean(2, keepdim=True).expand_as(x), readout(x, layer_input)
    return deviation(readout(mean, layer_input) - values, values)


@torch.no_grad()
def reads_layer_input(readout: Readout, inputs: Inputs, others: Inputs) -> bool:
    """Return whether the readout is another at the layer inputs of ``others``."""
    before, after = (readout(inputs[0], layer_input) for layer_input in (inputs[1], others[1]))
    return deviation(after - before, before) > TOLERANCE


@torch.no_grad()
def at_many_tokens(readout: Readout, subject: Subject, J_EDD: Tensor) -> ManyTokens:
    """Compare the values at many tokens with those of the one linear map per expert ``J_EDD``."""
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
    """Return the experts without a Jacobian at any token that move no other token's readout either."""
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
