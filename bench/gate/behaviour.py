"""What a coupler does over several calls: across batches, over time, in training, in bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gate.report import CheckFailed
from bench.gate.subject import TOLERANCE, Subject, call, is_random, modes, relative_difference
from gnnmoe.couplers.base import Coupler

BATCH, LENGTH = 3, 8
LEARNING_LENGTH = 16  # more tokens, so that a router that chooses has a chance to choose each expert
STEPS, STEP_SIZE = 2, 8e-3
BATCHED_ALIKE = "a sequence alone, in a batch and in a permuted batch gives the same result"
NOT_IN_TRAINING = " in eval mode (in train mode it draws random numbers: not compared)"
DEAD = 1e-12  # of the largest gradient


def batch_isolation(subject: Subject) -> str:
    """A sequence alone, in a batch and in a permuted batch gives the same result."""
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
    """The same input gives the same output, bit for bit, after other inputs of several shapes."""
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


def gradients(subject: Subject) -> str:
    """Every parameter gets a finite gradient, and none is dead after two steps from the start."""
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
    """Return each parameter's largest gradient after two steps, and what is declared inert and why.

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
    """Return the names whose largest gradient is nothing beside the largest of all."""
    largest = max(size.values(), default=0.0)
    return [name for name, value in size.items() if value <= DEAD * largest]


def _backward(loss: Tensor) -> None:
    """Go back through ``loss``, where it depends on any parameter: a coupler may have none."""
    if loss.requires_grad:
        loss.backward()


@torch.no_grad()
def _adam_like_step(coupler: Coupler) -> None:
    """Take Adam's first step; its class would import torch's compiler, for more than a second."""
    for parameter in coupler.parameters():
        if parameter.grad is not None:
            parameter -= STEP_SIZE * parameter.grad / (parameter.grad.abs() + 1e-8)


def bf16(subject: Subject) -> str:
    """Forward and backward under bf16 autocast stay finite, at the real start."""
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
