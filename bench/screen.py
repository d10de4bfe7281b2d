"""The screen: what is printed is shown where it can be shown, and never ends the work.

A terminal can be closed, a pipe broken, a disk full, an encoding too small. A line that cannot be written is
lost. The exit status says what became of the work, not of its output.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class GuardedStream:
    """A text stream whose writes never raise; a letter that its encoding lacks becomes "?"."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            self._tried(lambda: stream.reconfigure(errors="replace"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if the stream takes it; return its length in any case."""
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered if the stream takes it."""
        self._tried(self._stream.flush)

    def finish(self) -> None:
        """Send what cannot be written to the null device: else Python tries again, and exits with 120."""
        if not self._tried(self._stream.flush):
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())

    @staticmethod
    def _tried(output: Callable[[], object]) -> bool:
        """Return whether the output went through."""
        try:
            output()
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False
        return True


def guard_screen() -> None:
    """Guard stdout and stderr of this process; each command calls it first, and a second call does nothing.

    A file of the run must not get the number of a closed stdout or stderr: libraries write to that number. A
    size of the terminal in COLUMNS or LINES that is no number above 0 counts as unknown.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        if not isinstance(stream, GuardedStream):
            guarded = GuardedStream(stream)
            setattr(sys, name, guarded)
            atexit.register(guarded.finish)
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        if not size.isdecimal() or not size.strip("0"):
            os.environ.pop(name, None)
