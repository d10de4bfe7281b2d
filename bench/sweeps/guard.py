"""What keeps a sweep whole: one sweep a study, and signals that end it in order."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench.record import cannot_write

POLL_SECONDS = 0.25


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
        ValueError: another sweep is at it and ``wait`` is False, or the folder cannot be written.
    """
    try:
        study.mkdir(parents=True, exist_ok=True)
        file = (study / ".sweep.lock").open("a+")
    except OSError as error:
        raise ValueError(cannot_write(study, error)) from error
    with file:
        if not (held := _try(file)):
            message = f"another sweep{_holder(file)} is at {study}"
            if not wait:
                raise ValueError(f"{message}; wait for it to end, or pass --wait.")
            tell(f"{message}; waiting for it to end …")
        while not held and not given_up():
            time.sleep(POLL_SECONDS)
            held = _try(file)
        if held:
            with suppress(OSError):  # a full disk; the name of the holder is a courtesy
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
        yield held


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(cannot_write(Path(file.name).parent, error)) from error
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    text = file.read().strip()
    return f" (process {text})" if text.isdigit() else ""
