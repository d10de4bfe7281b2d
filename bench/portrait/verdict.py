"""One sentence on what a readout is, from its numbers: what claims equality was measured to it."""

from __future__ import annotations

import math

from bench.gate.subject import TOLERANCE
from bench.portrait.mixing import Mixing

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
    if mixing.gradient_gap > TOLERANCE:
        return (
            "is linear in the experts, but its gradients are not those of its values "
            f"(off by {amount(mixing.gradient_gap)})"
        )
    one_map = mixing.not_proportional <= TOLERANCE
    rank = f"effective rank {mixing.effective_rank:.2f}"
    if mixing.token_dependence > TOLERANCE:
        if one_map:
            return _token_weighted(mixing)
        return f"is linear in the experts, by maps that depend on the token ({rank})"
    if one_map:
        return _static(mixing)
    off = f"off one map by {amount(mixing.not_proportional)}"
    return f"is linear and static, but treats experts by different maps ({rank}; {off})"


def _static(mixing: Mixing) -> str:
    """Say which static weights and which map; J_e = c_e A holds for all tokens."""
    equal, identity = mixing.unequal <= TOLERANCE, mixing.not_identity <= TOLERANCE
    mean = _is_mean(mixing)
    varies = mixing.reads_layer_input or mixing.offset_dependence > TOLERANCE
    deviations = [*_deviations(mixing), mixing.token_dependence]
    deviations += [mixing.unequal] if equal else []
    if equal and identity:
        total = sum(mixing.weights[0])
        what = "the mean over experts" if mean else f"{total:.3g} times the mean over experts"
    elif equal:
        what = "mean"
    else:
        what = f"a static weighted {'mean' if mean else 'sum'}" + (" of the experts" if identity else "")
    if not identity:
        what += " + Linear"
    elif mixing.offset > TOLERANCE and not varies:
        what += " + a constant"
    if varies:
        what += " + a term that depends on the token"
    else:
        deviations.append(mixing.offset_dependence)
    return f"equals {what} to {power(max(deviations))}"


def _token_weighted(mixing: Mixing) -> str:
    """Say what is weighed; J_e = c_e A holds with c_e of each token."""
    what = "mean" if _is_mean(mixing) else "sum"
    said = f"is a weighted {what} whose weights depend on the token"
    if mixing.not_identity > TOLERANCE:
        said += ", + Linear"
    elif mixing.offset_dependence > TOLERANCE:
        said += ", + a term that depends on the token"
    return f"{said} (to {power(max(_deviations(mixing)))})"


def _deviations(mixing: Mixing) -> list[float]:
    """Return the deviations that are below the tolerance wherever the readout is linear by one map."""
    found = [*mixing.nonlinearity.values(), mixing.gradient_gap, mixing.not_proportional]
    return found + ([mixing.not_identity] if mixing.not_identity <= TOLERANCE else [])


def _is_mean(mixing: Mixing) -> bool:
    """Return whether no weight is negative and each token's sum to 1."""
    return all(
        min(weights) >= -TOLERANCE and abs(sum(weights) - 1.0) <= TOLERANCE for weights in mixing.weights
    )
