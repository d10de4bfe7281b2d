"""Checkpoints: everything that a run needs to go on as if nothing had happened, in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_SCHEMA = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists, dicts) whole or not at all.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"schema": CHECKPOINT_SCHEMA, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
            raise OSError(
                f"{path.name} cannot be written: {error}"
            ) from error  # torch's word for a full disk
        raise


def load_checkpoint(path: Path, remedy: str = "--force starts again") -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU.

    Raises:
        ValueError: there is no such file, or it is no checkpoint, cut short or of another schema;
            with the ``remedy``.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint fails in many ways: an IndexError of the unpickler, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or cut short ({reason}); {remedy}.") from error
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != CHECKPOINT_SCHEMA:
        known = f"this version reads {CHECKPOINT_SCHEMA}"
        raise ValueError(f"checkpoint {path} has schema {schema}; {known}; {remedy}.")
    return state


def differing_fields(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``name: value there → value here`` for every field in which two nested dicts differ."""
    found = []
    for key in sorted(set(there) | set(here)):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_fields(a, b, prefix)
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found
