"""Token isolation by group testing: 2·⌈log₂ N⌉ forwards cover every ordered pair of N tokens.

Two different tokens differ in some bit of their numbers. So for each bit and each of its values,
all tokens that have it are moved at once, and no other token's output may change by one bit; and
the gradient of a sum over the outputs that have it must be exactly 0 at all other inputs.
Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.gate.dependence import explain, with_tokens_moved
from bench.gate.report import CheckFailed
from bench.gate.subject import Inputs, Subject, call, modes
from gnnmoe.couplers import Coupler

BATCH = 2  # so that tokens of neighbouring sequences are covered


def token_isolation(subject: Subject) -> str:
    """Values and gradients, in eval and train mode, at the run's own E, L, D and options."""
    coupler = subject.perturbed_coupler()
    length = subject.config.max_seq_length
    inputs, moved = subject.inputs(BATCH, length), subject.inputs(BATCH, length)
    failed_modes, explanation = [], ""
    for mode in modes(coupler):
        if not repeats(coupler, inputs):
            raise CheckFailed(f"the same input gives different outputs in {mode} mode: see no_memory")
        leaks = (
            gradient_leak(coupler, inputs, subject.normal(BATCH, length, subject.config.embed_dim))
            or value_leak(coupler, inputs, moved, [0])
            or value_leak(coupler, inputs, moved, [1])
        )
        if leaks:
            failed_modes.append(mode)
            explanation = explanation or explain(coupler, inputs, moved)
    if failed_modes:
        only = f" (in {failed_modes[0]} mode only)" if len(failed_modes) == 1 else ""
        raise CheckFailed(explanation + only)
    return f"{BATCH * length} tokens: no output moves with another token's expert outputs or layer input"


def groups(tokens: int, shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield boolean masks (B, L): for each bit of the token numbers, those with it and without."""
    numbers = torch.arange(tokens, device=device).view(*shape)
    for bit in range((tokens - 1).bit_length()):
        has_bit = (numbers >> bit) % 2 == 1
        yield has_bit
        yield ~has_bit


@torch.no_grad()
def value_leak(coupler: Coupler, inputs: Inputs, moved: Inputs, which: Sequence[int]) -> bool:
    """Return whether any output changes when the inputs ``which`` of other tokens are moved."""
    layer_input = inputs[1]
    nobody = torch.zeros(layer_input.shape[:2], dtype=torch.bool, device=layer_input.device)
    base = call(coupler, with_tokens_moved(inputs, moved, [], nobody))
    for mask in groups(nobody.numel(), nobody.shape, nobody.device):
        output = call(coupler, with_tokens_moved(inputs, moved, which, mask))
        if not torch.equal(output[~mask], base[~mask]):
            return True
    return False


def gradient_leak(coupler: Coupler, inputs: Inputs, weights_BLD: Tensor) -> bool:
    """Return whether any output has a gradient, however small, at another token's inputs."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    output = call(coupler, (leaves[0], leaves[1])) * weights_BLD
    for mask in groups(output[..., 0].numel(), output.shape[:2], output.device):
        gradients = torch.autograd.grad(output[mask].sum(), leaves, retain_graph=True, allow_unused=True)
        if any(g is not None and g[~mask].any() for g in gradients):
            return True
    return False


@torch.no_grad()
def repeats(coupler: Coupler, inputs: Inputs) -> bool:
    """Return whether the same input gives the same output twice."""
    return torch.equal(call(coupler, inputs), call(coupler, inputs))
