"""What an executor is, how it is found by its name, and what the executors of clusters share.

A task is one child process, wherever it runs. An executor starts the task, says when it has ended, and stops
it. ``bench.sweep.work`` decides for every executor when a run starts, and about time limits and statuses.

One more executor is one more file, ``bench/sweep/executors/NAME.py``, with three things in it: ``Options``, a
group of flags (``bench.config.flags``) whose names begin with ``NAME_``; ``make(options, wanted)``, which
returns an ``Executor`` or raises Refused with what to do; and no import at the top that a machine may lack.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

import bench.sweep.executors
from bench.config import flags
from bench.sweep.executors.child import ChildEnd, RemoteTask, stamp
from gnnmoe.config import Refused, unknown_name

LOCAL = "local"
GRACE_SECONDS = 60.0
LOST = -signal.SIGTERM
"""The exit status of a task whose machine went away or whose job was cancelled: the next call goes on."""
SHARED = "its machine must see this folder, the Python and the results under the same paths"
VISIBLE_SECONDS, LOOK_SECONDS = 60.0, 0.25
PASSED_ON = ("GNNMOE_", "HF_", "PYTHON")
SECRET = "TOKEN"  # what is given to a cluster lies in its files and its memory
CPUS_OF_A_GPU = 4
Config = TypeVar("Config")


@dataclass(frozen=True)
class Task:
    """One child process: its command, the file to which its output is added, and the run's folder."""

    run_id: str
    command: Sequence[str]
    log: Path
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one run has."""

    cpus: int = 1
    """Cores, on a cluster; its processes share them evenly."""
    gpus: int = 0
    """GPUs, on a cluster: none, or one for each process."""
    processes: int = 1
    """With more than one, torchrun starts a process for each device."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a sweep asks of any executor."""

    device: str
    """Type of the runs' device: cpu, cuda or mps."""
    logs: Path
    """The folder of the tasks' logs, where files about tasks may lie."""
    slots: int | None = None
    """Runs side by side; None: as many as the executor finds right."""
    resources: Resources = field(default_factory=Resources)
    """Of each run."""


class Executor(ABC):
    """Runs tasks, at most ``slots`` at a time."""

    slots: int

    @abstractmethod
    def start(self, task: Task) -> None:
        """Start a task in a free slot, or give it to a cluster at the next ``submit``.

        Raises:
            OSError: it cannot be started, or its log cannot be written.
        """

    @abstractmethod
    def ended(self) -> dict[str, int]:
        """Return the exit status (negative: a signal) of each task that ended since the last call."""

    @abstractmethod
    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end (SIGTERM), or end it ``at_once`` (SIGKILL)."""

    def submit(self) -> None:  # noqa: B027
        """Give what was started since the last call to the cluster, as one batch where it has batches.

        Raises:
            OSError: the cluster does not take it.
        """

    def queued(self) -> Collection[str]:
        """Return the tasks that a cluster has not begun: their time has not started."""
        return ()

    def close(self) -> None:  # noqa: B027
        """Let go of the cluster, after all tasks have ended or were stopped at once."""


# --- executors by name ----------------------------------------------------------------------------


@cache
def executors() -> dict[str, ModuleType]:
    """Return the module of each executor, this machine first: the modules of the folder with a ``make``."""
    names = sorted(each.name for each in iter_modules(bench.sweep.executors.__path__))
    found = {name: importlib.import_module(f"bench.sweep.executors.{name}") for name in names}
    found = {name: module for name, module in found.items() if hasattr(module, "make")}
    return {LOCAL: found.pop(LOCAL), **found}


def with_options(config_type: type[Config]) -> type[Config]:
    """Return a dataclass with the fields of ``config_type`` and, in groups, the flags of every executor."""
    groups = {f"{name}_options": module.Options for name, module in executors().items()}
    namespace: dict[str, Any] = {"__doc__": config_type.__doc__, "__annotations__": groups}
    namespace |= {name: field(default_factory=options) for name, options in groups.items()}
    return flags(type(config_type.__name__, (config_type,), namespace))  # pyright: ignore[reportReturnType]


def check_name(name: str) -> None:
    """Refuse an executor that does not exist.

    Raises:
        Refused: naming the executors that exist.
    """
    if name not in executors():
        raise Refused(unknown_name("executor", name, executors()))


def make_executor(name: str, config: Any, wanted: Wanted) -> Executor:
    """Return the executor ``name`` with its own flags from ``config``, which ``with_options`` made.

    Raises:
        Refused: no executor has this name, its package is missing, or the cluster cannot be reached.
    """
    check_name(name)
    _refuse_flags_of_others(name, config)
    return executors()[name].make(getattr(config, f"{name}_options"), wanted)


def _refuse_flags_of_others(name: str, config: Any) -> None:
    """Refuse flags of another executor: the runs would be elsewhere than the user meant."""
    for other, module in executors().items():
        options, defaults = getattr(config, f"{other}_options"), module.Options()
        given = [
            each.name
            for each in fields(defaults)
            if getattr(options, each.name) != getattr(defaults, each.name)
        ]
        if given and other != name:
            raise Refused(f"{', '.join(given)} is for --executor {other}, and this is {name}; drop it.")


# --- clusters -------------------------------------------------------------------------------------


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
    task: RemoteTask
    begun: bool = False
    look_at: float = 0.0
    """When to look again whether its record is seen."""
    end: ChildEnd | None = None
    """How it ended, until its record is seen here."""
    give_up_at: float = 0.0


class ClusterExecutor(Executor):
    """Gives tasks to a cluster; a subclass says how.

    The other machine writes records and logs into the results folder, which all machines share. A network
    file system shows them here a little later. So a task counts as ended only when this machine sees its
    record as the other machine left it.
    """

    def __init__(self, wanted: Wanted, slots: int, grace_seconds: float = GRACE_SECONDS) -> None:
        self.slots, self._wanted, self._grace = slots, wanted, grace_seconds
        self._given: dict[str, _Given] = {}
        self._look_at = 0.0

    def start(self, task: Task) -> None:
        """Give a task to the cluster, at the latest at the next ``submit``.

        Raises:
            OSError: its log cannot be written, or the cluster does not take it.
        """
        record = (task.folder / "record.json").absolute()
        begun = task.log.with_suffix(".begun").absolute()
        begun.unlink(missing_ok=True)
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(PASSED_ON) and SECRET not in name
        }
        asked = self._wanted.resources
        variables["OMP_NUM_THREADS"] = str(asked.cpus // asked.processes)
        remote = RemoteTask(
            tuple(task.command), variables, Path.cwd(), task.log.absolute(), begun, record, stamp(record)
        )
        self._given[task.run_id] = _Given(remote)
        self._give(task.run_id, remote)

    def queued(self) -> list[str]:
        """Return the tasks that have not begun."""
        look = time.monotonic() >= self._look_at
        for given in self._given.values():
            if look and not given.begun:
                given.begun = given.task.begun.exists()
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
            if given.end is not None and self._is_visible(given, given.end):
                found[run_id] = given.end[0]
                given.task.begun.unlink(missing_ok=True)
                del self._given[run_id]
        return found

    @abstractmethod
    def _give(self, run_id: str, task: RemoteTask) -> None:
        """Give the task to the cluster, or keep it for ``submit``."""

    @abstractmethod
    def _ends(self) -> Mapping[str, ChildEnd]:
        """Return how tasks ended, each once."""

    def _note(self, run_id: str, text: str) -> None:
        """Add what the cluster says to the task's log, where it is judged like the child's own words."""
        with suppress(OSError), self._given[run_id].task.log.open("a") as log:
            log.write(f"{text.rstrip()}\n")

    def _is_visible(self, given: _Given, end: ChildEnd) -> bool:
        """Whether this machine sees the record as the other machine left it."""
        left, now = end[1], time.monotonic()
        if left is None or stamp(given.task.record) == left or now > given.give_up_at:
            return True
        if now < given.look_at:
            return False
        given.look_at = now + LOOK_SECONDS
        refresh(given.task.record.parent)
        return stamp(given.task.record) == left


def refresh(folder: Path) -> None:
    """Make a network file system look at a folder again: change its mode to the same mode."""
    for path in (folder.parent, folder):
        with suppress(OSError):
            path.chmod(path.stat().st_mode & 0o7777)


def lost(end_status: int = LOST) -> ChildEnd:
    """Return the end of a task of which nothing more is known."""
    return end_status, None, []
