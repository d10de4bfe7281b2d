"""The vectorized forward computes what the coupler's own naive reference computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gate.report import CheckFailed
from bench.gate.subject import TOLERANCE, Inputs, Subject, call, modes, relative_difference
from gnnmoe.couplers.base import Coupler

MAX_EXPERTS, BATCH, LENGTH = 8, 2, 5
GRADIENT_FLOOR = 1e-3  # of the largest gradient: below, a tensor of gradients may be rounding only


def agrees_with_reference(subject: Subject) -> str:
    """Output and all gradients, those to the inputs included, at min(E, 8) experts."""
    coupler, num_experts = _with_few_experts(subject)
    inputs = subject.inputs(BATCH, LENGTH, num_experts)
    weights_BLD = subject.normal(BATCH, LENGTH, subject.config.embed_dim)
    worst = 0.0
    for mode in modes(coupler):
        output, gradients = _output_and_gradients(coupler, inputs, weights_BLD, reference=False)
        expected, expected_gradients = _output_and_gradients(coupler, inputs, weights_BLD, reference=True)
        differences = [("output", relative_difference(output, expected))]
        differences += _gradient_differences(gradients, expected_gradients)
        for name, difference in differences:
            if not difference <= TOLERANCE:
                raise CheckFailed(
                    f"forward and reference() differ in the {name} by {difference:.1e} of its largest "
                    f"value, in {mode} mode with {num_experts} experts"
                )
            worst = max(worst, difference)
    return f"output and gradients equal reference() to {worst:.0e} at {num_experts} experts"


def _with_few_experts(subject: Subject) -> tuple[Coupler, int]:
    """Build the coupler at min(E, 8) experts, or at E where its options allow no fewer."""
    num_experts = subject.config.num_experts
    if num_experts > MAX_EXPERTS:
        try:
            return subject.perturbed_coupler(MAX_EXPERTS), MAX_EXPERTS
        except ValueError:
            pass
    return subject.perturbed_coupler(), num_experts


def _output_and_gradients(
    coupler: Coupler, inputs: Inputs, weights_BLD: Tensor, *, reference: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradient of its weighted sum by name; unused means zeros."""
    expert_outputs, layer_input = (x.detach().clone().requires_grad_(True) for x in inputs)
    output = call(coupler, (expert_outputs, layer_input), reference=reference)
    leaves = {"expert outputs": expert_outputs, "layer input": layer_input}
    leaves |= {name: p for name, p in coupler.named_parameters() if p.requires_grad and p.numel()}
    gradients = torch.autograd.grad(
        (output * weights_BLD).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def _gradient_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    floor = GRADIENT_FLOOR * max(float(g.abs().max()) for g in b.values())
    for name, expected in b.items():
        scale = max(float(expected.abs().max()), floor)
        yield f"gradient of {name}", float((a[name] - expected).abs().max()) / scale
