"""What the parts of a running sweep tell each other: runs, tasks, outcomes, and what an executor can do.

A task is one child process, wherever it runs; an executor starts it, says when it has ended, and stops
it. What to start and when, time-outs, budgets and statuses are the same for every executor
(``bench.sweeps.work``). ``bench.sweeps.executors`` finds executors by their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from bench.record import Environment

GRACE_SECONDS = 60.0
FAILED = ("crashed", "diverged", "timeout", "check_failed", "damaged")
RETRIES: dict[str, frozenset[str]] = {
    "failed": frozenset(FAILED), "oom": frozenset({"oom"}), "all": frozenset({*FAILED, "oom"}),
}  # fmt: skip
Stop = Literal["signal", "failure", "budget", "unwritable"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    run_id: str
    label: str
    """What a person reads, such as ``HGNN all_pairs E 4 · seed 0``."""
    arguments: tuple[str, ...]
    """The flags of ``python -m bench.run``, complete but for places."""
    folder: Path
    """``results_dir/study/run_id``."""
    cost: float | None = None
    """FLOPs of the whole run, to compare with other runs; None: unknown."""
    steps: int | None = None
    """Training steps of the whole run, to show; None: unknown."""
    known: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of its record that are known beforehand (config, seed, …), for one that dies before it writes."""
    code: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The hashes of the code that would run, to see whether a record is stale; empty: none is."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user says about a sweep's work."""

    retry: frozenset[str] = frozenset()
    """``failed``, ``oom`` or ``all``: run these again; their earlier records are kept as run_id.1."""
    force: bool = False
    """Run everything again; earlier records are kept as run_id.1."""
    keep_stale: bool = False
    """Keep runs that other code made, and continue those that were interrupted."""
    fail_fast: bool = False
    """The first run that fails stops the sweep."""
    time_budget_seconds: float | None = None
    """Start no run that is not expected to end in time, and interrupt what still runs then. A cheap run
    may start before a dear one that no longer fits; one of which nothing is known starts."""
    run_timeout_seconds: float | None = None
    """End a run that takes longer, with status timeout."""

    @property
    def retried(self) -> frozenset[str]:
        """The statuses that are run again."""
        return frozenset().union(*(RETRIES[name] for name in self.retry))


@dataclass(frozen=True)
class Task:
    """One child process: its command, and the file to which its output is added."""

    run: PlannedRun
    command: Sequence[str]
    log: Path


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one run has."""

    cpus: int = 1
    """Cores, on a cluster; shared evenly by its processes."""
    gpus: int = 0
    """GPUs, on a cluster: none, or one a process."""
    processes: int = 1
    """More than one: torchrun starts a process a device."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a sweep asks of an executor, whichever it is."""

    device: str
    """Type of the runs' device: cpu, cuda or mps."""
    logs: Path
    """The folder of the tasks' logs, where files about tasks may lie."""
    slots: int | None = None
    """Runs side by side; None: as many as the executor finds right."""
    resources: Resources = field(default_factory=Resources)
    """Of each run."""


class Executor(Protocol):
    """Runs tasks, at most ``slots`` at a time."""

    @property
    def slots(self) -> int:
        """How many tasks run side by side."""
        ...

    def start(self, task: Task) -> None:
        """Start a task in a free slot, or give it to a cluster at the next ``submit``.

        Raises:
            OSError: it cannot be started, or its log cannot be written.
        """

    def submit(self) -> None:
        """Give what was started since the last call to the cluster, as one batch where it has batches.

        Raises:
            OSError: the cluster does not take it.
        """

    def queued(self) -> Collection[str]:
        """Return the tasks that a cluster has not begun: their time has not started."""
        ...

    def ended(self) -> dict[str, int]:
        """Return the exit status (negative: a signal) of each task that ended since the last call."""
        ...

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end (SIGTERM), or end it ``at_once`` (SIGKILL)."""

    def close(self) -> None:
        """Let go of the cluster, after all tasks have ended or were stopped at once."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run: a record's status, or ``refused``; and what is worth showing of its record."""

    status: str
    error: str | None = None
    loss_nats: float | None = None
    """On validation, per token."""
    seconds: float | None = None
    """The whole run's, where it is ok and was not resumed."""
    environment: Environment | None = field(default=None, compare=False, repr=False)

    @property
    def failed(self) -> bool:
        """Whether something is wrong that the next call would not simply go on with."""
        return self.status not in ("ok", "interrupted")


@dataclass
class SweepResult:
    """What became of all runs of a sweep."""

    runs: list[PlannedRun]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By run_id; a run that was never started has none."""
    stopped: Stop | None = None
    """Why the sweep ended before its last run: a signal, the first failure (where asked for), its time
    budget, or a results folder that cannot be written."""
    message: str | None = None
    """What could not be written."""
    left_for_budget: int = 0
    """Runs that were not started because they were not expected to end in time."""
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """How many runs have each status; ``left`` counts those without one."""
        return Counter(
            self.outcomes[run.run_id].status if run.run_id in self.outcomes else "left" for run in self.runs
        )

    @property
    def exit_status(self) -> int:
        """2: the results cannot be written; 130: a signal came; 1: a run failed; 0: all that ran is ok."""
        if self.stopped == "unwritable":
            return 2
        if self.stopped == "signal":
            return 130
        outcomes = self.outcomes.values()
        ended_by_others = self.stopped is None and any(found.status == "interrupted" for found in outcomes)
        return int(self.stopped == "failure" or ended_by_others or any(found.failed for found in outcomes))
