"""Named random streams: one seed, independent sequences for independent purposes.

At one seed every coupler starts from the same trunk and the same experts, because the numbers
drawn for the coupler come from a stream of their own.
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
    """The CPU generator states of several named streams; each goes on where it was left.

    ``with streams("init.experts"): ...`` draws from that stream and leaves the global generator
    as it was before.
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
