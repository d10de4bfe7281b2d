"""Executors: one more is one more file, and what executors of clusters share; without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import bench.sweep.executors
from bench.cli import parse
from bench.sweep.__main__ import main
from bench.sweep.executors import base
from bench.sweep.executors.base import (
    ClusterExecutor,
    Resources,
    Task,
    Wanted,
    executors,
    lost,
    make_executor,
    resources_for,
    with_options,
)
from bench.sweep.executors.child import ChildEnd, RemoteTask, do, stamp
from bench.sweep.specification import SweepConfig
from tests.sweep._fake import Study


class FakeCluster(ClusterExecutor):
    """Keeps what it is given; a test says how it ends."""

    def __init__(self, wanted: Wanted, slots: int = 2) -> None:
        super().__init__(wanted, slots)
        self.works: dict[str, RemoteTask] = {}
        self.done: dict[str, ChildEnd] = {}
        self.stopped: list[tuple[str, bool]] = []

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        self.stopped.append((run_id, at_once))
        self.done[run_id] = lost()

    def submit(self) -> None: ...

    def close(self) -> None: ...

    def _give(self, run_id: str, task: RemoteTask) -> None:
        self.works[run_id] = task

    def _ends(self) -> dict[str, ChildEnd]:
        done, self.done = self.done, {}
        return done


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path)


@pytest.fixture
def fake(tmp_path) -> FakeCluster:
    return FakeCluster(Wanted(device="cpu", logs=tmp_path, resources=Resources(cpus=3)))


def given(fake: FakeCluster, study: Study) -> RemoteTask:
    """Give it the first run; its record lies there already, as an earlier attempt left it."""
    study.put("interrupted")
    (run,) = study.runs("ok")
    (study.folder / ".logs").mkdir(exist_ok=True)
    log = study.folder / ".logs" / "run0.log"
    fake.start(Task(run.run_id, ["run", "--resume"], log, run.folder))
    return fake.works["run0"]


def work_in(tmp_path: Path, *code: str, command: tuple[str, ...] = ()) -> RemoteTask:
    command = command or (sys.executable, "-S", "-E", "-c", "\n".join(code))
    record = tmp_path / "record.json"
    return RemoteTask(
        command, {"OF": "ours"}, tmp_path, tmp_path / "log", tmp_path / "begun", record, stamp(record)
    )


def test_a_task_becomes_work_that_another_machine_can_do(fake, study, monkeypatch):
    monkeypatch.setenv("GNNMOE_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("ANYTHING_ELSE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    work = given(fake, study)
    assert work.variables["OMP_NUM_THREADS"] == "3"
    assert work.variables["GNNMOE_CACHE_DIR"] == "/somewhere"
    assert not {"ANYTHING_ELSE", "HF_TOKEN"} & set(work.variables)
    assert work.log.is_absolute()
    assert work.record == (study.folder / "run0" / "record.json").absolute()
    assert work.cwd == Path.cwd()


def test_a_task_ends_when_its_record_is_seen_as_it_was_left(fake, study, monkeypatch):
    """A network file system shows another machine's files late; the old record must not be judged."""
    work = given(fake, study)
    left = (time.time_ns(), 12)
    fake.done["run0"] = (0, left, [])
    assert fake.ended() == {}
    assert fake.ended() == {}
    work.record.write_text("x" * 12)
    os.utime(work.record, ns=(left[0], left[0]))
    assert fake.ended() == {"run0": 0}
    assert fake.ended() == {}


def test_a_record_that_never_comes_is_waited_for_only_so_long(fake, study, monkeypatch):
    monkeypatch.setattr(base, "VISIBLE_SECONDS", 0.1)
    given(fake, study)
    fake.done["run0"] = (1, (1, 1), [])
    assert fake.ended() == {}
    time.sleep(0.15)
    assert fake.ended() == {"run0": 1}


def test_time_counts_from_when_it_begins(fake, study, tmp_path):
    """A time limit of 0.3 s does not touch a task that waits for a second; one that began is stopped."""

    def begin() -> None:
        time.sleep(1.0)
        fake.works["run0"].begun.touch()

    threading.Thread(target=begin).start()
    result = study.sweep(study.runs("endless"), executor=fake, run_timeout="0.3s")
    assert result.counts == {"timeout": 1}
    assert fake.stopped == [("run0", False)]
    assert 1.2 < result.seconds < 10
    lines = [line.split()[0] for line in study.output.getvalue().splitlines()]
    assert lines[:4] == ["1", "queued", "starts", "timeout"]
    assert not fake.works["run0"].begun.exists()


def test_what_never_began_is_left_and_not_interrupted(fake, study):
    result = study.sweep(study.runs("ok", "ok", "ok"), executor=fake, time_budget="0.5s")
    assert result.counts == {"left": 3}
    assert result.left_for_budget == 1
    assert [name for name, _ in fake.stopped] == ["run0", "run1"]


def test_a_child_says_how_it_ended_and_what_its_record_is(tmp_path):
    work = work_in(tmp_path, "import os, sys; print(os.environ['OF'], flush=True)",
                   "open('record.json', 'w').write('new'); sys.exit(3)")  # fmt: skip
    assert do(work, (), 60.0) == (3, stamp(work.record), [])
    assert stamp(work.record) is not None
    assert work.log.read_text() == "ours\n"
    assert work.begun.exists()


def test_signals_are_handed_on_once_and_told_of(tmp_path):
    work = work_in(tmp_path, "import signal, sys, time", "def asked(*_): print('asked', flush=True)",
                   "signal.signal(signal.SIGTERM, asked)", "open('ready', 'w')",
                   "time.sleep(0.8); sys.exit(130)")  # fmt: skip

    def signals() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.2)

    before = signal.getsignal(signal.SIGUSR2)
    threading.Thread(target=signals).start()
    assert do(work, (signal.SIGUSR2,), 60.0) == (130, None, [signal.SIGUSR2] * 2)
    assert work.log.read_text() == "asked\n"
    assert signal.getsignal(signal.SIGUSR2) == before


def test_work_that_begins_again_goes_on(tmp_path):
    """A requeued job has its first command; what it wrote in the meantime decides."""
    for flags, status, expected in (
        ([], None, ["run"]),
        (["--force"], None, ["run", "--force"]),
        (["--resume"], "interrupted", ["run", "--resume"]),
        (["--force"], "interrupted", ["run", "--resume"]),
        ([], "interrupted", ["run", "--resume"]),
        (["--force"], "ok", ["run"]),
    ):
        (tmp_path / "record.json").write_text('{"status": "crashed"}')
        work = work_in(tmp_path, command=("run", *flags))
        if status is not None:
            work.record.write_text(json.dumps({"status": status, "more": 1}))
        assert work.command_now() == expected, (flags, status)


def test_what_a_run_elsewhere_asks_for():
    for arguments, expected in (
        (("cpu", 1, None), (1, 0, 1)),
        (("cpu", 2, 8), (8, 0, 2)),
        (("cuda", 1, None), (4, 1, 1)),
        (("cuda", 2, None), (8, 2, 2)),
    ):
        resources = resources_for(*arguments)
        assert (resources.cpus, resources.gpus, resources.processes) == expected


def test_runs_on_gpus_elsewhere_are_planned_on_a_machine_without(tmp_path, small_data_dir, capsys):
    places = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path / "results"), "--dry-run"]
    flags = ["--executor", "slurm", "--device", "cuda"]
    assert main(["--sweep", "coupler=mean", "min_steps_per_epoch=1", *places, *flags]) == 0
    assert "1 runs: 0 done" in capsys.readouterr().out


def test_the_clusters_packages_are_not_needed_to_sweep_here():
    """Nor imported: finding executors must stay quick."""
    absent = "{'ray', 'submitit', 'torch'}"
    script = f"import sys, bench.sweep.__main__; sys.exit(bool({absent} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


# --- one more executor ---

ONE_FILE = '''
"""A toy: runs one task after another, while it starts them."""

import subprocess
from bench.config import flags
from bench.sweep.executors.base import Executor
from gnnmoe.config import Refused


@flags
class Options:
    toy_greeting: str = "hello"
    """What it says."""


def make(options, wanted):
    if options.toy_greeting == "go away":
        raise Refused("the toy is offended.")
    return ToyExecutor(options.toy_greeting)


class ToyExecutor(Executor):
    slots = 1

    def __init__(self, greeting):
        self.greeting, self.done = greeting, {}

    def start(self, task):
        with task.log.open("a") as log:
            print(self.greeting, file=log, flush=True)
            self.done[task.run_id] = subprocess.call(task.command, stdout=log, stderr=log)

    def ended(self):
        done, self.done = self.done, {}
        return done

    def stop(self, run_id, *, at_once=False): ...
'''


@pytest.fixture
def one_more(tmp_path, monkeypatch):
    """Lay the file beside the others, as far as Python can tell."""
    folder = tmp_path / "executors"
    folder.mkdir()
    (folder / "toy.py").write_text(ONE_FILE)
    package = bench.sweep.executors
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    executors.cache_clear()
    yield
    executors.cache_clear()


@pytest.mark.usefixtures("one_more")
def test_one_more_executor_is_one_more_file(tmp_path, capsys):
    """Its name, its flags, their help and its errors are there, and it runs a sweep."""
    assert list(executors()) == ["local", "ray", "slurm", "toy"]
    study = Study(tmp_path)
    config = parse(with_options(SweepConfig), ["--executor", "toy", "--toy-greeting", "good morning"])
    toy = make_executor(config.executor, config, Wanted(device="cpu", logs=study.folder / ".logs"))
    assert study.sweep(study.runs("ok", "dies", "refused"), executor=toy).counts == {
        "ok": 1, "crashed": 1, "refused": 1
    }  # fmt: skip
    assert "good morning\n" in (study.folder / ".logs" / "run0.log").read_text()
    places = ["--data-source", "embedded", "--results-dir", str(tmp_path / "none")]
    for flags, said in (
        (["--toy-greeting", "go away"], "error: the toy is offended.\n"),
        (["--toy-greting", "hello"], "--toy-greeting"),
        (["--help-all"], "What it says."),
    ):
        with pytest.raises(SystemExit):
            main(["--sweep", "coupler=mean", *places, "--executor", "toy", *flags])
        assert said in "".join(capsys.readouterr())


def test_a_cluster_that_takes_nothing_ends_the_sweep(fake, study, monkeypatch):
    def refuse() -> None:
        raise OSError("no room")

    monkeypatch.setattr(fake, "submit", refuse)
    result = study.sweep(study.runs("ok"), executor=fake)
    assert result.exit_status == 2
    assert result.message == "runs cannot be started: no room"
