"""Token isolation by group testing: 2·⌈log₂ N⌉ forwards cover every ordered pair of N tokens.

Two different tokens differ in some bit of their numbers. So for each bit and each of its values,
all tokens that have it are moved at once, and no other token's output may change by one bit; and
the gradient of a sum over the outputs that have it must be exactly 0 at all other inputs. Where a
forward takes long, values are looked at in fewer (``few_forwards``), and gradients at fewer tokens.
Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.gate.dependence import explain, with_tokens_moved
from bench.gate.few_forwards import BOTH, FewForwards
from bench.gate.report import CheckFailed
from bench.gate.subject import Inputs, Subject, call, modes
from gnnmoe.couplers.base import Coupler

BATCH = 2  # so that tokens of neighbouring sequences are covered
SLOW = 0.02  # seconds a forward: above, fewer are done
SHORT = 16  # length at which the gradients of a slow coupler are looked at
ISOLATED = "tokens: no output moves with another token's expert outputs or layer input"
NOT_REPEATED = "the same input gives different outputs in {} mode: see no_memory"


def token_isolation(subject: Subject) -> str:
    """Values and gradients, in eval and train mode, at the run's own E, L, D and options."""
    coupler = subject.perturbed_coupler()
    length = subject.config.max_seq_length
    inputs, moved, third = (subject.inputs(BATCH, length) for _ in range(3))
    few = tuple((x[:, :SHORT], layer_input[:, :SHORT]) for x, layer_input in (inputs, moved, third))
    if length > SHORT and is_slow(coupler.eval(), few[0], inputs):
        return _slow_token_isolation(coupler, few, (inputs, moved, third))

    def leaks() -> bool:
        return gradient_leak(coupler, inputs, third[1]) or any(
            value_leak(coupler, inputs, moved, [which]) for which in BOTH
        )

    _refuse_leaks(coupler, inputs, moved, leaks)
    return f"{BATCH * length} {ISOLATED}"


def _slow_token_isolation(coupler: Coupler, few: Sequence[Inputs], versions: Sequence[Inputs]) -> str:
    """Look at the gradients and values of a few tokens, then at the values of all."""
    values = FewForwards(coupler, few)

    def leaks() -> bool:
        mode = "train" if coupler.training else "eval"
        return gradient_leak(coupler, few[0], few[2][1]) or values.leak(mode) is not None

    _refuse_leaks(coupler, few[0], few[1], leaks)
    how = _all_values(FewForwards(coupler, versions))
    tokens = versions[0][1].shape[:2].numel()
    return f"{tokens} {ISOLATED} (it is slow, so values by {how}, gradients at length {SHORT})"


def _all_values(forwards: FewForwards) -> str:
    """See that no value moves with another token, and say in how many forwards.

    The modes take turns: an output that is another in one mode alone shows beside the other mode's. Where
    they differ, each mode does all forwards.
    """
    if forwards.leak("eval", "train") is None:
        return f"{len(forwards)} forwards, in eval and train mode by turns"
    found = {mode: leak for mode in ("eval", "train") if (leak := forwards.leak(mode))}
    for mode, leak in found.items():
        if not repeats(forwards.coupler.train(mode == "train"), forwards.inputs(0)):
            raise CheckFailed(NOT_REPEATED.format(mode))
        raise CheckFailed(forwards.explain(leak, mode) + _only(list(found)))
    return f"{len(forwards)} forwards in each mode"


def _refuse_leaks(coupler: Coupler, inputs: Inputs, moved: Inputs, leaks: Callable[[], bool]) -> None:
    """Raise ``CheckFailed`` where ``leaks`` in eval or train mode, and name two tokens."""
    failed_modes, explanation = [], ""
    for mode in modes(coupler):
        if not repeats(coupler, inputs):
            raise CheckFailed(NOT_REPEATED.format(mode))
        if leaks():
            failed_modes.append(mode)
            explanation = explanation or explain(coupler, inputs, moved)
    if failed_modes:
        raise CheckFailed(explanation + _only(failed_modes))


def _only(failed_modes: Sequence[str]) -> str:
    return f" (in {failed_modes[0]} mode only)" if len(failed_modes) == 1 else ""


@torch.no_grad()
def is_slow(coupler: Coupler, few: Inputs, inputs: Inputs) -> bool:
    """Return whether a forward takes longer than ``SLOW``; only in doubt is one of all ``inputs`` timed."""
    call(coupler, few)  # the first is slow by chance
    expected = _seconds(coupler, few) * inputs[1].shape[1] / few[1].shape[1]
    return expected > SLOW and (expected > 10 * SLOW or _seconds(coupler, inputs) > SLOW)


def _seconds(coupler: Coupler, inputs: Inputs) -> float:
    start = time.perf_counter()
    call(coupler, inputs)
    return time.perf_counter() - start


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
