"""Peak memory of one training step, with the name of the meter that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.quantity import not_measured


def measure_memory(step: Callable[[], None], owners: tuple[Any, ...], device: torch.device) -> dict[str, Any]:
    """Run ``step`` once and return its peaks in bytes.

    On CUDA the allocator's own peaks, reset before. Elsewhere the sum of all live tensors, seen by
    a tracker of every operation; ``owners`` (modules, optimizers, batches) are what is alive
    before the step. The process's peak is coarse: it holds the data and the libraries too.
    """
    if device.type == "cuda":
        return _cuda_peaks(step, device)
    return {
        "meter": "tracked_tensors",
        **_tracked_peaks(step, owners),
        "peak_reserved_bytes": not_measured("only a caching allocator reserves memory"),
        "device_used_bytes": not_measured(f"{device.type} memory is the host's"),
        "process_peak_bytes": _process_peak(),
    }


def _cuda_peaks(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "meter": "cuda_allocator",
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_by_part_bytes": not_measured("the CUDA allocator does not know parts"),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "device_used_bytes": total - free,
        "process_peak_bytes": _process_peak(),
    }


def _tracked_peaks(step: Callable[[], None], owners: tuple[Any, ...]) -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    modules_and_optimizers = [owner for owner in owners if not isinstance(owner, list)]
    tensors = [t for owner in owners if isinstance(owner, list) for batch in owner for t in batch.values()]
    tracker = MemTracker()
    tracker.track_external(*modules_and_optimizers, *tensors)
    with tracker, see_inside_operators():
        step()
    by_part: dict[str, int] = {}
    for parts in tracker.get_tracker_snapshot("peak").values():
        for part, size in parts.items():
            name = str(getattr(part, "value", part)).lower()
            by_part[name] = by_part.get(name, 0) + int(size)
    total = by_part.pop("total")
    return {"peak_allocated_bytes": total, "peak_by_part_bytes": by_part}


def see_inside_operators() -> TorchDispatchMode:
    """Return a mode that runs operators written in Python step by step, for modes around it.

    The chunked head of torch 2.13 is one; taken as a whole, its chunks of logits would be missed.
    """
    from torch._library.custom_ops import OPDEFS

    class SeeInside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            del types
            operator = OPDEFS.get(func._schema.name) if hasattr(func, "_schema") else None
            return (operator._init_fn if operator else func)(*args, **(kwargs or {}))

    return SeeInside()


def _process_peak() -> int | dict[str, Any]:
    """Return the peak resident size of the process since its start, in bytes (Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return not_measured("the system has no /proc/self/status")
