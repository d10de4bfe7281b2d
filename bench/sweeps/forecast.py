"""How long a run will take: from its cost and from the runs of the study that this machine has finished."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from typing import Any

from bench.sweeps.executor import Outcome, PlannedRun

START_SECONDS = 5.0  # imports and plots, until a run of this sweep has shown what they take


class Forecast:
    """Expects seconds = cost × the median of (seconds per cost), or the median of the seconds."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._durations: list[float] = []
        self._around: list[float] = []

    def learn(self, run: PlannedRun, outcome: Outcome, elapsed: float | None = None) -> None:
        """Take in a run that ended; ``elapsed`` is what its process took, where this sweep started it."""
        if outcome.seconds is None or (elapsed is None and not made_here(outcome.environment)):
            return
        self._durations.append(outcome.seconds)
        if run.cost:
            self._rates.append(outcome.seconds / run.cost)
        if elapsed is not None:
            self._around.append(max(0.0, elapsed - outcome.seconds))

    def expected(self, run: PlannedRun) -> float | None:
        """Return the seconds that the run's process is expected to take, None where nothing is known."""
        around = statistics.median(self._around) if self._around else START_SECONDS
        if run.cost and self._rates:
            return run.cost * statistics.median(self._rates) + around
        return statistics.median(self._durations) + around if self._durations else None


def made_here(environment: Mapping[str, Any]) -> bool:
    """Whether a record may come from this machine: a record has no host name, by design."""
    here = {"cpu_cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    if any(environment.get(name) != value for name, value in here.items()):
        return False
    if environment.get("device_type") != "cpu":  # asking a GPU for its name would start CUDA here
        return True
    import torch

    from bench.measure.environment import device_name

    return environment.get("device_name") == device_name(torch.device("cpu"))
