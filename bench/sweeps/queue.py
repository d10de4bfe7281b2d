"""The runs that wait for a slot, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.sweeps.executor import PlannedRun
from bench.sweeps.folders import is_busy
from bench.sweeps.forecast import Forecast

BUSY_SECONDS = 1.0


@dataclass
class Waiting:
    """A run that waits."""

    run: PlannedRun
    flags: tuple[str, ...] | None = None
    """How to start it; None: as its folder says when its turn comes."""
    not_before: float = 0.0
    told: bool = False


class Queue:
    """Hands out the first run that may start and is expected to end before ``deadline``."""

    def __init__(self, deadline: float | None, forecast: Forecast, tell: Callable[[str], None]) -> None:
        self.waiting: list[Waiting] = []
        self.nothing_fits = False
        """Whether the last ``next`` saw that no run can end before the deadline any more."""
        self._deadline, self._forecast, self._tell = deadline, forecast, tell

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, run: PlannedRun) -> None:
        """Put a run at the end."""
        self.waiting.append(Waiting(run))

    def add_busy(self, run: PlannedRun) -> None:
        """Put a run at the end that another process is at."""
        self.waiting.append(Waiting(run, not_before=time.monotonic() + BUSY_SECONDS))

    def add_first(self, run: PlannedRun, flags: tuple[str, ...]) -> None:
        """Put a run at the front, to be started with these flags."""
        self.waiting.insert(0, Waiting(run, flags))

    def next(self) -> Waiting | None:
        """Take the first run that may start now; None: there is none.

        Raises:
            Unwritable: a run's lock cannot be made.
        """
        now = time.monotonic()
        for place, waiting in enumerate(self.waiting):
            if waiting.not_before > now:
                continue
            expected = self._forecast.expected(waiting.run) if self._deadline is not None else None
            if self._deadline is not None and now + (expected or 0.0) > self._deadline:
                continue
            if is_busy(waiting.run):
                waiting.not_before = now + BUSY_SECONDS
                if not waiting.told:
                    self._tell(f"{waiting.run.label}: another process is at it; waiting for that")
                waiting.told = True
                continue
            return self.waiting.pop(place)
        self.nothing_fits = bool(self.waiting) and all(waiting.not_before <= now for waiting in self.waiting)
        return None
