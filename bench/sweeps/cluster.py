"""What executors of clusters share: tasks become work for another machine, and what it left becomes visible.

The other machine writes records and logs into the results folder, which all machines share. A network file
system shows them here a little later, so a task counts as ended only when its record is seen as it was left.
"""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.sweeps.child import End, Work, stamp
from bench.sweeps.executor import GRACE_SECONDS, Resources, Task, Wanted
from gnnmoe.config import Refused

LOST = -signal.SIGTERM
"""The exit status of a task whose machine went away or whose job was cancelled: the next call goes on."""
SHARED = "its machine must see this folder, the Python and the results under the same paths"
VISIBLE_SECONDS, LOOK_SECONDS = 60.0, 0.25
PASSED_ON = ("GNNMOE_", "HF_", "PYTHON")
SECRET = "TOKEN"  # what is given to a cluster lies in its files and its memory
CPUS_OF_A_GPU = 4


def resources_for(device: str, devices: int, cpus: int | None) -> Resources:
    """Return what a run over ``devices`` devices of type ``device``, cpu or cuda, asks of a cluster.

    Raises:
        Refused: ``cpus`` is too small, or cannot be shared evenly.
    """
    on_gpus = device == "cuda"
    cpus = (CPUS_OF_A_GPU if on_gpus else 1) * devices if cpus is None else cpus
    if cpus < 1 or cpus % devices:
        shared = f", to be shared evenly by {devices} devices" if devices > 1 else ""
        raise Refused(f"cpus_per_run is {cpus}; it must be {devices} or more{shared}.")
    return Resources(cpus=cpus, gpus=devices if on_gpus else 0, processes=devices)


@dataclass
class _Given:
    work: Work
    begun: bool = False
    look_at: float = 0.0
    """When to look again whether it is seen."""
    end: End | None = None
    """How it ended, until its record is seen here."""
    give_up_at: float = 0.0


class ClusterExecutor(ABC):
    """Gives tasks to a cluster; what that means is the subclass's."""

    def __init__(self, wanted: Wanted, slots: int, grace_seconds: float = GRACE_SECONDS) -> None:
        self._wanted, self._slots, self._grace = wanted, slots, grace_seconds
        self._given: dict[str, _Given] = {}
        self._look_at = 0.0

    @property
    def slots(self) -> int:
        """How many tasks the cluster has at a time."""
        return self._slots

    def start(self, task: Task) -> None:
        """Give a task to the cluster, at the latest at the next ``submit``.

        Raises:
            OSError: its log cannot be written, or the cluster does not take it.
        """
        record = (task.run.folder / "record.json").absolute()
        begun = task.log.with_suffix(".begun").absolute()
        begun.unlink(missing_ok=True)
        variables = {name: value for name, value in os.environ.items()
                     if name.startswith(PASSED_ON) and SECRET not in name}  # fmt: skip
        asked = self._wanted.resources
        variables["OMP_NUM_THREADS"] = str(asked.cpus // asked.processes)
        work = Work(
            tuple(task.command), variables, Path.cwd(), task.log.absolute(), begun, record, stamp(record)
        )
        self._given[task.run.run_id] = _Given(work)
        self._give(task, work)

    @abstractmethod
    def submit(self) -> None:
        """Give what was started since the last call to the cluster, as one batch where it has batches."""

    def queued(self) -> list[str]:
        """Return the tasks that have not begun."""
        look = time.monotonic() >= self._look_at
        for given in self._given.values():
            if look and not given.begun:
                given.begun = given.work.begun.exists()
        if look:
            self._look_at = time.monotonic() + LOOK_SECONDS
        return [run_id for run_id, given in self._given.items() if not given.begun]

    def ended(self) -> dict[str, int]:
        """Return the exit status (negative: a signal) of each task that ended since the last call."""
        for run_id, end in self._ends().items():
            given = self._given[run_id]
            given.end, given.give_up_at = end, time.monotonic() + VISIBLE_SECONDS
        found = {}
        for run_id, given in list(self._given.items()):
            if given.end is not None and self._is_visible(given):
                found[run_id] = given.end[0]
                given.work.begun.unlink(missing_ok=True)
                del self._given[run_id]
        return found

    @abstractmethod
    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end (SIGTERM), or end it ``at_once`` (SIGKILL)."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the cluster."""

    @abstractmethod
    def _give(self, task: Task, work: Work) -> None:
        """Give the work to the cluster, or keep it for ``submit``."""

    @abstractmethod
    def _ends(self) -> Mapping[str, End]:
        """Return how tasks ended, each once."""

    def _note(self, run_id: str, text: str) -> None:
        """Add what the cluster says to the task's log, where it is judged like a child's own words."""
        with suppress(OSError), self._given[run_id].work.log.open("a") as log:
            log.write(f"{text.rstrip()}\n")

    def _is_visible(self, given: _Given) -> bool:
        """Whether this machine sees the record as the other one left it."""
        assert given.end is not None
        left, now = given.end[1], time.monotonic()
        if left is None or stamp(given.work.record) == left or now > given.give_up_at:
            return True
        if now < given.look_at:
            return False
        given.look_at = now + LOOK_SECONDS
        refresh(given.work.record.parent)
        return stamp(given.work.record) == left


def refresh(folder: Path) -> None:
    """Make a network file system look again at what lies in a folder: a change of mode, to what it was."""
    for path in (folder.parent, folder):
        with suppress(OSError):
            path.chmod(path.stat().st_mode & 0o7777)


def lost(end_status: int = LOST) -> End:
    """Return the end of a task of which nothing more is known."""
    return end_status, None, []
