"""A profile of training steps: a trace for a viewer, and the operations that cost the most."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP_STEPS, STEPS = 1, 2
COSTLIEST = 5
TRACE, SNAPSHOT = "trace.json.gz", "memory_snapshot.pickle"
SNAPSHOT_EVENTS = 100_000  # allocations and frees that a snapshot keeps


@dataclass(frozen=True)
class Operation:
    """One kind of operation: its own time, without that of the operations that it calls."""

    name: str
    share: float
    """Of the own time of all operations, on the GPU where there is one."""
    calls: int
    """In one step."""


def profile_steps(step: Callable[[int], object], folder: Path, device: torch.device) -> list[Operation]:
    """Write a trace of two steps into ``folder``; return the costliest operations, the costliest first.

    The trace (chrome://tracing, ui.perfetto.dev) is trace.json.gz. On CUDA a third step writes
    memory_snapshot.pickle too, every allocation with its stack (pytorch.org/memory_viz).
    A profiled step is slower than others, so this is no time to compare by.
    """
    on_cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on stderr that it starts and stops
    for number in range(WARM_UP_STEPS):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_cuda)]
    with profile(activities=activities) as profiler:
        for number in range(STEPS):
            step(number)
        _wait(device)
    profiler.export_chrome_trace(str(folder / TRACE))
    if on_cuda:
        _snapshot(step, folder, device)
    return _costliest(profiler.key_averages(), on_cuda)


def _costliest(averages: Iterable[Any], on_cuda: bool) -> list[Operation]:
    """Return the operations with most time of their own; on CUDA that of the kernels that they launched.

    There the kernels have rows too, which would count everything twice; their sum is the whole.
    """
    rows = list(averages)
    operations = [row for row in rows if row.device_type.name == "CPU"]
    own = attrgetter("self_device_time_total" if on_cuda else "self_cpu_time_total")
    kernels = [row for row in rows if row.device_type.name == "CUDA" and not row.is_user_annotation]
    total = sum(own(row) for row in (kernels if on_cuda else operations))
    costliest = sorted((row for row in operations if own(row) > 0), key=own, reverse=True)[:COSTLIEST]
    return [Operation(row.key, own(row) / total, round(row.count / STEPS)) for row in costliest]


def _snapshot(step: Callable[[int], object], folder: Path, device: torch.device) -> None:
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_EVENTS)
    try:
        step(0)
        _wait(device)
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
