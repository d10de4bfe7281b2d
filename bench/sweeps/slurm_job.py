"""What a Slurm job does with a run, and what Slurm says of jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from bench.sweeps.child import End, Work, do
from gnnmoe.config import Refused

SAVING_SECONDS = 90  # before its time limit a job is told to save; more than a run's grace
RESTARTS = 100
PROGRAMS = ("sbatch", "squeue", "scancel")
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)


def do_job(work: Work, grace_seconds: float) -> End:
    """Do the work inside a job and return how it ended.

    SIGTERM means that the job ends, by preemption, ``scancel`` or the sweep: no result is left, so that
    only Slurm says whether the job will start again. SIGUSR2 means that its time is nearly over: the
    run saves its state, and the job is requeued.
    """
    end = do(work, (signal.SIGTERM, signal.SIGUSR2), grace_seconds)
    asked = signal.SIGUSR2 in end[2] and end[0] != 0
    if signal.SIGTERM in end[2] or (asked and _requeue()):
        raise SystemExit(128 + signal.SIGTERM)
    return end


def _requeue() -> bool:
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if job is None or restarts >= RESTARTS:
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # one of its jobs has the array's own id
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return subprocess.run(["scontrol", "requeue", job], timeout=60, check=False).returncode == 0


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the job that the sweep itself is in while the block lasts: its settings would go to sbatch."""
    hidden = {name: value for name, value in os.environ.items()
              if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) and name != "SLURM_CONF"}  # fmt: skip
    hidden = hidden if "SLURM_JOB_ID" in hidden else {}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


class JobQueue(Protocol):
    """What a scheduler knows of jobs."""

    def states(self) -> Mapping[str, str] | None:
        """Return the state of each of the user's jobs that it still knows; None: it does not answer."""
        ...

    def end(self, jobs: Collection[str], *, at_once: bool) -> None:
        """Take jobs that wait out of the queue; ask those that run to end, or end them ``at_once``."""


class SlurmQueue:
    """Asks by ``squeue``, which needs no accounting, and ends by ``scancel``."""

    def check(self) -> None:
        """Make sure that Slurm is there and answers.

        Raises:
            Refused: saying what is missing.
        """
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise Refused(
                f"executor slurm needs {', '.join(missing)}, which is not on this machine; run the sweep "
                "where sbatch works, such as a login node of the cluster."
            )
        answer = _call("squeue", "--noheader", "--me")
        if answer.returncode != 0:
            said = answer.stderr.strip().rpartition("\n")[2] or f"exit status {answer.returncode}"
            raise Refused(f"Slurm does not answer: {said}")

    def states(self) -> dict[str, str] | None:
        """Return the state of each of the user's jobs; Slurm forgets one minutes after its end."""
        answer = _call("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%T")
        if answer.returncode != 0:
            return None
        return {job: state for job, _, state in (line.partition("|") for line in answer.stdout.split())}

    def end(self, jobs: Collection[str], *, at_once: bool) -> None:
        """Cancel jobs; those that run are given SIGTERM, which the run heeds, or SIGKILL."""
        if at_once:
            _call("scancel", "--signal=KILL", *jobs)
            _call("scancel", *jobs)
            return
        _call("scancel", "--state=PENDING", *jobs)
        _call("scancel", "--signal=TERM", *jobs)


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
