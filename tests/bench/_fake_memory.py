"""A device of made-up size, so that a search can be tried without filling a real one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class FakeMemory:
    """A step on ``batch_size`` sequences takes ``fixed_bytes + batch_size * bytes_per_sample``.

    Beyond ``limit_bytes`` it raises the error that CUDA's allocator does.
    """

    fixed_bytes: int
    bytes_per_sample: int
    limit_bytes: int
    tried: list[int] = field(default_factory=list)
    """Every size that was begun, in order."""

    def bytes_of(self, batch_size: int) -> int:
        return self.fixed_bytes + batch_size * self.bytes_per_sample

    def step(self, batch_size: int) -> int:
        """Do a step and return its size."""
        self.tried.append(batch_size)
        if self.bytes_of(batch_size) > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {self.bytes_of(batch_size)} bytes"
            )
        return batch_size
