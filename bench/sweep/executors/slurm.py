"""Slurm, by submitit: one job per run, and an array for runs that start together.

Slurm requeues a job that it preempts or whose node fails. A job near its time limit saves its state and
requeues itself. Both go on from the checkpoint. A cancelled job is interrupted, and the next call of the
sweep goes on. Jobs outlive a killed sweep: the next call waits for the jobs that run and takes over the
jobs that wait in the queue.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import tyro

from bench.config import Several, flags, seconds_of
from bench.sweep.executors.base import GRACE_SECONDS, SHARED, ClusterExecutor, Wanted, lost, refresh
from bench.sweep.executors.child import ChildEnd, RemoteTask, do
from gnnmoe.config import Refused, brief

SLOTS = 64
SHORTEST_SECONDS = 300.0
POLL_SECONDS, LOST_SECONDS, AGAIN_SECONDS = 5.0, 15.0, 60.0
SAVING_SECONDS = 90  # before its time limit a job is told to save; more than a run's grace
RESTARTS = 100
PROGRAMS = ("sbatch", "squeue", "scancel")
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)


@flags
class Options:
    """Flags of --executor slurm."""

    slurm_partition: str | None = None
    """Partition (default: the cluster's)."""
    slurm_time: str = "4h"
    """Time limit of one job: 30m, 4h. A run that takes longer is requeued and goes on from its checkpoint."""
    slurm_option: Annotated[Several, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of sbatch, such as account=physics, mem=16G, constraint=a100 or exclusive; may be given
    several times."""


def make(options: Options, wanted: Wanted) -> SlurmExecutor:
    """Return the executor for what a sweep wants.

    Raises:
        Refused: submitit is not installed, Slurm is not there, or an option is wrong.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Refused(
            "executor slurm needs submitit, which is not installed; pip install 'gnnmoe[slurm]' installs it."
        ) from None
    slots = SLOTS if wanted.slots is None else wanted.slots
    if slots < 1:
        raise Refused(f"slots is {slots}; it must be 1 or more.")
    parameters = parameters_for(options, wanted)
    queue = SlurmQueue()
    queue.check()
    submitter = submitit.SlurmExecutor(wanted.logs.absolute() / "slurm")
    submitter.update_parameters(**parameters, array_parallelism=slots)
    return SlurmExecutor(wanted, slots, submitter, queue)


def parameters_for(options: Options, wanted: Wanted) -> dict[str, Any]:
    """Return what submitit asks of sbatch for each job.

    Raises:
        Refused: an option is wrong.
    """
    seconds = seconds_of("slurm_time", options.slurm_time)
    if seconds is None or seconds < SHORTEST_SECONDS:
        raise Refused(
            f"slurm_time is {brief(options.slurm_time)}; it must be 5m or more: the last "
            f"{SAVING_SECONDS} s of a job are for saving its state."
        )
    extra: dict[str, Any] = {"requeue": True}
    for option in options.slurm_option:
        name, equals, value = option.partition("=")
        extra[name.strip().lstrip("-")] = value if equals else True
    cpus, gpus = wanted.resources.cpus, wanted.resources.gpus
    parameters: dict[str, Any] = {
        "job_name": wanted.logs.absolute().parent.name,
        "time": math.ceil(seconds / 60),
        "cpus_per_task": cpus,
        "srun_args": [f"--cpus-per-task={cpus}"],  # srun no longer takes the number of the job
        "signal_delay_s": SAVING_SECONDS,
        "additional_parameters": extra,
    }
    if options.slurm_partition is not None:
        parameters["partition"] = options.slurm_partition
    if gpus and not {"gres", "gpus"} & set(extra):
        parameters["gpus_per_node"] = gpus
    return parameters


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
        """Return the state of each job of the user; Slurm forgets a job minutes after its end."""
        answer = _call("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%T")
        if answer.returncode != 0:
            return None
        return {job: state for job, _, state in (line.partition("|") for line in answer.stdout.split())}

    def end(self, jobs: Collection[str], *, at_once: bool) -> None:
        """Cancel jobs; running jobs get SIGTERM, after which the run saves its state, or SIGKILL."""
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


class SlurmExecutor(ClusterExecutor):
    """Gives tasks to ``submitter``, an executor of submitit; ``queue`` knows its jobs."""

    def __init__(
        self,
        wanted: Wanted,
        slots: int,
        submitter: Any,
        queue: SlurmQueue,
        grace_seconds: float = GRACE_SECONDS,
        poll_seconds: float = POLL_SECONDS,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        super().__init__(wanted, slots, grace_seconds)
        self._submitter, self._queue = submitter, queue
        self._poll_seconds, self._lost_seconds = poll_seconds, lost_seconds
        self._batch: dict[str, RemoteTask] = {}
        self._jobs: dict[str, Any] = {}
        self._stopping: dict[str, bool] = {}  # whether at once
        self._unseen: dict[str, float] = {}  # since when a job that left no result is over
        self._dropped: list[str] = []
        self._poll_at = self._submit_at = 0.0
        self._submitted = False

    def submit(self) -> None:
        """Give what was started since the last call to Slurm, as an array where it is more than one task.

        Raises:
            OSError: sbatch refuses the first tasks; later tasks are tried again each minute.
        """
        if not self._batch or time.monotonic() < self._submit_at:
            return
        tasks = list(self._batch.values())
        try:
            with outside_of_jobs():
                jobs = self._submitter.map_array(do_job, tasks, [self._grace] * len(tasks))
        except Exception as error:  # submitit's own type, and what its programs and folders raise
            if not self._submitted:
                self._dropped += self._batch
                self._batch = {}
                raise OSError(f"Slurm does not take them: {' '.join(str(error).split())[:500]}") from error
            self._submit_at = time.monotonic() + AGAIN_SECONDS
            return
        self._submitted = True
        for (run_id, task), job in zip(self._batch.items(), jobs, strict=True):
            task.log.with_suffix(".job").write_text(job.job_id)
            self._jobs[run_id] = job
        self._batch = {}

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end, or end it ``at_once``."""
        if self._batch.pop(run_id, None):
            self._dropped.append(run_id)
        elif run_id in self._jobs and self._stopping.get(run_id) not in (at_once, True):
            self._stopping[run_id] = at_once
            self._poll_at = 0.0

    def close(self) -> None:
        """End the jobs that were stopped and not yet told."""
        self._end_stopping()

    def _give(self, run_id: str, task: RemoteTask) -> None:
        known = task.log.with_suffix(".job")
        if known.exists():  # an earlier sweep was killed
            job_id = known.read_text().strip()
            state = (self._queue.states() or {}).get(job_id)
            if state is not None and state not in OVER:
                self._jobs[run_id] = self._submitter.job_class(self._submitter.folder, job_id)
                if state != "PENDING":
                    task.begun.touch()
                return
        self._batch[run_id] = task

    def _end_stopping(self) -> None:
        """Tell Slurm at each look which jobs to end: a job that was about to start may not have heard it."""
        for at_once in (False, True):
            jobs = [self._jobs[name].job_id for name, how in self._stopping.items() if how == at_once]
            if jobs:
                self._queue.end(jobs, at_once=at_once)

    def _ends(self) -> dict[str, ChildEnd]:
        ends = {run_id: lost() for run_id in self._dropped}
        self._dropped = []
        now = time.monotonic()
        if not self._jobs or now < self._poll_at:
            return ends
        self._end_stopping()
        self._poll_at = now + self._poll_seconds
        states = self._queue.states()
        refresh(self._submitter.folder)
        for run_id, job in list(self._jobs.items()):
            end = self._result(run_id, job)
            if end is None and states is not None:
                end = self._loss(run_id, job, states.get(job.job_id), now)
            elif end is None and self._stopping.get(run_id):  # to be ended at once, and Slurm is silent
                end = lost()
            if end is not None:
                ends[run_id] = end
                del self._jobs[run_id]
                self._unseen.pop(run_id, None)
                self._stopping.pop(run_id, None)
                self._given[run_id].task.log.with_suffix(".job").unlink(missing_ok=True)
        return ends

    def _result(self, run_id: str, job: Any) -> ChildEnd | None:
        """Return what the job left, and remove submitit's files about it; None: nothing yet."""
        try:
            kind, value = pickle.loads(job.paths.result_pickle.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        if kind != "success":
            self._note(run_id, f"error: the job cannot start the run ({_last_line(str(value))}); {SHARED}")
            return lost(2)
        for path in job.paths.folder.glob(f"{job.job_id}_*"):
            with suppress(OSError):
                path.unlink()
        return value

    def _loss(self, run_id: str, job: Any, state: str | None, now: float) -> ChildEnd | None:
        """Return the end of a job that left no result; None: it goes on, or its result may yet be seen."""
        if state is not None and state not in OVER:
            self._unseen.pop(run_id, None)
            return None
        begun = self._given[run_id].task.begun.exists()
        patience = 0.0 if run_id in self._stopping else self._lost_seconds
        if begun and now - self._unseen.setdefault(run_id, now) < patience:
            return None
        if state == "OUT_OF_MEMORY":
            self._note(run_id, "out of memory, as Slurm says; --slurm-option mem=… asks for more")
            return lost(-signal.SIGKILL)
        if begun or state in (None, "CANCELLED", "PREEMPTED", "NODE_FAIL", "REVOKED"):
            return lost()
        said = _last_line((job.stderr() or "") + (job.stdout() or "")) or "and said nothing"
        self._note(run_id, f"error: the job ended as {state} before it began: {said}")
        return lost(1)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def do_job(task: RemoteTask, grace_seconds: float) -> ChildEnd:
    """Do the task inside a job and return how it ended.

    SIGTERM means that the job ends, by preemption, ``scancel`` or the sweep. It leaves no result then, so
    that only Slurm says whether the job will start again. SIGUSR2 means that the time of the job is nearly
    over: the run saves its state, and the job is requeued.
    """
    end = do(task, (signal.SIGTERM, signal.SIGUSR2), grace_seconds)
    asked = signal.SIGUSR2 in end[2] and end[0] != 0
    if signal.SIGTERM in end[2] or (asked and _requeue()):
        raise SystemExit(128 + signal.SIGTERM)
    return end


def _requeue() -> bool:
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if job is None or restarts >= RESTARTS:
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # a job of it has the array's own id
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return subprocess.run(["scontrol", "requeue", job], timeout=60, check=False).returncode == 0


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the job that the sweep itself is in while the block lasts: its settings would go to sbatch."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        own = ("SLURM_", "SBATCH_", "SUBMITIT_")
        hidden = {name: os.environ[name] for name in os.environ if name.startswith(own)}
        hidden.pop("SLURM_CONF", None)
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
