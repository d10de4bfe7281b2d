"""What keeps a sweep whole: one sweep a study, and signals that end it in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.files import Busy, cannot_write, lock
from gnnmoe.config import Refused


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP: one asks the sweep to stop, a second one to stop at once."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def installed(self) -> Iterator[Signals]:
        """Count inside the block; outside the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: the sweep outlives its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._count) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, *_: Any) -> None:
        self.count += 1


@contextmanager
def sweep_lock(
    study: Path, wait: bool, tell: Callable[[str], None], given_up: Callable[[], bool]
) -> Iterator[bool]:
    """Keep every other sweep out of the study's folder while the block lasts; the kernel frees a dead one's.

    Yields False where ``given_up`` said so while it waited.

    Raises:
        Busy: another sweep is at it, and ``wait`` is False.
        Refused: the folder cannot be written.
    """
    path = study / ".sweep.lock"
    try:
        study.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        if held is None:
            message = f"another sweep{_holder(path)} is at {study}"
            if not wait:
                raise Busy(f"{message}; wait for it to end, or pass --wait.")
            tell(f"{message}; waiting for it to end …")
            held = lock(path, given_up)
    except OSError as error:
        raise Refused(cannot_write(study, error)) from error
    if held is None:
        yield False
        return
    with suppress(OSError):  # a full disk; the name of the holder is a courtesy
        path.write_text(str(os.getpid()))
    try:
        yield True
    finally:
        held.release()


def _holder(lock_file: Path) -> str:
    text = lock_file.read_text(errors="replace").strip()
    return f" (process {text})" if text.isdigit() else ""
