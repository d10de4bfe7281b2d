"""Slots, and children that end with their sweep."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from bench.sweep.executors.base import Task
from bench.sweep.executors.local import LocalExecutor, slots_for
from tests.sweep._fake import Study


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def ended(executor: LocalExecutor) -> dict[str, int]:
    found: dict[str, int] = {}
    wait_until(lambda: found.update(executor.ended()) or found)
    return found


def task(tmp_path: Path, *code: str, run_id: str = "run0") -> Task:
    command = [sys.executable, "-S", "-E", "-c", "\n".join(code)]
    return Task(run_id, command, tmp_path / f"{run_id}.log", tmp_path / run_id)


def processes_with(marker: str) -> list[int]:
    """Return the processes whose command line holds ``marker``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_cpu_has_a_slot_of_one_thread_a_core():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert slots_for("cpu") == [{"OMP_NUM_THREADS": "1"}] * (cores or 1)
    assert slots_for("cpu", 3) == [{"OMP_NUM_THREADS": "1"}] * 3
    with pytest.raises(ValueError, match="slots is 0; it must be 1 or more"):
        slots_for("cpu", 0)


def test_a_gpu_is_a_slot_by_the_name_it_has_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_for("auto") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for("cuda", 3)] == ["3", "GPU-5", "3"]
    assert slots_for("cpu", 1) == [{"OMP_NUM_THREADS": "1"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="'cuda' is not available"):
        slots_for("cuda")


def test_finding_the_gpus_does_not_start_cuda(monkeypatch):
    """A process that has started CUDA holds memory on the GPU that its runs need."""
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: pytest.fail("CUDA was started"))
    assert slots_for("auto")


def test_a_child_has_its_slots_variables_a_session_of_its_own_and_its_log(tmp_path):
    executor = LocalExecutor([{"SLOT": "a"}, {"SLOT": "b"}])
    code = "import os, sys; print(os.environ['SLOT'], os.getsid(0) == os.getpid(), sys.stdin.read() == '')"
    for run_id in ("run0", "run1"):
        executor.start(task(tmp_path, code, "sys.exit(3)", run_id=run_id))
    found = ended(executor)
    while len(found) < 2:
        found |= ended(executor)
    assert found == {"run0": 3, "run1": 3}
    assert (tmp_path / "run0.log").read_text() == "a True True\n"
    assert (tmp_path / "run1.log").read_text() == "b True True\n"
    executor.start(task(tmp_path, code, "sys.exit(3)", run_id="run2"))
    assert ended(executor) == {"run2": 3}
    assert (tmp_path / "run2.log").read_text() == "a True True\n"


def test_what_a_child_started_ends_with_it(tmp_path):
    """A worker of its loader would go on holding the lock of the run."""
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    worker = f"subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)', '{marker}'])"
    executor = LocalExecutor([{}])
    executor.start(task(tmp_path, "import os, subprocess, sys", worker, "os.kill(os.getpid(), 9)"))
    assert ended(executor) == {"run0": -signal.SIGKILL}
    wait_until(lambda: not processes_with(marker))


def test_it_is_asked_once(tmp_path):
    """A second SIGTERM would make a run leave without a checkpoint."""
    counting = ("import signal, time", "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))",
                "print(1, flush=True)", "for _ in range(8): time.sleep(0.05)")  # fmt: skip
    executor = LocalExecutor([{}])
    executor.start(task(tmp_path, *counting))
    log = tmp_path / "run0.log"
    wait_until(lambda: log.read_text())
    executor.stop("run0")
    wait_until(lambda: "asked" in log.read_text())
    executor.stop("run0")
    assert ended(executor) == {"run0": 0}
    assert log.read_text().count("asked") == 1


def test_one_that_does_not_heed_is_killed_after_its_grace(tmp_path):
    deaf = ("import signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print(1, flush=True)",
            "time.sleep(60)")  # fmt: skip
    executor = LocalExecutor([{}], grace_seconds=0.2)
    executor.start(task(tmp_path, *deaf))
    wait_until(lambda: (tmp_path / "run0.log").read_text())
    executor.stop("run0")
    executor.stop("run0")
    assert executor.ended() == {}
    assert ended(executor) == {"run0": -signal.SIGKILL}
    executor.stop("run0")  # it has ended: nothing happens


@pytest.mark.core("sweep")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of a death")
def test_no_child_outlives_its_sweep(tmp_path):
    """kill -9 of the sweep: its children save their state, and the next call goes on."""
    study = Study(tmp_path)
    runs = study.runs("endless", "endless", "ok")
    sweep = get_context("fork").Process(target=study.sweep, args=(runs, 2))
    sweep.start()
    records = [study.folder / name / "record.json" for name in ("run0", "run1")]
    wait_until(lambda: all(path.exists() for path in records))
    assert len(processes_with(str(study.folder))) >= 2
    sweep.kill()
    sweep.join(20)
    assert sweep.exitcode == -signal.SIGKILL
    wait_until(lambda: not processes_with(str(study.folder)))
    assert [study.record(name)["error"] for name in ("run0", "run1")] == ["stopped from outside"] * 2
    study.calls()
    assert study.sweep(study.runs("ok", "ok", "ok")).counts == {"ok": 3}
    assert study.calls() == ["run0 --resume", "run1 --resume", "run2"]
