"""Sweeps on a real Ray cluster of two workers: every way a task can end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from bench.sweep.__main__ import main
from bench.sweep.executors.base import GRACE_SECONDS, Resources, Task, Wanted
from bench.sweep.executors.ray import RayExecutor, capacity, connect, import_ray
from bench.sweep.outcome import SweepResult
from tests.sweep._clusters import needs_ray, ray_cluster
from tests.sweep._fake import Study
from tests.sweep.test_local import processes_with, wait_until

NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 3.0}},
    {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 100.0}},
]


@pytest.fixture(scope="module")
def address():
    with ray_cluster() as found:
        yield found


@pytest.fixture
def executor(address, tmp_path):
    """Return what makes an executor of that cluster; a sweep closes it."""

    def made(slots: int = 2, grace: float = GRACE_SECONDS) -> RayExecutor:
        ray = import_ray()
        connect(ray, address)
        return RayExecutor(ray, Wanted(device="cpu", logs=tmp_path), slots, grace)

    return made


@needs_ray
def test_each_end_of_a_child_is_what_it_is_on_this_machine(tmp_path, executor):
    study = Study(tmp_path)
    runs = study.runs("ok", "dies", "refused", "raises", "oom", "is ended by others")
    result = study.sweep(runs, executor=executor())
    statuses = [result.outcomes[run.run_id].status for run in runs]
    assert statuses == ["ok", "crashed", "refused", "crashed", "oom", "interrupted"]
    assert result.outcomes["run1"].error == "killed by signal 9 (SIGKILL), perhaps for memory"
    assert result.outcomes["run2"].error == "this cannot be run."


@needs_ray
def test_a_killed_worker_leaves_an_interrupted_run_that_the_next_call_completes(tmp_path, executor):
    study = Study(tmp_path)
    given = executor()
    result: list[SweepResult] = []
    runs = study.runs("endless", "ok")
    sweep = threading.Thread(target=lambda: result.append(study.sweep(runs, executor=given)), daemon=True)
    sweep.start()
    record = study.folder / "run0" / "record.json"
    wait_until(record.exists, 60)
    (child,) = processes_with(str(study.folder / "run0"))
    os.kill(parent_of(child), signal.SIGKILL)
    sweep.join(60)
    assert not sweep.is_alive()
    assert result[0].outcomes["run0"].status == "interrupted"
    assert result[0].outcomes["run1"].status == "ok"
    assert result[0].exit_status == 1
    wait_until(lambda: not processes_with(str(study.folder / "run0")))
    assert study.record("run0")["status"] == "interrupted"
    study.calls()
    assert study.sweep(study.runs("ok", "ok"), executor=executor()).counts == {"ok": 2}
    assert study.calls() == ["run0 --resume"]


@needs_ray
def test_what_is_stopped_saves_its_state_and_what_waits_never_begins(tmp_path, executor):
    """Three tasks for two workers."""
    study, given = Study(tmp_path), executor(slots=3)
    runs = study.runs("endless", "endless", "ok")
    (study.folder / ".logs").mkdir(parents=True)
    with closing(given):
        for run in runs:
            log = study.folder / ".logs" / f"{run.run_id}.log"
            given.start(Task(run.run_id, study.command(run), log, run.folder))
        wait_until((study.folder / "run0" / "record.json").exists, 60)
        wait_until((study.folder / "run1" / "record.json").exists, 60)
        wait_until(lambda: given.queued() == ["run2"])
        for run in reversed(runs):
            given.stop(run.run_id)
        found: dict[str, int] = {}
        wait_until(lambda: found.update(given.ended()) or len(found) == 3, 60)
    assert found == {"run0": 130, "run1": 130, "run2": -signal.SIGTERM}
    assert study.record("run0")["error"] == "stopped from outside"
    assert not (study.folder / "run2").exists()


@needs_ray
def test_an_address_that_does_not_answer(tmp_path, small_data_dir, capsys):
    flags = ["--executor", "ray", "--address", "127.0.0.1:9"]
    assert "error: no Ray cluster answers at 127.0.0.1:9" in refused(tmp_path, small_data_dir, flags, capsys)


def test_without_the_package(tmp_path, small_data_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'gnnmoe[ray]'" in refused(tmp_path, small_data_dir, ["--executor", "ray"], capsys)


def test_a_cluster_has_room_for_as_many_runs_as_fit_into_its_living_nodes():
    assert capacity(NODES, Resources(cpus=1)) == 11
    assert capacity(NODES, Resources(cpus=2)) == 5
    assert capacity(NODES, Resources(cpus=4, gpus=1)) == 2
    assert capacity(NODES, Resources(cpus=2, gpus=2, processes=2)) == 1
    with pytest.raises(ValueError, match="asks for 4 CPUs and 4 GPUs"):
        capacity(NODES, Resources(cpus=4, gpus=4, processes=4))


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def refused(tmp_path: Path, data_dir: Path, flags: list[str], capsys) -> str:
    """Return what is said of a sweep that is refused, with exit status 2 and nothing written."""
    places = ["--results-dir", str(tmp_path / "results"), "--data-dir", str(data_dir)]
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        main(["--sweep", "coupler=mean", "min_steps_per_epoch=1", *places, *flags])
    assert stopped.value.code == 2
    assert not (tmp_path / "results").exists()
    assert time.monotonic() - began < 60
    return capsys.readouterr().err


@pytest.mark.slow
@needs_ray
def test_one_that_does_not_heed_is_killed_after_its_grace(tmp_path, executor):
    study = Study(tmp_path)
    result = study.sweep(study.runs("deaf"), executor=executor(grace=0.5), run_timeout="1.5s")
    assert result.counts == {"timeout": 1}, study.output.getvalue()
    assert not processes_with(str(study.folder / "run0"))


@pytest.mark.slow
@needs_ray
def test_a_run_that_no_node_can_take_is_refused(address, tmp_path, small_data_dir, capsys):
    flags = ["--executor", "ray", "--ray-address", address, "--cpus-per-run", "64"]
    assert refused(tmp_path, small_data_dir, flags, capsys) == (
        "error: a run asks for 64 CPUs and 0 GPUs, and no node of the Ray cluster has them (at most 2 CPUs, "
        "0 GPUs); lower --cpus-per-run, or pass --slots where the cluster grows by itself.\n"
    )
