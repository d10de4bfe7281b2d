"""What a coupler computes: alike in any batch and over time, as its reference, with finite gradients, causal.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
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
    without_dropout,
)
from gnnmoe.couplers.base import Coupler
from gnnmoe.model import GNNMoEModel

BATCH, LENGTH = 3, 8
BATCHED_ALIKE = "a sequence alone, in a batch and in a permuted batch gives the same result"
NOT_IN_TRAINING = " in eval mode (in train mode it draws random numbers: not compared)"

REFERENCE_EXPERTS, REFERENCE_BATCH, REFERENCE_LENGTH = 8, 2, 5
GRADIENT_FLOOR = 1e-3  # of the largest gradient: a tensor of smaller gradients may be rounding only

LEARNING_LENGTH = 16  # more tokens, so that a router can choose each expert
STEPS, STEP_SIZE = 2, 8e-3
DEAD = 1e-12  # of the largest gradient
NO_REFERENCE = "no reference given"


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
    """Check that ``forward`` and ``reference()`` agree at min(E, 8) experts: outputs and all gradients.

    A coupler without a reference implementation passes.
    """
    coupler, num_experts = _with_few_experts(subject)
    if not _has_reference(coupler, subject, num_experts):
        return NO_REFERENCE
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


@torch.no_grad()
def _has_reference(coupler: Coupler, subject: Subject, num_experts: int) -> bool:
    layer_input = torch.zeros(1, 1, subject.config.embed_dim, dtype=torch.float64, device=subject.device)
    return coupler.reference(layer_input[:, :, None].repeat(1, 1, num_experts, 1), layer_input) is not None


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


LENGTH, LAYERS, VOCABULARY = 16, 2, 64
# --- causality ------------------------------------------------------------------------------------

ROWS = 3  # of the batch at the run's own length


def causality(subject: Subject) -> str:
    """Check a small model with the run's own experts, width, coupler and options.

    The check covers every cut of 16 tokens in float64, and a few cuts at the run's own length in float32.
    """
    length = min(subject.config.max_seq_length, LENGTH)
    model = _small_model(subject, length)
    tokens, others = (
        torch.randint(VOCABULARY, (length,), generator=subject.generator).to(subject.device) for _ in range(2)
    )
    others = torch.where(others == tokens, (others + 1) % VOCABULARY, others)
    said = f"logits before t do not move with tokens from t on, at {length} cuts; right padding is inert"
    for mode in modes(model):
        if is_random(lambda: model(tokens[None]), mode, subject.device):
            said += " (in train mode the coupler draws random numbers: not compared)"
            break
        with torch.no_grad():
            _future_changes_nothing(model, tokens, others, mode)
            if length >= 4:
                _padding_changes_nothing(model, tokens, others, mode)
    if subject.config.max_seq_length > LENGTH:
        _future_changes_nothing_at_length(subject)
        said += f"; nor does a loss at length {subject.config.max_seq_length}"
    return said


def _small_model(subject: Subject, length: int) -> GNNMoEModel:
    """Return a model with at most two layers in float64, with every parameter perturbed."""
    layers = min(subject.config.num_layers, LAYERS)
    config = replace(subject.config, num_layers=layers, vocab_size=VOCABULARY, max_seq_length=length)
    model = GNNMoEModel(config, seed=subject.seed)
    without_dropout(model)
    return subject.perturb(model.to(subject.device, torch.float64))


def _future_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Change the tokens from t on in row t of one batch, and compare each row with the last row."""
    L = tokens_L.numel()
    changed = positions(tokens_L[None]) >= torch.arange(L + 1, device=tokens_L.device)[:, None]
    logits_BLV = _finite_logits(model, torch.where(changed, others_L, tokens_L))
    difference = (logits_BLV - logits_BLV[-1]).abs().amax(-1) / logits_BLV.abs().max()
    seen = (difference > TOLERANCE) & ~changed
    if seen.any():
        cut, before = seen.nonzero()[0].tolist()
        raise CheckFailed(
            f"the logits at position {before} move when tokens from {cut} on change, in {mode} mode"
        )


def _padding_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Pad one sequence with two different fillings, beside a full sequence, and compare the results."""
    L, real = tokens_L.numel(), tokens_L.numel() // 2
    kept = torch.arange(L, device=tokens_L.device) < real
    mask = torch.stack([kept, torch.ones_like(kept)])
    logits, losses = [], []
    for filling in (tokens_L, others_L):
        batch = torch.stack([torch.where(kept, tokens_L, filling), tokens_L])
        out = model(batch, attention_mask=mask.long(), labels=batch)
        logits.append(out["logits"][0, :real])
        losses.append(out["loss"])
    short = _finite_logits(model, tokens_L[None, :real])[0]
    for what, pair in (("logits", logits), ("loss", losses), ("logits", (logits[0], short))):
        if not relative_difference(*pair) <= TOLERANCE:
            raise CheckFailed(f"right padding moves the {what} of the real tokens, in {mode} mode")


def _finite_logits(model: GNNMoEModel, input_ids: Tensor) -> Tensor:
    logits = model(input_ids)["logits"]
    if not logits.isfinite().all():
        raise CheckFailed("the logits are not finite")
    return logits


@torch.no_grad()
def _future_changes_nothing_at_length(subject: Subject) -> None:
    """Change the tokens from a cut on in one row, one row whole and one row not at all."""
    L = subject.config.max_seq_length
    model, draw = _small_model(subject, L).float(), np.random.default_rng(subject.seed)
    ids, others, targets = (
        torch.randint(VOCABULARY, (ROWS, L), generator=subject.generator).to(subject.device) for _ in range(3)
    )
    [start] = starts(torch.ones(ROWS, L, dtype=torch.bool), torch.ones(ROWS, L), draw)
    changed = replaced(ids, others, start, VOCABULARY)
    before = positions(ids) < start.to(ids.device)[:, None]
    for mode in modes(model):
        if is_random(lambda: model(ids[:1, : LENGTH + 1]), mode, subject.device):
            return
        base, found = (model.token_nll(tokens, targets) for tokens in (ids, changed))
        moved = torch.where(before, (found - base).abs(), 0.0)
        if not moved.any():
            continue
        again = model.token_nll(ids, targets)
        if float(moved.max()) > 4.0 * float((again - base).abs().max()):  # 0 unless kernels are unordered
            row, position = divmod(int(moved.argmax()), L)
            cut = int(start[row])
            what = "other sequences" if cut == L else f"its tokens from {cut} on or other sequences"
            raise CheckFailed(
                f"the loss at position {position} of a sequence of {L} moves when {what} change, "
                f"in {mode} mode"
            )


# --- where inputs are replaced: here and in the audit ------------------------------------------------


def starts(scored: Tensor, reported: Tensor, draw: np.random.Generator) -> list[Tensor]:
    """Return the first replaced position of each row, (B,), for each forward that a check runs.

    0 replaces a whole row; L leaves the row as it is. A cut lies behind a scored position. In every other
    row all scored positions are equally likely. In the remaining rows a position is as likely as the model
    found its target, because a leak shows where the model is sure. Of three rows or more, one row is
    replaced whole, the row before it is left, and the other rows are cut. Two rows need two forwards.

    Args:
        scored: Which positions are scored, (B, L).
        reported: The loss of each position in nats, (B, L).
        draw: Source of random numbers.
    """
    B, L = scored.shape
    cut = torch.full((B,), L)
    for row in range(B):
        candidates = scored[row, : L - 1].nonzero().flatten()
        if len(candidates):
            chances = np.exp(-reported[row, candidates].double().numpy()) if row % 2 else None
            total = 0.0 if chances is None else chances.sum()
            chances = chances / total if chances is not None and 0 < total < np.inf else None
            cut[row] = 1 + int(draw.choice(candidates.numpy(), p=chances))
    if B == 1:
        return [cut]
    whole = int(draw.integers(1, B))
    together = cut.clone() if B > 2 else torch.full((B,), L)
    together[whole - 1], together[whole] = L, 0
    return [together] if B > 2 else [cut, together]


def replaced(ids: Tensor, others: Tensor, start: Tensor, words: int) -> Tensor:
    """Return ``ids`` (B, L) with ``others`` from ``start`` (B,) on; every replaced token differs."""
    others = torch.where(others == ids, (others + 1) % words, others)
    return torch.where(positions(ids) < start.to(ids.device)[:, None], ids, others)


def positions(ids: Tensor) -> Tensor:
    """Return the numbers of the positions, (L,), on the device of ``ids`` (B, L)."""
    return torch.arange(ids.shape[1], device=ids.device)
