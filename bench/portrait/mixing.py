"""What a readout does with its experts, in numbers: float64, a few tokens, every parameter perturbed.

A readout f is looked at through its values (``probes``) and its Jacobians (``maps``). Relative
numbers are over the largest value of the same output coordinate (``deviation``).
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.gate.isolation import value_leak
from bench.gate.subject import TOLERANCE, Subject
from bench.portrait import maps, probes
from bench.portrait.probes import SCALES, ManyTokens
from bench.portrait.readout import Readout

FEW = 2  # sequences, for a look at leaks: the leak check looks at more


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
    """Deviation from an affine function of the experts at one layer input, by scale of the experts'
    outputs: the worst scale of the layer input."""
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
    one_map: maps.OneMap
    offset: maps.Offset
    ignored: tuple[int, ...]
    """Experts that no token's readout moves with."""
    many: ManyTokens | None
    """Its values at many more tokens, where so far it is linear and the same for all; else None."""


def measure_mixing(subject: Subject) -> Mixing:
    """Measure the readout of the perturbed coupler in eval mode, at the width of ``subject``.

    Raises:
        NoMixing: it mixes tokens.
        CheckFailed: its output or a gradient is not finite, or of another shape.
    """
    coupler = subject.perturbed_coupler().eval()
    inputs, others = probes.draw(subject), probes.draw(subject)
    readout = Readout(coupler, inputs)
    few, few_others = ((x[:FEW], layer_input[:FEW]) for x, layer_input in (inputs, others))
    if any(value_leak(coupler, few, few_others, [which]) for which in (0, 1)):
        raise NoMixing("it mixes tokens, so that none has a mixing of its own")
    by_scale = {scale: probes.nonlinearity(readout, subject, scale) for scale in SCALES}
    J_NEDD = maps.jacobians(readout, inputs)
    dependence, offset = maps.token_dependence(J_NEDD), maps.offset(readout, J_NEDD, inputs, others)
    reads, many = probes.reads_layer_input(readout, inputs, others), None
    if max(*by_scale.values(), offset.gradient_gap, dependence) <= TOLERANCE:
        many = probes.at_many_tokens(readout, subject, J_NEDD.mean(0))
    return Mixing(
        num_experts=subject.config.num_experts,
        width=subject.config.embed_dim,
        why_output=readout.why_output,
        nonlinearity=by_scale,
        beyond_mean=max(probes.beyond_mean(readout, inputs, scale) for scale in SCALES),
        token_dependence=dependence,
        effective_rank=maps.effective_rank(J_NEDD),
        reads_layer_input=reads or (many is not None and many.reads_layer_input),
        unequal=maps.unequal(J_NEDD),
        one_map=maps.fit_one_map(J_NEDD),
        offset=offset,
        ignored=probes.ignored(readout, subject, J_NEDD),
        many=many,
    )
