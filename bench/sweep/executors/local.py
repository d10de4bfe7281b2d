"""Child processes on this machine, in slots: one GPU each, or one thread of the CPU each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.sweep.executors.base import GRACE_SECONDS, Executor, Task, Wanted
from bench.sweep.executors.child import kill_group, spawn
from gnnmoe.config import Refused


def slots_for(device: str, number: int | None = None, devices: int = 1) -> list[dict[str, str]]:
    """Return the environment variables of each slot on ``device`` (auto, cpu, cuda or mps).

    On a CPU there is one slot per core unless ``number`` says otherwise, and each run has one thread. Two
    runs of one thread side by side give 20% more than one run of two threads. The number of threads is
    part of a record's environment, because sums differ with it. With CUDA there is one slot per visible
    GPU; a larger ``number`` puts several runs on one GPU, and their speeds and memory then mean little.
    CUDA is not started here, because a child could not use it after that. A run over several ``devices``
    takes as many cores, with a process each, or GPUs.

    Raises:
        Refused: ``number`` is below 1, or there are no GPUs for cuda, or too few.
    """
    if number is not None and number < 1:
        raise Refused(f"slots is {number}; it must be 1 or more.")
    gpus = _visible_gpus() if device in ("auto", "cuda") else []
    if device == "cuda" and not gpus:
        raise Refused("device 'cuda' is not available on this machine.")
    if gpus or device == "mps":
        having = len(gpus) if gpus else 1
        if devices > having:
            raise Refused(f"devices_per_run is {devices}, but this machine has {having} GPUs.")
    if gpus:
        starts = range(0, len(gpus) - devices + 1, devices)
        groups = [",".join(gpus[start : start + devices]) for start in starts]
        return [{"CUDA_VISIBLE_DEVICES": groups[slot % len(groups)]} for slot in range(number or len(groups))]
    if device == "mps":
        return [{}] * (number or 1)
    return [{"OMP_NUM_THREADS": "1"}] * (number or max(1, _cores() // devices))


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable or 1)


def _visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] if given else [str(number) for number in range(count)]


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    slot: int
    kill_at: float | None = None


class LocalExecutor(Executor):
    """Starts each task in a session of its own, so that Ctrl-C in the terminal reaches the sweep only.

    A child that was asked to stop and does not stop within ``grace_seconds`` is killed. On Linux the
    children are asked to stop when the sweep itself is killed, even by kill -9. For that, the thread that
    starts them must live as long as the sweep, as the main thread does.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], grace_seconds: float = GRACE_SECONDS) -> None:
        self.slots, self._variables, self._grace = len(slots), list(slots), grace_seconds
        self._children: dict[str, _Child] = {}

    def start(self, task: Task) -> None:
        """Start a task in a free slot.

        Raises:
            OSError: it cannot be started, or its log cannot be written.
        """
        taken = {child.slot for child in self._children.values()}
        slot = next(slot for slot in range(self.slots) if slot not in taken)
        process = spawn(task.command, task.log, self._variables[slot])
        self._children[task.run_id] = _Child(process, slot)

    def ended(self) -> dict[str, int]:
        """Return the exit status (negative: a signal) of each task that ended since the last call."""
        found = {}
        for run_id, child in list(self._children.items()):
            if child.kill_at is not None and time.monotonic() > child.kill_at:
                kill_group(child.process.pid)
            status = child.process.poll()
            if status is not None:
                kill_group(child.process.pid)  # workers of its loader would hold the run's lock
                found[run_id] = status
                del self._children[run_id]
        return found

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end; end it and its own children ``at_once`` where asked."""
        child = self._children.get(run_id)
        if child is None:
            return
        if at_once:
            kill_group(child.process.pid)
        elif child.kill_at is None:  # a second signal would make it leave without a checkpoint
            child.process.send_signal(signal.SIGTERM)  # not to its loader's workers: it would crash
            child.kill_at = time.monotonic() + self._grace


@dataclass(kw_only=True)
class Options:
    """No flags of its own."""


def make(options: Options, wanted: Wanted) -> LocalExecutor:  # noqa: ARG001
    """Return the executor for what a sweep wants; raises Refused as ``slots_for``."""
    return LocalExecutor(slots_for(wanted.device, wanted.slots, wanted.resources.processes))
