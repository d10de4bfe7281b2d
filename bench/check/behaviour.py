"""What a coupler computes: the same in any batch, over time, as its reference, and with finite gradients.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.check.subject import (
    TOLERANCE,
    CheckFailed,
    Inputs,
    Subject,
    call,
    is_random,
    modes,
    relative_difference,
)
from gnnmoe.couplers.base import Coupler

BATCH, LENGTH = 3, 8
BATCHED_ALIKE = "a sequence alone, in a batch and in a permuted batch gives the same result"
NOT_IN_TRAINING = " in eval mode (in train mode it draws random numbers: not compared)"

REFERENCE_EXPERTS, REFERENCE_BATCH, REFERENCE_LENGTH = 8, 2, 5
GRADIENT_FLOOR = 1e-3  # of the largest gradient: a tensor of smaller gradients may be rounding only

LEARNING_LENGTH = 16  # more tokens, so that a router can choose each expert
STEPS, STEP_SIZE = 2, 8e-3
DEAD = 1e-12  # of the largest gradient


def batch_isolation(subject: Subject) -> str:
    """Check that a sequence alone, in a batch and in a permuted batch gives the same result."""
    coupler = subject.perturbed_coupler()
    x, layer_input = subject.inputs(BATCH, min(subject.config.max_seq_length, LENGTH))
    for mode in modes(coupler):
        with torch.no_grad():
            if is_random(lambda: coupler(x, layer_input), mode, subject.device):
                return BATCHED_ALIKE + NOT_IN_TRAINING
            together = call(coupler, (x, layer_input))
            alone = [call(coupler, (x[b : b + 1], layer_input[b : b + 1])) for b in range(BATCH)]
            turned = call(coupler, (x.roll(1, 0), layer_input.roll(1, 0))).roll(-1, 0)
        for what, other in (("alone", torch.cat(alone)), ("in a permuted batch", turned)):
            difference = relative_difference(other, together)
            if not difference <= TOLERANCE:
                raise CheckFailed(
                    f"a sequence {what} gives another result than in the batch: "
                    f"{difference:.1e} of the largest value, in {mode} mode"
                )
    return BATCHED_ALIKE


def no_memory(subject: Subject) -> str:
    """Check that the same input gives the same output, bit for bit, after other inputs of several shapes."""
    coupler = subject.perturbed_coupler()
    length = min(subject.config.max_seq_length, LENGTH)
    inputs = subject.inputs(BATCH, length)
    others = [subject.inputs(BATCH, length), subject.inputs(1, length), subject.inputs(BATCH + 1, 1)]
    for mode in modes(coupler):
        coupler.eval()
        before = call(coupler, inputs).detach()
        coupler.train(mode == "train")
        for other in others:
            loss = call(coupler, other).sum() + sum(coupler.auxiliary_losses(*other).values())
            _backward(loss)
        coupler.eval()
        if not torch.equal(call(coupler, inputs), before):
            raise CheckFailed(f"the output depends on earlier calls: other inputs in {mode} mode changed it")
    return "the same input gives the same output after other inputs"


def _backward(loss: Tensor) -> None:
    """Run the backward pass, unless ``loss`` depends on no parameter: a coupler may have none."""
    if loss.requires_grad:
        loss.backward()


# --- the reference implementation --------------------------------------------------------------------


def agrees_with_reference(subject: Subject) -> str:
    """Check that ``forward`` and ``reference()`` agree at min(E, 8) experts: outputs and all gradients."""
    coupler, num_experts = _with_few_experts(subject)
    inputs = subject.inputs(REFERENCE_BATCH, REFERENCE_LENGTH, num_experts)
    weights_BLD = subject.normal(*inputs[1].shape)
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
    """Build the coupler with min(E, 8) experts, or with E if its options need all of them."""
    num_experts = subject.config.num_experts
    if num_experts > REFERENCE_EXPERTS:
        try:
            return subject.perturbed_coupler(REFERENCE_EXPERTS), REFERENCE_EXPERTS
        except ValueError:
            pass
    return subject.perturbed_coupler(), num_experts


def _output_and_gradients(
    coupler: Coupler, inputs: Inputs, weights_BLD: Tensor, *, reference: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and by name the gradient of its weighted sum; zeros for an unused tensor."""
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


# --- gradients ---------------------------------------------------------------------------------------


def gradients(subject: Subject) -> str:
    """Check that every parameter gets a finite gradient, and that none is dead after two steps."""
    size, inert = gradient_sizes(subject)
    dead = dead_parameters(size)
    undeclared = [name for name in dead if name not in inert]
    if undeclared:
        raise CheckFailed(
            f"no gradient reaches {', '.join(undeclared)} after {STEPS} steps; "
            "declare it in inert_parameters() with the reason, or mend it"
        )
    detail = f"{len(size) - len(dead)} of {len(size)} parameter tensors learn"
    detail += "".join(f"; {name} is inert: {inert[name]}" for name in dead)
    alive = [name for name in inert if name not in dead]
    return detail + (f"; declared inert, yet it is not: {', '.join(alive)}" if alive else "")


def gradient_sizes(subject: Subject) -> tuple[dict[str, float], dict[str, str]]:
    """Return each parameter's largest gradient after two steps, and the declared inert parameters.

    The second dict gives the declared reason by the parameter's name.

    Raises:
        CheckFailed: a gradient is not finite, at the start or after a step.
    """
    coupler = subject.coupler().train()
    inputs = subject.inputs(BATCH, min(subject.config.max_seq_length, LEARNING_LENGTH))
    target = subject.normal(*inputs[1].shape)
    found: dict[str, Tensor | None] = {}
    for step in range(STEPS + 1):
        coupler.zero_grad()
        loss = (call(coupler, inputs) - target).square().mean()
        _backward(loss + sum(coupler.auxiliary_losses(*inputs).values()))
        found = {name: p.grad for name, p in coupler.named_parameters() if p.requires_grad and p.numel()}
        infinite = [name for name, g in found.items() if g is not None and not g.isfinite().all()]
        if infinite:
            raise CheckFailed(f"the gradient of {', '.join(infinite)} is not finite after {step} steps")
        _adam_like_step(coupler)
    size = {name: 0.0 if g is None else float(g.abs().max()) for name, g in found.items()}
    return size, coupler.inert_parameters()


def dead_parameters(size: dict[str, float]) -> list[str]:
    """Return the parameters whose largest gradient is below 1e-12 of the largest of all."""
    largest = max(size.values(), default=0.0)
    return [name for name, value in size.items() if value <= DEAD * largest]


@torch.no_grad()
def _adam_like_step(coupler: Coupler) -> None:
    """Take Adam's first step; Adam itself would import torch's compiler, which takes more than a second."""
    for parameter in coupler.parameters():
        if parameter.grad is not None:
            parameter -= STEP_SIZE * parameter.grad / (parameter.grad.abs() + 1e-8)


def bf16(subject: Subject) -> str:
    """Check that forward and backward under bf16 autocast stay finite, with the weights of a run's start."""
    coupler = subject.coupler().float().train()
    inputs = subject.inputs(BATCH, min(subject.config.max_seq_length, LENGTH))
    leaves = inputs[0].float().requires_grad_(True), inputs[1].float().requires_grad_(True)
    with torch.autocast(subject.device.type, torch.bfloat16):
        output = call(coupler, leaves)
    output.float().square().sum().backward()
    tensors = {"expert outputs": leaves[0], "layer input": leaves[1], **dict(coupler.named_parameters())}
    infinite = [name for name, x in tensors.items() if x.grad is not None and not x.grad.isfinite().all()]
    if infinite:
        raise CheckFailed(f"under bf16 autocast the gradient of {', '.join(infinite)} is not finite")
    return "forward and backward under bf16 autocast are finite"
