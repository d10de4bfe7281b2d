"""The memory of one step: its peak, and what a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench.measure.memory import built_bytes, meter_for


def peak_bytes(step: Callable[[], object], owners: tuple[Any, ...], device: torch.device) -> int | None:
    """Run ``step`` once and return the peak of what it and its ``owners`` hold, in bytes.

    What others hold on the device meanwhile does not count. None where the meter cannot tell.
    """
    others = 0
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - built_bytes(owners, device)
    peak = meter_for(device).measure(step, owners).peak_allocated_bytes
    return peak - others if isinstance(peak, int) else None


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor], device: torch.device) -> int:
    """Return how many bytes ``forward`` keeps for its backward, beyond its output and ``known`` tensors.

    On CUDA what the allocator gave and has not got back; elsewhere the storages of all saved tensors.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        output = forward()
        return torch.cuda.memory_allocated(device) - before - output.untyped_storage().nbytes()
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in (*known, output):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
