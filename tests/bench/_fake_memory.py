"""A device of made-up size, so that a search can be tried without filling a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.record import Memory, not_measured

NOT_READ = not_measured("a made-up device has no such quantity")


@dataclass
class FakeMemory:
    """A step on ``batch_size`` sequences takes ``fixed_bytes + batch_size * bytes_per_sample``.

    Beyond ``limit_bytes`` it raises the error that CUDA's allocator does. Beyond
    ``retry_bytes`` it runs, but the allocator had to retry.
    """

    fixed_bytes: int
    bytes_per_sample: int
    limit_bytes: int
    retry_bytes: int | None = None
    tried: list[int] = field(default_factory=list)
    """Every size that was begun, in order."""
    peak: int = 0

    def bytes_of(self, batch_size: int) -> int:
        return self.fixed_bytes + batch_size * self.bytes_per_sample

    def step(self, batch_size: int) -> int:
        """Do a step and return its size."""
        self.tried.append(batch_size)
        if self.bytes_of(batch_size) > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {self.bytes_of(batch_size)} bytes"
            )
        self.peak = max(self.peak, self.bytes_of(batch_size))
        return batch_size

    def meter(self) -> FakeMeter:
        return FakeMeter(self)


class FakeMeter:
    """Reads a ``FakeMemory`` through the protocol of ``bench.measure.memory``."""

    name = "fake"

    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory

    def measure(self, step: Callable[[], object], owners: tuple[Any, ...] = ()) -> Memory:
        del owners
        self.memory.peak = 0
        step()
        peak, retry = self.memory.peak, self.memory.retry_bytes
        return Memory(
            meter=self.name,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=peak,
            peak_active_bytes=peak,
            allocator_retries=int(retry is not None and peak > retry),
            device_used_bytes=NOT_READ,
            nvml_used_bytes=NOT_READ,
            peak_by_part_bytes=NOT_READ,
            process_peak_bytes=NOT_READ,
            by_part=NOT_READ,
            by_phase=NOT_READ,
        )
