"""Which token sees which: slow, exact, and only run where a leak has been found.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.gate.subject import Inputs, call
from gnnmoe.couplers.base import Coupler

SOURCES = ("expert outputs", "layer input")
SEQUENCES, LENGTHS = 2, (16, 128)  # how much of the batch is looked at; the longer one only if needed


def explain(coupler: Coupler, inputs: Inputs, moved: Inputs) -> str:
    """Name one token that sees another, the worst kind found, and say what kind of leak it is."""
    length = inputs[1].shape[1]
    for part in sorted({min(length, size) for size in (*LENGTHS, length)})[:2]:
        few, few_moved = _part(inputs, part), _part(moved, part)
        found = [dependence(coupler, few, few_moved, which) for which in range(len(SOURCES))]
        if any(bool(sees.any()) for sees in found):
            return describe(found, part)
    return "outputs move with the inputs of other tokens, in a pattern that no single pair shows"


def _part(inputs: Inputs, length: int) -> Inputs:
    return inputs[0][:SEQUENCES, :length], inputs[1][:SEQUENCES, :length]


def dependence(coupler: Coupler, inputs: Inputs, moved: Inputs, which: int) -> Tensor:
    """Return booleans (N, N): whether output s moves with, or has a gradient at, input t ≠ s."""
    B, L = inputs[1].shape[:2]
    one_each = torch.eye(B * L, dtype=torch.bool, device=inputs[1].device).view(-1, B, L)
    with torch.no_grad():
        base = call(coupler, with_tokens_moved(inputs, moved, [], one_each[0]))
        columns = [
            call(coupler, with_tokens_moved(inputs, moved, [which], mask)) != base for mask in one_each
        ]
    sees = torch.stack([column.any(-1).flatten() for column in columns], dim=1)

    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    weighted = call(coupler, (leaves[0], leaves[1])) * moved[1]
    for s, output in enumerate(weighted.flatten(0, 1)):
        (gradient,) = torch.autograd.grad(output.sum(), leaves[which], retain_graph=True, allow_unused=True)
        if gradient is not None:
            sees[s] |= (gradient != 0).reshape(B * L, -1).any(1)
    return sees.fill_diagonal_(False)


@torch.no_grad()
def halve(coupler: Coupler, inputs: Inputs, moved: Inputs, s: int) -> str:
    """Name one token that output ``s`` sees, in ⌈log₂ N⌉ + 2 forwards.

    Output s differs between ``inputs`` and ``moved``, which agree in token s. Of the tokens that differ,
    those that move it together are halved until one is left.
    """

    def seen(tokens: Tensor, which: Sequence[int]) -> bool:
        changed = with_tokens_moved(inputs, moved, which, torch.isin(numbers_BL, tokens))
        return not torch.equal(call(coupler, changed).flatten(0, 1)[s], base_D)

    B, L = inputs[1].shape[:2]
    numbers_BL = torch.arange(B * L, device=inputs[1].device).view(B, L)
    both = range(len(SOURCES))
    base_D = call(coupler, inputs).flatten(0, 1)[s]
    tokens = (inputs[1] != moved[1]).any(-1).flatten().nonzero().flatten()
    while len(tokens) > 1:
        half, rest = tokens.chunk(2)
        if seen(half, both):
            tokens = half
        else:
            inputs, tokens = with_tokens_moved(inputs, moved, both, torch.isin(numbers_BL, half)), rest
    source = SOURCES[0 if seen(tokens, [0]) else 1]
    return pair(s, int(tokens[0]), source, L)


def with_tokens_moved(inputs: Inputs, moved: Inputs, which: Sequence[int], mask_BL: Tensor) -> Inputs:
    """Return a copy of ``inputs``, in ``which`` of them the tokens of ``mask_BL`` taken from ``moved``.

    Always a copy, so that strides and alignment, and with them the rounding, are the same each time.
    """
    copies = [x.clone() for x in inputs]
    for index in which:
        copies[index][mask_BL] = moved[index][mask_BL]
    return copies[0], copies[1]


def describe(found: list[Tensor], length: int) -> str:
    """Put the dependences (N, N), one for each of the sources, into words."""
    kinds: dict[str, str] = {}
    for source, sees in zip(SOURCES, found, strict=True):
        for s, t in sees.nonzero().tolist():
            kinds.setdefault(_kind(s, t, length), pair(s, t, source, length))
    for worst in ("its future", "another sequence"):
        if worst in kinds:
            return kinds[worst]
    return f"causal but not token-isolated: it mixes a token's own past; refused. {kinds['its past']}"


def pair(s: int, t: int, source: str, length: int) -> str:
    """Say that output s moves with an input of token t."""
    seer, seen = (f"token {token % length} of sequence {token // length}" for token in (s, t))
    return f"{seer} sees the {source} of {seen} ({_kind(s, t, length)})"


def _kind(s: int, t: int, length: int) -> str:
    if s // length != t // length:
        return "another sequence"
    return "its future" if t > s else "its past"
