"""Which device a run uses, and what running out of its memory looks like.

torch is imported where it is used: the parent of a sweep reads what a child said, and does without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gnnmoe.config import Refused

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)

OUT_OF_MEMORY_TEXTS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
)
"""What torch says in a ``RuntimeError``."""
OUT_OF_MEMORY_OUTPUT = (*OUT_OF_MEMORY_TEXTS, "MemoryError", "out of memory", "std::bad_alloc")
"""What stands in the last lines of a program that ran out of memory."""


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``mps``; auto takes CUDA where there is one.

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
        raise Refused(f"device {name!r} is not available on this machine; available: {', '.join(available)}.")
    return torch.device(name)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch have so many threads on the CPU, and as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether ``error`` means that memory ran out, and nothing else.

    By type, ``torch.OutOfMemoryError`` and Python's ``MemoryError``; by text, what torch raises as a
    plain ``RuntimeError`` (the CPU allocator, cuBLAS, MPS) or ``AcceleratorError`` (the CUDA runtime).
    An error of any other type only quotes such a text. oneDNN's "could not create a primitive" does not
    count: torch 2.13 raises it now and then where memory is short (2 of 160 steps under RLIMIT_DATA), but
    also with 22 GiB free where the kernel refuses executable pages (PR_SET_MDWE).
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        type(error) in (RuntimeError, torch.AcceleratorError)
        and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    )


def keep_freed_memory() -> None:
    """Let the C library keep what tensors on the CPU free, rather than return it to the system.

    Chunks of logits are 32 MiB, the size from which glibc asks the system each time, and fresh
    pages cost more than the arithmetic: an evaluation was measured 1.7 to 2.3 times slower
    without this. Where the C library is another one, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_MMAP_THRESHOLD, 2**25)


def release_freed_memory() -> None:
    """Give what ``keep_freed_memory`` lets the C library keep back to the system (glibc's malloc_trim)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
