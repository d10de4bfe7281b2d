"""The state of the process that a coupler could change: torch's settings that change numbers, and the folder.

A record states some settings (precision, threads) and assumes torch's defaults for the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch.nn.modules import module as nn_module

from gnnmoe.config import Refused

_HOOKS = [name for name in vars(nn_module) if name.startswith("_global_") and name.endswith("_hooks")]
"""Torch's tables of hooks that run in every module."""


class ProcessStateChanged(Refused):
    """A coupler changed the state of the process; the message names the settings."""


def torch_state() -> dict[str, Any]:
    """Return the settings of this process that change numbers, by name; for ``changed_state``.

    Random states are not included, since each run seeds its own.
    """
    return {name: _read(get) for name, (get, _) in _SETTINGS.items()}


def changed_state(before: dict[str, Any]) -> list[str]:
    """Return each setting that differs from ``before``, a result of ``torch_state``: ``name: old → new``."""
    changed = {name: value for name, value in torch_state().items() if value != before[name]}
    return [f"{name}: {_shown(before[name])} → {_shown(value)}" for name, value in changed.items()]


def restore_state(before: dict[str, Any]) -> None:
    """Restore each setting that differs from ``before``, a result of ``torch_state``."""
    for name, (get, put) in _SETTINGS.items():
        if _read(get) != before[name]:  # read one by one, since some settings change others
            put(before[name])


@contextmanager
def unchanged_state(what: str) -> Iterator[None]:
    """Refuse a block that changes the state of the process, and restore that state, also after an error.

    ``what`` names the code of the block in the message.

    Raises:
        ProcessStateChanged: the block ended without an error, and changed a setting.
    """
    before = torch_state()
    changes: list[str] = []
    try:
        yield
    finally:
        changes = changed_state(before)
        if changes:
            restore_state(before)
    if changes:
        raise ProcessStateChanged(
            f"{what} changes settings of the whole process ({'; '.join(changes)}), and a record would not "
            "say so. Give each tensor that needs one its type or device, and leave the settings as they are."
        )


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except Exception as error:  # such as a default device that does not exist here, or a removed folder
        return f"unreadable ({type(error).__name__})"


def _shown(value: Any) -> str:
    if isinstance(value, frozenset):
        return str(len(value))
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flushes_denormals() -> bool:
    """Return whether numbers below the smallest normal number become 0 (``torch.set_flush_denormal``)."""
    smallest = sys.float_info.min
    return smallest / 2 == 0.0


def _set_default_device(device: Any) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "off"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "on"


def _set_deterministic(value: str) -> None:
    torch.use_deterministic_algorithms(value != "off", warn_only=value == "warn")


def _hooks() -> frozenset[int]:
    """Return the ids of the hooks that run in every module."""
    return frozenset(key for name in _HOOKS for key in getattr(nn_module, name))


def _keep_hooks(kept: frozenset[int]) -> None:
    for name in _HOOKS:
        table = getattr(nn_module, name)
        for key in [key for key in table if key not in kept]:
            del table[key]


def _autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    def put(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), put


def _flag(name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Return the functions that read and set an attribute within ``torch.backends``."""
    owner, _, last = name.rpartition(".")

    def put(value: Any) -> None:
        setattr(attrgetter(owner)(torch.backends) if owner else torch.backends, last, value)

    return lambda: attrgetter(name)(torch.backends), put


def _products(name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Return the functions that read and set the precision of a backend's float32 products."""
    get, put = _flag(f"{name}.fp32_precision".lstrip("."))
    return lambda: get().replace("none", "ieee"), put


_CUDA = torch.backends.cuda
_PRODUCTS = " .cuda.matmul .cudnn .cudnn.conv .cudnn.rnn .mkldnn .mkldnn.matmul .mkldnn.conv .mkldnn.rnn"
_FLAGS = """
    cudnn.allow_tf32 cudnn.enabled cudnn.benchmark cudnn.deterministic mkldnn.enabled
    cuda.matmul.allow_fp16_reduced_precision_reduction cuda.matmul.allow_bf16_reduced_precision_reduction
"""
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, _set_default_device),
    **{f"torch.backends{name}.fp32_precision": _products(name) for name in _PRODUCTS.split(" ")},
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "autocast on the CPU": _autocast("cpu"),
    "autocast on CUDA": _autocast("cuda"),
    "deterministic algorithms": (_deterministic, _set_deterministic),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "flushing of denormal numbers": (_flushes_denormals, torch.set_flush_denormal),
    **{f"torch.backends.{name}": _flag(name) for name in _FLAGS.split()},
    "flash attention": (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    "memory-efficient attention": (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    "plain attention": (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    "hooks on every module": (_hooks, _keep_hooks),
    "current folder": (os.getcwd, os.chdir),
}
"""Name of a setting → the functions that read it and set it."""
