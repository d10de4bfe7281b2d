"""Meters of the memory of one step: which bytes each reads, and which it cannot know.

*Allocated* is what tensors take, the quantity to compare couplers by. *Reserved* is what the allocator
holds from the device for them, the quantity that decides what fits. *Device-used* is what the device
reports in use, with the context, the libraries and other processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bench.measure.parts import GradientsAtPeak, by_part, held_bytes
from bench.record import Memory, NotMeasured, is_measured, not_measured

if TYPE_CHECKING:
    from bench.measure.tracked import Owner

Bytes = int | NotMeasured
"""A number of bytes, or why it was not read."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a meter read of one step; what it cannot read is null, with the reason."""

    meter: str
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_active_bytes: Bytes
    """Allocated, and freed blocks that another stream may still use."""
    allocator_retries: Bytes
    """How often the device was full and the allocator gave its cache back to try again (a count)."""
    device_used_bytes: Bytes
    """Used of the device after the step, by the driver's account."""
    nvml_used_bytes: Bytes
    """The same by NVML's account, as nvidia-smi shows it."""
    peak_by_part_bytes: dict[str, int] | NotMeasured
    process_peak_bytes: Bytes
    """Resident peak of the process since its start: with the data and the libraries, hence coarse."""

    @property
    def judged_bytes(self) -> int:
        """The bytes that decide what fits: reserved, where nothing reserves allocated, else the process's.

        Raises:
            ValueError: none of them was measured.
        """
        for value in (self.peak_reserved_bytes, self.peak_allocated_bytes, self.process_peak_bytes):
            if is_measured(value):
                return value
        raise ValueError(f"the meter {self.meter} read no peak on this system.")

    def to_record(self) -> Memory:
        """Return the record's ``memory``, as far as one step tells it."""
        return Memory(
            **{each.name: getattr(self, each.name) for each in fields(self)},
            by_part=by_part(self.peak_by_part_bytes), by_phase=not_measured("of one step alone"),
        )  # fmt: skip


class Meter(Protocol):
    """Reads the memory of one step."""

    name: str

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Reading:
        """Run ``step`` once and return its peaks; what it raises comes out again.

        ``owners``: the modules, optimizers and lists of batches that hold memory before the step.
        """
        ...


def meter_for(device: torch.device) -> Meter:
    """Return the meter for a device: its allocator on CUDA, elsewhere a tracker of tensors."""
    return CudaMeter(device) if device.type == "cuda" else TrackedMeter(device)


class TrackedMeter:
    """The sum of all live tensors, at every operation (``bench.measure.tracked``).

    What the allocator below adds is not seen.
    """

    name = "tracked_tensors"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Reading:
        """Run ``step`` once and return its peaks."""
        from bench.measure.tracked import tracked_peaks

        peak, by_part = tracked_peaks(step, owners)
        return Reading(
            meter=self.name,
            peak_allocated_bytes=peak,
            peak_by_part_bytes=by_part,
            process_peak_bytes=process_peak_bytes(),
            **_only_on_cuda(self.device),
        )


class CudaMeter:
    """The peaks of the CUDA allocator, emptied and reset before the step.

    Source: ``torch.cuda.memory_stats``; its retries are counted since the process began, so their
    difference is taken.
    """

    name = "cuda_allocator"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Reading:
        """Reset, wait, run ``step`` once, wait, and return its peaks."""
        device = self.device
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # else an earlier, larger step's cache would count as reserved
        torch.cuda.reset_peak_memory_stats(device)
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        held = held_bytes(owners)
        with GradientsAtPeak(owners, device) as gradients:
            step()
            torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        peak = torch.cuda.max_memory_allocated(device)
        parts = {**held, "gradient": gradients.at_peak_bytes}
        free, total = torch.cuda.mem_get_info(device)
        return Reading(
            meter=self.name,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
            peak_active_bytes=stats.get("active_bytes.all.peak", not_measured("the allocator does not say")),
            allocator_retries=stats.get("num_alloc_retries", 0) - retries,
            device_used_bytes=total - free,
            nvml_used_bytes=nvml_used_bytes(device),
            peak_by_part_bytes={**parts, "rest": peak - sum(parts.values())},
            process_peak_bytes=process_peak_bytes(),
        )


def process_peak_bytes() -> Bytes:
    """Return the peak resident size of the process since its start, in bytes (Linux's VmHWM).

    Not ``ru_maxrss`` of ``getrusage``: a child has that of the process which started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else not_measured("the system has no /proc/self/status with VmHWM")


def nvml_used_bytes(device: torch.device) -> Bytes:
    """Return what NVML says is used of a CUDA device, where nvidia-ml-py is installed."""
    try:
        return int(torch.cuda.device_memory_used(device))
    except ModuleNotFoundError:
        return not_measured("nvidia-ml-py is not installed; pip install 'gnnmoe[gpu]'")
    except Exception as error:  # NVML may be shut off, as in some containers; the run must not end by it
        return not_measured(f"NVML does not answer: {error}")


def _only_on_cuda(device: torch.device) -> dict[str, Any]:
    allocator = not_measured("only a caching allocator reserves memory")
    return {
        "peak_reserved_bytes": allocator,
        "peak_active_bytes": allocator,
        "allocator_retries": allocator,
        "device_used_bytes": not_measured(f"{device.type} memory is the host's"),
        "nvml_used_bytes": not_measured("NVML knows NVIDIA's devices only"),
    }
