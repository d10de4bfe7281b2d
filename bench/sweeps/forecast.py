"""How long a run will take: from its cost and from the runs of the study that this machine has finished."""

from __future__ import annotations

import os
import platform
import statistics
from functools import cache

from bench.record import Environment
from bench.sweeps.executor import Outcome, PlannedRun

START_SECONDS = 5.0  # imports and plots, until a run of this sweep has shown what they take


class Forecast:
    """Expects seconds = cost × the median of (seconds per cost), or the median of the seconds."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._durations: list[float] = []
        self._around: list[float] = []
        self._medians: list[float | None] = []

    def learn(self, run: PlannedRun, outcome: Outcome, elapsed: float | None = None) -> None:
        """Take in a run that ended; ``elapsed`` is what its process took, where this sweep started it."""
        if outcome.seconds is None or (elapsed is None and not made_here(outcome.environment)):
            return
        self._medians = []
        self._durations.append(outcome.seconds)
        if run.cost:
            self._rates.append(outcome.seconds / run.cost)
        if elapsed is not None:
            self._around.append(max(0.0, elapsed - outcome.seconds))

    def expected(self, run: PlannedRun) -> float | None:
        """Return the seconds that the run's process is expected to take, None where nothing is known."""
        if not self._medians:
            lists = self._rates, self._durations, self._around
            self._medians = [statistics.median(values) if values else None for values in lists]
        rate, duration, around = self._medians
        around = START_SECONDS if around is None else around
        if run.cost and rate is not None:
            return run.cost * rate + around
        return None if duration is None else duration + around


def made_here(environment: Environment | None) -> bool:
    """Whether a record may come from this machine: a record has no host name, by design."""
    system = f"{platform.system()} {platform.machine()}"
    if environment is None or (environment.cpu_cores, environment.system) != (os.cpu_count(), system):
        return False
    if environment.device_type != "cpu":  # asking a GPU for its name would start CUDA here
        return True
    return environment.device_name == _processor()


@cache
def _processor() -> str:
    import torch

    from bench.measure.environment import device_name

    return device_name(torch.device("cpu"))
