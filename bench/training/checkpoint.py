"""Checkpoints: one file with everything that a run needs to continue bit for bit.

``torch.save`` writes the file, a zip archive. The archive comment is the SHA-256, in hex, of all bytes before
the comment. ``torch.load`` checks nothing; ``load_checkpoint`` checks every byte first.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from bench.device import is_out_of_memory
from bench.files import remove_left_over, replacing, writing
from gnnmoe.config import Refused, brief, shortened
from gnnmoe.reading import open_file

CHECKPOINT_SCHEMA = 3
DIGEST_BYTES = 64  # a SHA-256 in hex
CHUNK_BYTES = 2**20


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists, dicts) whole or not at all.

    Raises:
        NotWritten: the file cannot be written; the old file stays.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path)
        with replacing(path) as file:
            _write_zip(file, {"schema": CHECKPOINT_SCHEMA, **state})
            _append_digest(file)


def _write_zip(file: IO[bytes], state: dict[str, Any]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # of torch's zip writer, raised over the error of the disk
            raise
        cause = error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
        known = isinstance(cause, OSError)
        raise OSError(cause.errno if known else errno.EIO, cause.strerror if known else str(error)) from error


def load_checkpoint(path: Path, remedy: str = "--force starts again") -> dict[str, Any]:
    """Check every byte of a checkpoint and return its state, with tensors on the CPU.

    Raises:
        Refused: the file is missing, damaged, no checkpoint, or of another schema; the message ends
            with the ``remedy``.
    """
    try:
        with open_file(path) as file:
            damage = _damage(file)
            state = _read(file) if damage is None else None
    except FileNotFoundError as error:
        raise Refused(f"there is no checkpoint {path}.") from error
    except OSError as error:
        raise Refused(f"checkpoint {path} cannot be read ({error.strerror}); {remedy}.") from error
    if damage is not None:
        raise Refused(f"checkpoint {path} is damaged: {damage}; {remedy}.")
    if not isinstance(state, dict):
        raise Refused(f"checkpoint {path} holds no state of a run, though its SHA-256 is right; {remedy}.")
    schema = state.get("schema")
    if not isinstance(schema, int) or schema != CHECKPOINT_SCHEMA:
        known = f"this version reads {CHECKPOINT_SCHEMA}"
        raise Refused(f"checkpoint {path} has schema {schema}; {known}; {remedy}.")
    return state


def is_sound(path: Path) -> bool:
    """Return whether there is a checkpoint that ``load_checkpoint`` reads."""
    try:
        return bool(load_checkpoint(path))
    except Refused:
        return False


def _read(file: IO[bytes]) -> Any:
    """Return what ``torch.save`` wrote; None if the file is not from ``torch.save`` or holds other objects.

    Raises:
        OSError: the file cannot be read.
    """
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint raises many types, such as IndexError
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        return None


def _append_digest(file: IO[bytes]) -> None:
    """Make the SHA-256 of a zip archive its comment: the archive ends with the comment's length, here 0."""
    file.seek(-2, os.SEEK_END)
    file.write(DIGEST_BYTES.to_bytes(2, "little"))
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def _damage(file: IO[bytes]) -> str | None:
    """Return what is wrong with the bytes of a checkpoint; None if they are as saved."""
    covered = file.seek(0, os.SEEK_END) - DIGEST_BYTES
    if covered <= 0:
        return f"it is cut short to {covered + DIGEST_BYTES} bytes"
    file.seek(covered)
    digest = file.read(DIGEST_BYTES)
    if not all(byte in b"0123456789abcdef" for byte in digest):
        return "it does not end with its SHA-256 (it is cut short, or another program saved it)"
    return None if _digest(file, covered) == digest else "its SHA-256 differs from the one it was saved with"


def _digest(file: IO[bytes], size: int) -> bytes:
    """Return the SHA-256, in hex, of the first ``size`` bytes of a file."""
    found = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest().encode()


def refuse_unlike(found: Any, expected: Any, name: str = "") -> None:
    """Refuse a value of a checkpoint that does not have the expected form.

    ``expected`` is one of: a type; a tensor (same shape and dtype); a list of one form (a list or tuple of
    such values); ``{str: form}`` (a dict of such values); a dict (the same keys).

    Raises:
        Refused: names the value, its form and the expected form.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        form = expected.get(str)
        if form is None:
            _refuse_other_keys(found, expected, name)
        for key, value in found.items():
            if form is not None and not isinstance(key, str):
                raise Refused(f"{name or 'it'} has the key {brief(key)}; each key must be a text")
            refuse_unlike(value, form or expected[key], f"{name}.{key}" if name else str(key))
    elif isinstance(expected, list) and isinstance(found, list | tuple):
        for place, value in enumerate(found):
            refuse_unlike(value, expected[0], f"{name}.{place}")
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise Refused(f"{name} is {_described(found)}; it must be {_described(expected)}")
    elif isinstance(expected, dict | list | Tensor) or not _is_of(found, expected):
        raise Refused(f"{name or 'it'} is {_described(found)}; it must be {_described(expected)}")


def _refuse_other_keys(found: dict[Any, Any], expected: dict[Any, Any], name: str) -> None:
    before = f"{name}." if name else ""
    missing = [f"{before}{key}" for key in expected if key not in found]
    if missing:
        raise Refused(f"it lacks {', '.join(missing[:2])}{', …' if len(missing) > 2 else ''}")
    unknown = [f"{before}{key}" for key in found if key not in expected]
    if unknown:
        raise Refused(f"it holds {unknown[0]}, which this run does not have")


def _is_of(found: Any, expected: Any) -> bool:
    """Say whether a value has a type, or a type of a union; True and False are not numbers."""
    return isinstance(found, expected) and (not isinstance(found, bool) or expected in (bool, object))


def _described(value: Any) -> str:
    """Describe a value, or a form of ``refuse_unlike``, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__}"
    if isinstance(value, type):
        return "None" if value is type(None) else f"a value of type {value.__name__}"
    return str(value) if hasattr(value, "__args__") else brief(value)  # a union of types, or a value


def differing_fields(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``name: value there → value here`` for every field in which two nested dicts differ."""
    found = []
    for key in sorted(set(there) | set(here), key=brief):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_fields(a, b, prefix)
        elif isinstance(a, Tensor) or a != b:
            found.append(f"{prefix}{_plain(key)}: {_plain(a)} there, {_plain(b)} here")
    return found


def _plain(value: Any) -> str:
    return shortened(value) if isinstance(value, str) else brief(value)
