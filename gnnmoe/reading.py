"""Reading a file that may be anything: a pipe without a writer, a device without an end, a huge file."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from gnnmoe.config import Refused, brief

MOST_BYTES = 2**26
"""The most bytes of a text that is read whole, 64 MiB; records and sweep files have less than 1 MiB."""

PART_BYTES = 2**20


def from_home(path: Path, what: str) -> Path:
    """Return a path with the home folder in place of ~, which a shell replaces only in some places.

    Raises:
        Refused: no home folder is known; the message begins with ``what``, the flag or variable of the path.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        why = "this home folder is not known; give the path in full."
        raise Refused(f"{what} is {brief(str(path))}: {why}") from error


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file; ``strerror`` says why.
    """
    try:  # without O_NONBLOCK, a pipe without a writer would never open
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: as ``open_file``, or the file has more than ``most`` bytes.
    """
    with open_file(path) as file:
        data = read_at_most(file, most) if os.fstat(file.fileno()).st_size <= most else None
    if data is None:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20:,} MiB", str(path))
    return data


def read_at_most(file: BinaryIO | io.BufferedIOBase, most: int) -> bytes | None:
    """Return the rest of a file; None if it has more than ``most`` bytes.

    ``file.read(most)`` would ask for ``most`` bytes of memory, however short the file is.
    """
    parts, left = [], most + 1
    while left and (part := file.read(min(left, PART_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts) if left else None
