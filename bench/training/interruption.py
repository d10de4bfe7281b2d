"""Ctrl-C and SIGTERM: at the end of a step while training, at once elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Turns SIGINT and SIGTERM into a request while a block defers them, else into KeyboardInterrupt.

    A second signal interrupts at once in any case. After ``over`` none does anything.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False
        self._over = False

    def over(self) -> None:
        """Heed no signal from here on: how the run ends is known, and is being written down."""
        self._over = True

    @contextmanager
    def installed(self) -> Iterator[Interruption]:
        """Handle both signals inside the block; outside the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal inside the block only set ``requested``; the block looks when it can stop."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, *_: Any) -> None:
        if self._over:
            return
        if not self._deferring or self.requested:
            raise KeyboardInterrupt
        self.requested = True
