"""What a coupler costs at the run's own sizes: parameters, FLOPs, and what never learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.gate.behaviour import dead_parameters, gradient_sizes
from bench.gate.subject import Subject
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import coupler_class, coupler_option_defaults, resolved_options

NOT_DECLARED = "not declared in inert_parameters()"


@dataclass(frozen=True)
class CouplerCost:
    """The costs of one coupler, in one layer of a model."""

    parameters: int
    """Numbers in all parameter tensors, the combiner's included."""
    flops_per_token: float
    """FLOPs of a forward over the tokens of one full sequence: flops(), or counted where it is None."""
    flops_counted: bool
    """Whether they come from the counter, for want of a formula."""
    flops_mismatch: str
    """How the coupler's formula and the counter differ; empty where they do not."""
    dead_parameters: dict[str, str]
    """Parameters without a gradient after two steps: name → the reason that the coupler declares."""


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
        mismatch = f"flops({tokens}) says {formula:,}, torch.utils.flop_counter counts {counted:,}"
    size, inert = gradient_sizes(Subject(config, seed, device))
    return CouplerCost(
        parameters=sum(parameter.numel() for parameter in coupler.parameters()),
        flops_per_token=(counted if formula is None else formula) / tokens,
        flops_counted=formula is None,
        flops_mismatch=mismatch,
        dead_parameters={name: inert.get(name, NOT_DECLARED) for name in dead_parameters(size)},
    )


def _in_default_form(config: GNNMoEConfig) -> GNNMoEConfig:
    """Return ``config`` with the coupler's default backend, which is the one its formula counts."""
    options = resolved_options(config)
    defaults = coupler_option_defaults(coupler_class(config.coupler_type))
    form = {name: value for name, value in defaults.items() if name == "backend"}
    return replace(config, coupler_options={**options, **form})


@torch.no_grad()
def _counted_flops(coupler: Coupler, subject: Subject) -> int:
    """Count a forward of one sequence of full length; plain attention, since no other is counted."""
    expert_outputs, layer_input = (x.float() for x in subject.inputs(1, subject.config.max_seq_length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        coupler(expert_outputs, layer_input)
    return counter.get_total_flops()
