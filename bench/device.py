"""The device of a run: its threads and its memory, and what running out of memory looks like.

torch is imported where it is used: the parent of a sweep reads the output of its children without torch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from gnnmoe.config import Refused, brief

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``mps``; auto is CUDA where it is available.

    Raises:
        Refused: the machine has no such device.
    """
    import torch

    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        return torch.device("cuda" if "cuda" in available else "cpu")
    if name not in available:
        raise Refused(
            f"device {brief(name)} is not available on this machine; available: {', '.join(available)}."
        )
    return torch.device(name)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Give torch ``number`` threads on the CPU in the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- How much memory there is

UNITS = {
    "B": 1,
    **{"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def format_bytes(count: int) -> str:
    """Return ``1.5 GiB``, ``160.5 MiB`` or ``812 B`` for people to read."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:,.1f} {unit}"
    return f"{count} B"


def device_memory_bytes(device: torch.device) -> int:
    """Return all memory of the device in bytes: on a CPU the host's, or the limit of its control group.

    The memory of other processes is not subtracted. ``set_per_process_memory_fraction`` does not change what
    a CUDA device reports.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return host_memory_bytes()


SIZES = ("embed_dim", "num_experts", "num_layers", "max_seq_length", "vocab_size")
"""The flags that the memory of a training step depends on."""


def refuse_too_large(
    needed_bytes: int, device: torch.device, what: str, sharing: int = 1, lower: Sequence[str] = SIZES
) -> None:
    """Refuse ``what`` (such as "a training step") where it needs more than the whole memory of the device.

    ``sharing`` processes have that memory together, in equal parts. ``lower`` are the flags, two or more,
    that the message tells the user to lower.

    Raises:
        Refused: naming both amounts.
    """
    memory = device_memory_bytes(device) if device.type == "cuda" else host_memory_bytes()
    has = memory // sharing
    if needed_bytes > has:
        raise Refused(
            f"{what} needs at least {format_bytes(needed_bytes)} of memory, and device {device.type} has "
            f"{format_bytes(has)}{' per process' if sharing > 1 else ''}; lower "
            f"{', '.join(lower[:-1])} or {lower[-1]}."
        )


def host_memory_bytes() -> int:
    """Return the host's physical memory in bytes, or the lowest limit of this process's control groups.

    Source: cgroups(7); ``memory.max`` of version 2, ``memory.limit_in_bytes`` of version 1.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount.parent:  # the path may be the host's; a container sees only its end
            limit = group / name
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                limits.append(int(text))
            group = group.parent
    return min(limits)


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed CPU tensors, instead of returning it to the system.

    Chunks of logits are 32 MiB, the size from which glibc asks the system each time. Fresh pages cost more
    than the arithmetic: without this call, an evaluation was measured to be 1.7 to 2.3 times slower. With
    another C library nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # of glibc's mallopt(3)
    _c_library("mallopt", trim_threshold, 2**30)
    _c_library("mallopt", mmap_threshold, 2**25)


def _c_library(function: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # a C library without the function
        getattr(ctypes.CDLL(None), function)(*arguments)


# --- Running out of memory

OUT_OF_MEMORY_TEXTS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
)
"""The texts of torch in a ``RuntimeError``."""
OUT_OF_MEMORY_OUTPUT = (*OUT_OF_MEMORY_TEXTS, "MemoryError", "out of memory", "std::bad_alloc")
"""Texts in the last lines of a program that ran out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that memory ran out, and nothing else.

    By type: ``torch.OutOfMemoryError`` and Python's ``MemoryError``. By text: a plain ``RuntimeError`` of
    torch (the CPU allocator, cuBLAS, MPS) or an ``AcceleratorError`` (the CUDA runtime); an error of any
    other type only quotes such a text. oneDNN's "could not create a primitive" does not count. torch 2.13
    raises it now and then where memory is short (2 of 160 steps under RLIMIT_DATA), but also with 22 GiB free
    where the kernel refuses executable pages (PR_SET_MDWE).
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        type(error) in (RuntimeError, torch.AcceleratorError)
        and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    )


@dataclass(frozen=True)
class Attempted(Generic[T]):
    """The result of an attempt: a value, or why memory ran out."""

    value: T | None = None
    failure: str | None = None
    """The type and text of the out-of-memory error, which itself is gone; None: memory did not run out."""


def attempt(function: Callable[[], T]) -> Attempted[T]:
    """Run ``function``; where it runs out of memory, free all that it held and return the failure.

    Only running out of memory is caught (``is_out_of_memory``). The caller frees what ``function`` gave to
    other objects, such as the gradients of a model.
    """
    failure = None
    try:
        value = function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = f"{type(error).__name__}: {_without_neighbours(str(error))}"
        _clear_frames(error)
    if failure is None:
        return Attempted(value=value)
    # Only here the error, its traceback and its frames are gone, and with them their tensors.
    recover()
    return Attempted(failure=failure)


def at_once(function: Callable[[], T]) -> Attempted[T]:
    """Run ``function`` as ``attempt`` does, but let an out-of-memory error come out.

    For steps of several ranks: the other ranks wait in a sum for a rank that failed, and cannot go back.
    """
    return Attempted(value=function())


def _without_neighbours(text: str) -> str:
    """Return CUDA's message up to its size; the rest is about other processes and about options."""
    return re.sub(r"(Tried to allocate [\d.]+ \w+\.).*", r"\1", text, flags=re.DOTALL)


def recover() -> None:
    """Free what nothing uses any more: cycles, the allocator's cache, the C library's heap."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    _c_library("malloc_trim", 0)  # also what ``keep_freed_memory`` lets it keep


def _clear_frames(error: BaseException) -> None:
    """Empty the frames of an error and of its causes, because other objects may hold the error."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [current.__cause__, current.__context__]
