"""One sentence on what a readout is, from its numbers: what claims equality was measured to it."""

from __future__ import annotations

import math

from bench.gate.subject import TOLERANCE
from bench.portrait.mixing import Mixing
from bench.portrait.probes import ManyTokens

ROUNDING = 1e-16
NOT_LINEAR = "is not linear in the experts"
MEAN_ALONE = ", but sees only their mean"
NO_SUBSTITUTE = ", so neither a mean nor a Linear replaces it"


def sentence(mixing: Mixing) -> str:
    """Return the verdict with what it is about, and what follows from it."""
    what = f"its output ({mixing.why_output})" if mixing.why_output else "before the shared combiner it"
    said = verdict(mixing)
    consequence = NO_SUBSTITUTE if said.startswith(NOT_LINEAR) and MEAN_ALONE not in said else ""
    return f"{what} {said}{consequence}"


def verdict(mixing: Mixing) -> str:
    """Return the predicate of the sentence, without its consequence."""
    said = _kind(mixing)
    if mixing.ignored and _has_experts(mixing):
        said += f"; it ignores expert {', '.join(map(str, mixing.ignored))}"
    return said


def nonlinear_by(mixing: Mixing) -> float:
    """Return the deviation from linear at inputs of size 1, or the worst where there is none at 1."""
    usual = mixing.nonlinearity[1.0]
    return usual if usual > TOLERANCE else max(mixing.nonlinearity.values())


def power(deviation: float) -> str:
    """Return the nearest power of ten, at least the rounding of float64: ``1e-15``."""
    return f"1e{round(math.log10(max(deviation, ROUNDING)))}"


def amount(deviation: float) -> str:
    """Return a deviation that is there with one digit, as a power where it is small: 0.3 or 4e-05."""
    return f"{deviation:.1g}"


def _has_experts(mixing: Mixing) -> bool:
    return len(mixing.ignored) < mixing.num_experts


def _kind(mixing: Mixing) -> str:
    deviation = nonlinear_by(mixing)
    if not _has_experts(mixing):
        return "does not depend on the experts at all"
    if deviation > TOLERANCE:
        scale = next(scale for scale, value in mixing.nonlinearity.items() if value == deviation)
        where = "" if scale == 1.0 else f" at inputs of size {scale:g}"
        mean_alone = mixing.num_experts > 1 and mixing.beyond_mean <= TOLERANCE
        return f"{NOT_LINEAR} (by {amount(deviation)}{where})" + (MEAN_ALONE if mean_alone else "")
    if mixing.offset.gradient_gap > TOLERANCE:
        return (
            "is linear in the experts, but its gradients are not those of its values "
            f"(off by {amount(mixing.offset.gradient_gap)})"
        )
    one_map = mixing.one_map.not_proportional <= TOLERANCE
    rank = f"effective rank {mixing.effective_rank:.2f}"
    if mixing.token_dependence > TOLERANCE:
        if one_map:
            return _token_weighted(mixing)
        return f"is linear in the experts, by maps that depend on the token ({rank})"
    assert mixing.many is not None, "a static linear readout is looked at, at many tokens"
    if mixing.many.beyond_map > TOLERANCE:
        what, off = _static(mixing) if one_map else "linear and static", amount(mixing.many.beyond_map)
        return f"is {what} at most tokens, but not at all (off by {off} at another)"
    if one_map:
        return _static_verdict(mixing, mixing.many)
    off = f"off one map by {amount(mixing.one_map.not_proportional)}"
    return f"is linear and static, but treats experts by different maps ({rank}; {off})"


def _static_verdict(mixing: Mixing, many: ManyTokens) -> str:
    """Say equality, unless the layer input has a part that other tokens may have another of."""
    deviations = [*_deviations(mixing), mixing.token_dependence, many.beyond_map]
    deviations += [mixing.unequal] if mixing.unequal <= TOLERANCE else []
    deviations += [many.bends] if many.bends <= TOLERANCE else []
    deviations += [] if _varies(mixing) else [mixing.offset.dependence]
    said, to = _static(mixing), power(max(deviations))
    if many.bends > TOLERANCE:
        why = "not affine in the layer input, so others may differ"
        return f"is {said} (to {to} at {many.tokens} tokens; {why})"
    return f"equals {said} to {to}"


def _varies(mixing: Mixing) -> bool:
    return mixing.reads_layer_input or mixing.offset.dependence > TOLERANCE


def _static(mixing: Mixing) -> str:
    """Say which static weights and which map; J_e = c_e A holds for all tokens."""
    equal, identity = mixing.unequal <= TOLERANCE, mixing.one_map.not_identity <= TOLERANCE
    mean = _is_mean(mixing)
    if equal and identity:
        total = sum(mixing.one_map.weights[0])
        what = "the mean over experts" if mean else f"{total:.3g} times the mean over experts"
    elif equal:
        what = "mean"
    else:
        what = f"a static weighted {'mean' if mean else 'sum'}" + (" of the experts" if identity else "")
    if not identity:
        what += " + Linear"
    elif mixing.offset.size > TOLERANCE and not _varies(mixing):
        what += " + a constant"
    return what + (" + a term that depends on the token" if _varies(mixing) else "")


def _token_weighted(mixing: Mixing) -> str:
    """Say what is weighed; J_e = c_e A holds with c_e of each token."""
    what = "mean" if _is_mean(mixing) else "sum"
    said = f"is a weighted {what} whose weights depend on the token"
    if mixing.one_map.not_identity > TOLERANCE:
        said += ", + Linear"
    elif mixing.offset.dependence > TOLERANCE:
        said += ", + a term that depends on the token"
    return f"{said} (to {power(max(_deviations(mixing)))})"


def _deviations(mixing: Mixing) -> list[float]:
    """Return the deviations that are below the tolerance wherever the readout is linear by one map."""
    one_map = mixing.one_map
    found = [*mixing.nonlinearity.values(), mixing.offset.gradient_gap, one_map.not_proportional]
    return found + ([one_map.not_identity] if one_map.not_identity <= TOLERANCE else [])


def _is_mean(mixing: Mixing) -> bool:
    """Return whether no weight is negative and each token's sum to 1."""
    return all(
        min(weights) >= -TOLERANCE and abs(sum(weights) - 1.0) <= TOLERANCE
        for weights in mixing.one_map.weights
    )
