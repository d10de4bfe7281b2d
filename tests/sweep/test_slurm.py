"""Sweeps by submitit: on its local executor, and on a real Slurm of one node."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.sweep.__main__ import main
from bench.sweep.executors.base import Resources, Task, Wanted
from bench.sweep.executors.slurm import Options, SlurmExecutor, SlurmQueue, outside_of_jobs, parameters_for
from bench.sweep.outcome import SweepResult
from tests.sweep._clusters import needs_slurm, needs_submitit, one_node_slurm, slurm
from tests.sweep._fake import Study
from tests.sweep.test_local import processes_with, wait_until
from tests.sweep.test_ray import parent_of, refused

QUICK = {"poll_seconds": 0.3, "lost_seconds": 1.0}


class LocalQueue(SlurmQueue):
    """The queue of submitit's local executor, whose jobs are processes; their ids are those processes'."""

    def states(self) -> dict[str, str]:
        return {path.name: "RUNNING" for path in Path("/proc").iterdir()
                if path.name.isdigit() and not _is_dead(path)}  # fmt: skip

    def end(self, jobs: Collection[str], *, at_once: bool) -> None:
        for job in jobs:
            with suppress(ProcessLookupError):
                os.kill(int(job), signal.SIGINT if at_once else signal.SIGTERM)


def _is_dead(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def local(tmp_path) -> Callable[..., SlurmExecutor]:
    """Return what makes an executor of tasks for submitit's local executor."""

    def made(slots: int = 2, **settings: Any) -> SlurmExecutor:
        import submitit  # pyright: ignore[reportMissingImports]

        wanted = Wanted(device="cpu", logs=tmp_path / "logs")
        submitter = submitit.LocalExecutor(tmp_path / "logs" / "slurm")
        submitter.update_parameters(timeout_min=5)
        return SlurmExecutor(wanted, slots, submitter, LocalQueue(), **{**QUICK, **settings})

    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    with one_node_slurm() as folder:
        yield folder


@pytest.fixture
def real(cluster, tmp_path) -> Callable[..., SlurmExecutor]:
    """Return what makes an executor of tasks for the real Slurm."""

    def made(slots: int = 4, **settings: Any) -> SlurmExecutor:
        import submitit  # pyright: ignore[reportMissingImports]

        wanted = Wanted(device="cpu", logs=tmp_path / "results" / "study" / ".logs")
        submitter = submitit.SlurmExecutor(wanted.logs / "slurm")
        submitter.update_parameters(**parameters_for(Options(), wanted))
        return SlurmExecutor(wanted, slots, submitter, SlurmQueue(), **{**QUICK, **settings})

    return made


class Sweep:
    """A sweep in a thread, for tests that meddle with its jobs."""

    def __init__(
        self, study: Study, behaviours: tuple[str, ...], executor: SlurmExecutor, **choices: Any
    ) -> None:
        self._result: list[SweepResult] = []
        runs = study.runs(*behaviours)
        self._thread = threading.Thread(
            target=lambda: self._result.append(study.sweep(runs, executor=executor, **choices)),
            daemon=True,
        )
        self._thread.start()

    def result(self) -> SweepResult:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the sweep does not end"
        return self._result[0]


def job_of(study: Study, run_id: str) -> str:
    path = study.folder / ".logs" / f"{run_id}.job"
    wait_until(path.exists, 180)
    return path.read_text()


@needs_submitit
def test_each_end_of_a_child_is_what_it_is_on_this_machine(tmp_path, local):
    study = Study(tmp_path)
    runs = study.runs("ok", "dies", "refused", "raises")
    result = study.sweep(runs, executor=local(slots=4))
    statuses = [result.outcomes[run.run_id].status for run in runs]
    assert statuses == ["ok", "crashed", "refused", "crashed"]
    assert result.outcomes["run1"].error == "killed by signal 9 (SIGKILL), perhaps for memory"
    assert result.outcomes["run2"].error == "this cannot be run."
    assert not list((study.folder / ".logs").glob("*.job"))


@needs_submitit
def test_a_stopped_sweep_lets_its_jobs_save_their_state(tmp_path, local):
    study = Study(tmp_path)
    result = study.sweep(study.runs("endless", "deaf"), executor=local(grace_seconds=0.5), run_timeout="2s")
    assert result.counts == {"timeout": 2}
    assert study.record("run0")["error"].startswith("stopped after its time limit of 2 s")
    assert not processes_with(str(study.folder))


@needs_submitit
def test_a_job_that_vanishes_is_interrupted_and_completed_by_the_next_call(tmp_path, local):
    study = Study(tmp_path)
    sweep = Sweep(study, ("endless",), local())
    wait_until((study.folder / "run0" / "record.json").exists, 180)
    (child,) = processes_with(str(study.folder / "run0"))
    os.kill(parent_of(child), signal.SIGKILL)
    assert sweep.result().counts == {"interrupted": 1}
    wait_until(lambda: not processes_with(str(study.folder / "run0")))
    study.calls()
    assert study.sweep(study.runs("ok"), executor=local()).counts == {"ok": 1}
    assert study.calls() == ["run0 --resume"]


@pytest.mark.slow
@needs_slurm
@needs_submitit
def test_cancelled_jobs_are_completed_by_the_next_call(tmp_path, real):
    """One is cancelled while it runs, one while it waits in the queue."""
    study = Study(tmp_path)
    sweep = Sweep(study, ("endless", "endless", "endless"), real())
    records = [study.folder / f"run{number}" / "record.json" for number in (0, 1, 2)]
    wait_until(lambda: sum(path.exists() for path in records) == 2, 180)
    jobs = [job_of(study, f"run{number}") for number in (0, 1, 2)]
    waiting = next(number for number in (0, 1, 2) if not records[number].exists())
    slurm("scancel", jobs[waiting])
    slurm("scancel", *[job for job in jobs if job != jobs[waiting]])
    assert sweep.result().counts == {"interrupted": 3}
    assert not records[waiting].exists()
    for number in {0, 1, 2} - {waiting}:
        assert study.record(f"run{number}")["error"] == "stopped from outside"
    study.calls()
    assert study.sweep(study.runs("ok", "ok", "ok"), executor=real()).counts == {"ok": 3}
    begun = [f"run{number}" if number == waiting else f"run{number} --resume" for number in (0, 1, 2)]
    assert sorted(study.calls()) == begun


@needs_slurm
@needs_submitit
def test_requeued_jobs_go_on_from_their_checkpoints_in_the_same_sweep(tmp_path, real):
    """Of an array of two, the last comes near its time limit and the other never notices; then that is
    preempted. Each starts again with --resume, also in place of --force."""
    study = Study(tmp_path)
    study.put("crashed", "run1")
    sweep = Sweep(study, ("endless", "endless"), real(), retry="failed")
    first_record, second_record = (study.folder / f"run{number}" / "record.json" for number in (0, 1))
    wait_until((study.folder / "run1.1").exists, 180)  # set aside by --force
    wait_until(lambda: second_record.exists() and first_record.exists(), 180)
    first, last = job_of(study, "run0"), job_of(study, "run1")
    assert (first[-2:], last[-2:]) == ("_0", "_1")
    slurm("scancel", "--signal=USR2", last)
    wait_until(lambda: states() == {first: "None", last: "BeginTime"}, 180)
    assert study.record("run1")["error"] == "stopped from outside"
    slurm("scontrol", "requeue", first)
    wait_until(lambda: states() == {first: "BeginTime", last: "BeginTime"}, 180)
    for job in (first, last):  # Slurm itself would wait two minutes
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: len(study.calls_file.read_text().splitlines()) == 4, 180)
    assert sorted(study.calls()) == ["run0", "run0 --resume", "run1 --force", "run1 --resume"]
    slurm("scancel", first, last)
    assert sweep.result().counts == {"interrupted": 2}


def states() -> dict[str, str]:
    """Return why each job waits, by its id; None, as Slurm says it, where it runs."""
    lines = slurm("squeue", "--noheader", "--array", "--format=%i %r").splitlines()
    return {words[0]: words[1] for words in map(str.split, lines)}


@needs_slurm
@needs_submitit
def test_a_waiting_job_of_a_killed_sweep_is_taken_over(tmp_path, real):
    study = Study(tmp_path)
    (run,) = study.runs("ok")
    first = real()
    slurm("scontrol", "update", "PartitionName=all", "State=DOWN")
    log = run.folder.parent / ".logs" / "run0.log"
    log.parent.mkdir(parents=True)
    first.start(Task(run.run_id, study.command(run), log, run.folder))
    first.submit()
    job = job_of(study, "run0")
    assert list(first.queued()) == ["run0"]
    sweep = Sweep(study, ("ok",), real())
    time.sleep(1.0)
    slurm("scontrol", "update", "PartitionName=all", "State=UP")
    assert sweep.result().counts == {"ok": 1}
    assert study.calls() == ["run0"]
    state = ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    wait_until(lambda: slurm(*state) == "COMPLETED")


@needs_slurm
@needs_submitit
def test_what_sbatch_refuses_stops_the_sweep_with_its_words(cluster, tmp_path, small_data_dir, capsys):
    places = ["--results-dir", str(tmp_path / "results"), "--data-dir", str(small_data_dir)]
    flags = ["--executor", "slurm", "--slurm-partition", "nowhere"]
    assert main(["--sweep", "coupler=mean,GNN", "min_steps_per_epoch=1", *places, *flags]) == 2
    shown = capsys.readouterr().out
    assert "invalid partition specified: nowhere" in shown
    assert "1 runs in" not in shown
    assert "2 left" in shown


# --- what a sweep asks of Slurm, and what is said where there is none; without Slurm ---


def test_without_the_package_or_slurm(tmp_path, small_data_dir, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        said = refused(tmp_path, small_data_dir, ["--executor", "slurm"], capsys)
        assert "pip install 'gnnmoe[slurm]'" in said
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="sbatch, squeue, scancel, which is not on this machine"):
        SlurmQueue().check()


def test_a_job_asks_for_what_its_run_needs(tmp_path):
    wanted = Wanted(device="cuda", logs=tmp_path / "study" / ".logs",
                    resources=Resources(cpus=8, gpus=2, processes=2))  # fmt: skip
    options = Options(slurm_partition="gpu", slurm_time="90m", slurm_option=("account=a=b", "exclusive"))
    assert parameters_for(options, wanted) == {
        "job_name": "study", "partition": "gpu", "time": 90, "cpus_per_task": 8, "gpus_per_node": 2,
        "srun_args": ["--cpus-per-task=8"], "signal_delay_s": 90,
        "additional_parameters": {"requeue": True, "account": "a=b", "exclusive": True},
    }  # fmt: skip
    options = replace(options, slurm_option=("gres=gpu:a100:2",))
    assert "gpus_per_node" not in parameters_for(options, wanted)
    with pytest.raises(ValueError, match="slurm_time is '2m'; it must be 5m or more"):
        parameters_for(Options(slurm_time="2m"), wanted)


def test_a_sweep_inside_a_job_does_not_hand_its_own_job_on(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "here")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    with outside_of_jobs():
        assert os.environ["SLURM_MEM_PER_NODE"] == "1"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with outside_of_jobs():
        assert {name for name in os.environ if name.startswith("SLURM")} == {"SLURM_CONF"}
    assert os.environ["SLURM_JOB_ID"] == "7"
