"""Token isolation by values, in as few forwards as can be: for couplers of which one takes long.

Each token's inputs are there in three versions, and each forward gives every token one of them.
Where a token has the same version twice, its output must be the same, bit for bit. So a token
divides the forwards into three parts; two different divisions into equally many parts never refine
each other, so where every token has its own, there are for each ordered pair s, t two forwards in
which s has the same version and t another. R forwards have (3ᴿ⁻¹ − 2ᴿ + 1) / 2 divisions: 7 are
enough for 256 tokens, 9 for 2048.
Shapes: R forwards, B batch, L length, N = B·L tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gate.dependence import halve, with_tokens_moved
from bench.gate.subject import Inputs, call
from gnnmoe.couplers.base import Coupler

VERSIONS = 3
BOTH = (0, 1)  # expert outputs and layer input


class Leak(NamedTuple):
    """A token with the same version in two forwards, and another output."""

    forwards: tuple[int, int]
    token: int


class FewForwards:
    """The forwards of one coupler on three versions of its inputs; each is done once a mode."""

    def __init__(self, coupler: Coupler, versions: Sequence[Inputs]) -> None:
        self.coupler, self.versions = coupler, versions
        self._done: dict[tuple[int, str], Tensor] = {}
        shape = versions[0][1].shape[:2]
        self.version_RBL = divisions(shape.numel()).view(-1, *shape).to(versions[0][1].device)

    def __len__(self) -> int:
        return len(self.version_RBL)

    def inputs(self, forward: int) -> Inputs:
        """Return the inputs of one forward, as copies with the same strides each time."""
        chosen = self.versions[0]
        for version in range(1, VERSIONS):
            chosen = with_tokens_moved(
                chosen, self.versions[version], BOTH, self.version_RBL[forward] == version
            )
        return chosen

    @torch.no_grad()
    def outputs(self, modes: Sequence[str]) -> Tensor:
        """Return all outputs (R, B, L, D), the forwards in each of ``modes`` in turn."""
        return torch.stack([self._output(r, modes[r % len(modes)]) for r in range(len(self))])

    def _output(self, forward: int, mode: str) -> Tensor:
        if (forward, mode) not in self._done:
            self.coupler.train(mode == "train")
            self._done[forward, mode] = call(self.coupler, self.inputs(forward))
        return self._done[forward, mode]

    def leak(self, *modes: str) -> Leak | None:
        """Return a token whose outputs differ where its inputs do not, if any does; ``modes`` take turns."""
        outputs_RBLD = self.outputs(modes)
        for version in range(VERSIONS):
            has_RBL = self.version_RBL == version
            first_BL = has_RBL.int().argmax(0)
            expected_BLD = outputs_RBLD.take_along_dim(first_BL[None, ..., None], 0)[0]
            differs_RBL = has_RBL & (outputs_RBLD != expected_BLD).any(-1)
            if differs_RBL.any():
                forward, sequence, position = differs_RBL.nonzero()[0].tolist()
                first = int(first_BL[sequence, position])
                return Leak((first, forward), sequence * first_BL.shape[1] + position)
        return None

    def explain(self, leak: Leak, mode: str) -> str:
        """Name one token that the token of ``leak``, which was found in ``mode``, sees."""
        before, after = (self.inputs(forward) for forward in leak.forwards)
        return halve(self.coupler.train(mode == "train"), before, after, leak.token)


def divisions(tokens: int) -> Tensor:
    """Return the version (R, N) of each token in each forward: a division into three parts for each token.

    As few forwards as have enough divisions; of more than enough, evenly spaced ones are taken.
    """
    forwards = next(r for r in itertools.count(VERSIONS) if (3 ** (r - 1) - 2**r + 1) // 2 >= tokens)
    found = [
        (0, *rest) for rest in itertools.product(range(VERSIONS), repeat=forwards - 1) if _in_order(rest)
    ]
    return torch.tensor([found[token * len(found) // tokens] for token in range(tokens)]).T


def _in_order(rest: tuple[int, ...]) -> bool:
    """Return whether both other versions occur, 1 before 2, so that no division comes twice."""
    return 2 in rest and 1 in rest[: rest.index(2)]
