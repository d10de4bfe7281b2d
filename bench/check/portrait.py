"""The portrait of a coupler: its costs at the real sizes, its mixing at a small width, and one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.check.behaviour import dead_parameters, gradient_sizes
from bench.check.mixing import ManyTokens, Mixing, NoMixing, measure_mixing
from bench.check.subject import TOLERANCE, Subject, global_random_state_kept
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import coupler_class, coupler_option_defaults, resolved_options

WIDTH = 16  # of the copy whose mixing is measured: Jacobians need D backward passes
ROUNDING = 1e-16
NOT_DECLARED = "not declared in inert_parameters()"
NOT_LINEAR = "is not linear in the experts"
MEAN_ALONE = ", but sees only their mean"
NO_SUBSTITUTE = ", so a mean or a linear layer cannot replace it"


@dataclass(frozen=True)
class CouplerCost:
    """The costs of one coupler, in one layer of a model."""

    parameters: int
    """Number of values in all parameter tensors, with the combiner's."""
    flops_per_token: float
    """FLOPs of a forward over one full sequence, per token: by ``flops()``, or counted without a formula."""
    flops_counted: bool
    """Whether the FLOPs come from the counter, because the coupler has no formula."""
    flops_mismatch: str
    """What ``flops()`` returns and what PyTorch counts; empty if they agree."""
    dead_parameters: dict[str, str]
    """Parameters without a gradient after two steps: name → the reason that the coupler declares."""


@dataclass(frozen=True)
class Portrait:
    """What a coupler computes and costs."""

    cost: CouplerCost
    mixing: Mixing

    @property
    def verdict(self) -> str:
        """What the coupler computes, in a few words: ``equals mean + Linear to 1e-15``."""
        return verdict(self.mixing)

    @property
    def sentence(self) -> str:
        """The verdict with its subject and its consequence: ``before the combiner, this coupler …``."""
        mixing, said = self.mixing, self.verdict
        what = (
            f"its output ({mixing.why_output})" if mixing.why_output else "before the combiner, this coupler"
        )
        consequence = NO_SUBSTITUTE if said.startswith(NOT_LINEAR) and MEAN_ALONE not in said else ""
        return f"{what} {said}{consequence}"


def draw_portrait(config: GNNMoEConfig, *, seed: int = 0) -> Portrait:
    """Measure the coupler that ``config`` names, on the CPU; torch's random state stays as it was.

    Raises:
        NoMixing: the coupler mixes tokens.
        CheckFailed: its output or a gradient is not finite, or has another shape.
        Exception: any exception of the coupler itself.
    """
    device = torch.device("cpu")
    with global_random_state_kept(device):
        cost = measure_cost(config, seed, device)
        try:
            mixing = measure_mixing(Subject(_narrow(config), seed, device))
        except NoMixing:
            raise
        except Exception:  # an option of the coupler may need the real width
            if _narrow(config) == config:
                raise
            mixing = measure_mixing(Subject(config, seed, device))
    return Portrait(cost, mixing)


def _narrow(config: GNNMoEConfig) -> GNNMoEConfig:
    """Return ``config`` at the smallest width of at least 16 that its heads divide, if it is wider."""
    width = -(-WIDTH // config.num_heads) * config.num_heads
    return replace(config, embed_dim=min(width, config.embed_dim))


# --- costs at the run's own sizes --------------------------------------------------------------------


def measure_cost(config: GNNMoEConfig, seed: int, device: torch.device) -> CouplerCost:
    """Count parameters and FLOPs, and find dead parameters as the leak check does.

    Raises:
        CheckFailed: a gradient is not finite.
    """
    subject = Subject(_in_default_form(config), seed, device)
    coupler, tokens = subject.coupler().float().eval(), config.max_seq_length
    formula, counted = coupler.flops(tokens), _counted_flops(coupler, subject)
    mismatch = ""
    if formula is not None and formula != counted:
        mismatch = f"it returns {formula:,} for {tokens:,} tokens; PyTorch counts {counted:,}"
    size, inert = gradient_sizes(Subject(config, seed, device))
    return CouplerCost(
        parameters=sum(parameter.numel() for parameter in coupler.parameters()),
        flops_per_token=(counted if formula is None else formula) / tokens,
        flops_counted=formula is None,
        flops_mismatch=mismatch,
        dead_parameters={name: inert.get(name, NOT_DECLARED) for name in dead_parameters(size)},
    )


def _in_default_form(config: GNNMoEConfig) -> GNNMoEConfig:
    """Return ``config`` with the coupler's default backend: the FLOPs formula is for that backend."""
    options = resolved_options(config)
    defaults = coupler_option_defaults(coupler_class(config.coupler_type))
    form = {name: value for name, value in defaults.items() if name == "backend"}
    return replace(config, coupler_options={**options, **form})


@torch.no_grad()
def _counted_flops(coupler: Coupler, subject: Subject) -> int:
    """Count a forward of one sequence of full length; only plain attention can be counted."""
    expert_outputs, layer_input = (x.float() for x in subject.inputs(1, subject.config.max_seq_length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        coupler(expert_outputs, layer_input)
    return counter.get_total_flops()


# --- the verdict: every equality that it claims was measured to the stated power ---------------------


def verdict(mixing: Mixing) -> str:
    """Return the predicate of the portrait's sentence, without its consequence."""
    said = _kind(mixing)
    if mixing.ignored and _has_experts(mixing):
        said += f"; it ignores expert {', '.join(map(str, mixing.ignored))}"
    return said


def nonlinear_by(mixing: Mixing) -> float:
    """Return the deviation from linear at inputs of size 1, or the worst one if there is none at size 1."""
    usual = mixing.nonlinearity[1.0]
    return usual if usual > TOLERANCE else max(mixing.nonlinearity.values())


def power(deviation: float) -> str:
    """Return the nearest power of ten, at least the rounding of float64: ``1e-15``."""
    return f"1e{round(math.log10(max(deviation, ROUNDING)))}"


def amount(deviation: float) -> str:
    """Return a deviation with one digit, as a power if it is small: 0.3 or 4e-05."""
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
    assert mixing.many is not None, "a static linear readout is measured at many tokens"
    if mixing.many.beyond_map > TOLERANCE:
        what, off = _static(mixing) if one_map else "linear and static", amount(mixing.many.beyond_map)
        return f"is {what} at most tokens, but not at all (off by {off} at another)"
    if one_map:
        return _static_verdict(mixing, mixing.many)
    off = f"off one map by {amount(mixing.one_map.not_proportional)}"
    return f"is linear and static, but treats experts by different maps ({rank}; {off})"


def _static_verdict(mixing: Mixing, many: ManyTokens) -> str:
    """Return the verdict for static weights; a readout that is not affine is judged on these tokens only."""
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
    """Name the static weights and the map; J_e = c_e A holds for all tokens."""
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
    """Name a weighted sum whose weights depend on the token; J_e = c_e A holds with c_e of each token."""
    what = "mean" if _is_mean(mixing) else "sum"
    said = f"is a weighted {what} whose weights depend on the token"
    if mixing.one_map.not_identity > TOLERANCE:
        said += ", + Linear"
    elif mixing.offset.dependence > TOLERANCE:
        said += ", + a term that depends on the token"
    return f"{said} (to {power(max(_deviations(mixing)))})"


def _deviations(mixing: Mixing) -> list[float]:
    """Return the deviations that are below the tolerance for every readout that is linear by one map."""
    one_map = mixing.one_map
    found = [*mixing.nonlinearity.values(), mixing.offset.gradient_gap, one_map.not_proportional]
    return found + ([one_map.not_identity] if one_map.not_identity <= TOLERANCE else [])


def _is_mean(mixing: Mixing) -> bool:
    """Return whether no weight is negative and the weights of each token sum to 1."""
    return all(
        min(weights) >= -TOLERANCE and abs(sum(weights) - 1.0) <= TOLERANCE
        for weights in mixing.one_map.weights
    )
