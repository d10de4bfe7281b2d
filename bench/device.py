"""Which device a run uses, what running out of its memory looks like, and all of that memory back.

torch is imported where it is used: the parent of a sweep reads what a child said, and does without it.
"""

from __future__ import annotations

import ctypes
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from gnnmoe.config import Refused

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

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


@dataclass(frozen=True)
class Attempted(Generic[T]):
    """What came of an attempt: a value, or why memory ran out."""

    value: T | None = None
    failure: str | None = None
    """The type and text of the out-of-memory error, which itself is gone; None: it did not run out."""

    @property
    def ran(self) -> bool:
        """Whether it ran to its end."""
        return self.failure is None


def attempt(function: Callable[[], T]) -> Attempted[T]:
    """Run ``function``; where it runs out of memory, free all that it held and say so.

    Only running out of memory is caught (``is_out_of_memory``). What ``function`` gave to others,
    such as the gradients of a model, is theirs to free.
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
    # Only here are the error, its traceback and the frames in it gone, and with them their tensors.
    recover()
    return Attempted(failure=failure)


def at_once(function: Callable[[], T]) -> Attempted[T]:
    """Run ``function`` as ``attempt`` does, but let an out of memory come out.

    For steps of several ranks: the others wait in a sum for one that failed, and none can go back.
    """
    return Attempted(value=function())


def _without_neighbours(text: str) -> str:
    """Return CUDA's message up to its size; the rest tells of other processes and of options."""
    return re.sub(r"(Tried to allocate [\d.]+ \w+\.).*", r"\1", text, flags=re.DOTALL)


def recover() -> None:
    """Give back what nothing uses any more: cycles, the allocator's cache, the C library's heap."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_freed_memory()


def _clear_frames(error: BaseException) -> None:
    """Empty the frames of an error and of those that it came from: others may hold on to the error."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [current.__cause__, current.__context__]
