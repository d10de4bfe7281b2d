"""Something that may run out of memory, and all of that memory back where it does."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from bench.device import is_out_of_memory, release_freed_memory

T = TypeVar("T")


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
