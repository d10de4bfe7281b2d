"""Runs over several devices: torchrun starts them, and each end is told as a run's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.sweep.__main__ import main
from bench.sweep.executors.base import Task
from bench.sweep.executors.local import LocalExecutor, slots_for
from bench.sweep.outcome import as_one_process, launcher
from bench.sweep.plan import PlannedRun
from tests.sweep._fake import CHILD, Study
from tests.sweep.test_local import processes_with, wait_until

RANK = "import os\nif os.environ['RANK'] == '1':\n    import signal, time\n    time.sleep(60)\n"
"""The second process does nothing for a minute: what is to be seen is the first one's end."""


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path)


def command_in(study: Study, script: Path):
    """Return what makes the command of a run in two processes; the first behaves as its label says."""
    script.write_text(RANK + CHILD)

    def command(run: PlannedRun) -> list[str]:
        start = launcher(2)[: launcher(2).index("--nproc-per-node=2") + 1]
        return [*start, str(script), str(study.template), str(study.calls_file), str(run.folder), run.label]

    return command


@pytest.mark.slow
def test_each_end_is_what_it_is_of_one_process(study, tmp_path):
    runs = study.runs("refused", "raises", "dies")
    result = study.sweep(runs, slots=3, command=command_in(study, tmp_path / "child.py"))
    statuses = [result.outcomes[run.run_id].status for run in runs]
    assert statuses == ["refused", "crashed", "crashed"]
    assert result.outcomes["run0"].error == "this cannot be run."
    assert result.outcomes["run1"].error == "KeyError: 'x'"
    assert result.outcomes["run2"].error == "killed by signal 9 (SIGKILL), perhaps for memory"
    for run_id in ("run1", "run2"):
        assert "torch/distributed" not in study.record(run_id)["error"]
        assert " host " not in study.record(run_id)["error"]
    assert not processes_with(str(study.folder))


def test_only_torchruns_own_log_is_removed():
    """It names its files from the folder that it was started in."""
    assert launcher(1) == (sys.executable, "-m", "bench.run")  # one process is started without torchrun
    for folder in ("", ".venv/lib/python3.11/site-packages/", "/usr/lib/"):
        own = f"W1126 16:36:40.365 29874 {folder}torch/distributed/elastic/multiprocessing/api.py:1] Sending"
        assert as_one_process(2, ["error: this cannot be run.", own]) == (2, ["error: this cannot be run."])
    lines = ["Traceback (most recent call last):", "  File 'a.py'", "KeyError: 'x'"]
    assert as_one_process(1, lines) == (1, lines)
    assert as_one_process(-9, []) == (-9, [])


def test_a_slot_has_as_many_devices_as_a_run(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(5)))
    assert slots_for("cpu", None, 2) == [{"OMP_NUM_THREADS": "1"}] * 2
    monkeypatch.setattr("bench.sweep.executors.local._visible_gpus", lambda: ["0", "3", "5", "6", "7"])
    names = [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for("cuda", None, 2)]
    assert names == ["0,3", "5,6"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for("cuda", 3, 2)] == ["0,3", "5,6", "0,3"]
    with pytest.raises(ValueError, match="devices_per_run is 6, but this machine has 5 GPUs"):
        slots_for("cuda", None, 6)


def test_the_plan_knows_how_many_devices_a_run_has(tmp_path, small_data_dir, capsys, monkeypatch):
    """The number of processes can change the last digits, so it makes another run."""
    started = []
    spawn = "bench.sweep.executors.local.spawn"
    monkeypatch.setattr(spawn, lambda command, *_: started.append(command) or 1 / 0)
    places = ["--results-dir", str(tmp_path / "results"), "--data-dir", str(small_data_dir)]
    for devices in ("1", "2"):
        with pytest.raises(ZeroDivisionError):
            main(["--sweep", "coupler=mean", "min_steps_per_epoch=1", *places, "--devices-per-run", devices])
    ids = [path.stem for path in (tmp_path / "results" / "sweep" / ".logs").glob("*.log")]
    assert len(set(ids)) == 2
    assert "--nproc-per-node=2" in started[1]
    assert "--nproc-per-node=2" not in started[0]


@pytest.mark.slow
def test_all_processes_of_one_that_is_ended_end(study, tmp_path):
    """Asked to, or at once; torchrun's processes are in sessions of their own."""
    executor, make = LocalExecutor([{}] * 2), command_in(study, tmp_path / "child.py")
    runs = study.runs("endless", "deaf")
    (study.folder / ".logs").mkdir(parents=True)
    for run in runs:
        log = study.folder / ".logs" / f"{run.run_id}.log"
        executor.start(Task(run.run_id, make(run), log, run.folder))
    for run in runs:
        wait_until((run.folder / "record.json").exists, 60)
        assert len(processes_with(str(run.folder))) == 3
    executor.stop("run0")
    executor.stop("run1", at_once=True)
    ended: dict[str, int] = {}
    wait_until(lambda: ended.update(executor.ended()) or len(ended) == 2, 60)
    assert study.record("run0")["error"] == "stopped from outside"
    wait_until(lambda: not processes_with(str(study.folder)), 10)
    output = (study.folder / ".logs" / "run0.log").read_text().splitlines()
    assert as_one_process(ended["run0"], output)[0] == -15
