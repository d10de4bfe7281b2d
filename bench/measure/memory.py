"""Peak memory of one training step, with the name of the meter that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.measure.meters import meter_for
from bench.measure.parts import BLOCK_BYTES, held_bytes
from bench.record import Memory


def measure_memory(step: Callable[[], None], owners: tuple[Any, ...], device: torch.device) -> Memory:
    """Run ``step`` once and return the record's ``memory``, in bytes, but for ``by_phase``.

    On CUDA the allocator's own peaks, reset before. Elsewhere the sum of all live tensors, seen by
    a tracker of every operation; ``owners`` (modules, optimizers, batches) are what is alive
    before the step. The process's peak is coarse: it holds the data and the libraries too.
    """
    return meter_for(device).measure(step, owners).to_record()


def built_bytes(owners: tuple[Any, ...], device: torch.device) -> int:
    """Return the bytes that model, optimizer and batches hold, before the first step or between steps."""
    return sum(held_bytes(owners, BLOCK_BYTES if device.type == "cuda" else 1).values())
