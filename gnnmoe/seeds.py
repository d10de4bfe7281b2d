"""Named random streams: one seed gives an independent sequence of random numbers for each purpose.

The coupler draws from a stream of its own. With the same seed, all couplers therefore start from the same
trunk and experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def stream_seed(seed: int, name: str) -> int:
    """Return the 63-bit seed of the stream ``name`` (such as ``"init.experts"``) under ``seed``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RandomStreams:
    """The states of several named random streams on the CPU. Each stream continues where it stopped.

    ``with streams("init.experts"): ...`` draws from that stream. After the block, torch's global generator
    is as it was before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states: dict[str, Tensor] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Make ``name`` the source of torch's global CPU random numbers inside the block."""
        import torch

        outside = torch.get_rng_state()
        try:
            if name in self._states:
                torch.set_rng_state(self._states[name])
            else:
                torch.default_generator.manual_seed(stream_seed(self.seed, name))
            yield
            self._states[name] = torch.get_rng_state()
        finally:
            torch.set_rng_state(outside)
