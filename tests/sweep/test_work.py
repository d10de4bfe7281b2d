"""The order of a sweep's work, what stops it, and that nothing is lost then."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from bench.record import Environment, RunFolder
from bench.sweep import work
from bench.sweep.executors.local import LocalExecutor
from bench.sweep.outcome import Outcome, SweepResult
from bench.sweep.work import RETRIES, Forecast, sweep_lock
from tests._records import ENVIRONMENT
from tests.sweep._fake import Study


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path)


def hold(study: Study, wait: bool = False):
    """Take the lock of a sweep on the study."""
    return sweep_lock(study.folder, wait, lambda _: None, lambda: False)


@contextmanager
def later(action, when):
    """Do ``action`` in another thread as soon as ``when`` says so."""

    def act() -> None:
        deadline = time.monotonic() + 20
        while not when() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def began(study: Study, *run_ids: str):
    """Whether these runs have a record."""
    return lambda: all((study.folder / run_id / "record.json").exists() for run_id in run_ids)


def test_runs_start_in_their_order_and_a_finished_sweep_starts_none(study):
    runs = study.runs("ok", "crashed", "ok", "ok")
    result = study.sweep([*runs, runs[0]])
    assert study.calls() == ["run0", "run1", "run2", "run3"]
    assert result.counts == {"ok": 3, "crashed": 1}
    assert result.exit_status == 1
    assert result.stopped is None
    again = study.sweep(runs)
    assert study.calls() == []
    assert (again.counts, again.exit_status) == (result.counts, 1)


class Counting(LocalExecutor):
    """Keeps the largest number of runs at one time."""

    running = most = 0

    def start(self, task):
        super().start(task)
        self.running += 1
        self.most = max(self.most, self.running)

    def ended(self):
        found = super().ended()
        self.running -= len(found)
        return found


def test_slots_run_side_by_side_and_no_more_than_there_are(study):
    executor = Counting([{}] * 2)
    assert study.sweep(study.runs(*["ok"] * 4), executor=executor).counts == {"ok": 4}
    assert executor.most == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # SIGINT: the next test
def test_a_signal_lets_the_runs_save_their_state_and_the_next_call_goes_on(study, number):
    runs = study.runs("endless", "endless", "ok")
    before = signal.signal(number, signal.SIG_DFL)  # the tests may have been started under nohup
    try:
        with later(send(number), began(study, "run0", "run1")):
            result = study.sweep(runs, 2)
    finally:
        signal.signal(number, before)
    assert (result.stopped, result.exit_status) == ("signal", 130)
    assert result.counts == {"interrupted": 2, "left": 1}
    assert study.record()["error"] == "stopped from outside", "the child wrote it, not the sweep"
    assert "To continue: the same command" in study.output.getvalue()
    assert sorted(study.calls()) == ["run0", "run1"]
    assert study.sweep(study.runs("ok", "ok", "ok")).exit_status == 0
    assert study.calls() == ["run0 --resume", "run1 --resume", "run2"]


def test_a_second_signal_ends_the_runs_at_once(study):
    def twice() -> None:
        send(signal.SIGINT)()
        time.sleep(0.3)
        send(signal.SIGINT)()

    with later(twice, began(study, "run0")):
        result = study.sweep(study.runs("deaf", "ok"))
    assert (result.exit_status, result.counts) == (130, {"interrupted": 1, "left": 1})
    assert study.record()["status"] == "interrupted"
    assert result.seconds < 10


def test_fail_fast_stops_at_the_first_failure(study):
    study.put("crashed", "run4")
    result = study.sweep(study.runs("endless", "crashed", "ok", "ok", "ok"), 2, fail_fast=True)
    assert (result.stopped, result.exit_status) == ("failure", 1)
    assert result.counts == {"interrupted": 1, "crashed": 2, "left": 2}


def test_a_second_sweep_on_the_folder_leaves_or_waits(study):
    with (
        hold(study),
        pytest.raises(ValueError, match=rf"another sweep \(process {os.getpid()}\) is at .*study"),
    ):
        study.sweep(study.runs("ok"))
    assert study.calls() == []
    holding = hold(study)
    holding.__enter__()
    with later(
        lambda: holding.__exit__(None, None, None), lambda: "waiting for it" in study.output.getvalue()
    ):
        assert study.sweep(study.runs("ok"), wait=True).exit_status == 0
    with hold(study), later(send(signal.SIGINT), lambda: study.output.getvalue().count("waiting for it") > 1):
        assert study.sweep(study.runs("ok"), wait=True).exit_status == 130


def test_a_sweep_whose_holder_leaves_just_now_is_not_called_unwritable(study, monkeypatch):
    monkeypatch.setattr(work, "lock", lambda path, *_: path.unlink(missing_ok=True))
    with pytest.raises(ValueError, match=r"another sweep is at .*study; wait for it"), hold(study):
        pass


def test_a_run_folder_that_links_to_itself_is_damaged_and_the_others_run(study):
    study.folder.mkdir(parents=True)
    (study.folder / "run0").symlink_to("run0")
    result = study.sweep(study.runs("ok", "ok"))
    assert result.counts == {"damaged": 1, "ok": 1}
    assert study.calls() == ["run1"]
    error = result.outcomes["run0"].error
    assert error is not None
    assert "run0 cannot be read (Too many levels of symbolic links)" in error


def test_what_comes_before_the_runs_is_done_by_the_sweep_that_may_run(study):
    """Hypotheses are stated before the first run, and not by a sweep that is refused."""
    told: list[list[str]] = []
    with hold(study), pytest.raises(ValueError, match="another sweep"):
        study.sweep(study.runs("ok"), before=lambda: told.append(study.calls()))
    assert told == []
    study.sweep(study.runs("ok"), before=lambda: told.append(study.calls()))
    assert told == [[]], "nothing had started"
    assert study.calls() == ["run0"]


def test_a_run_that_another_process_is_at_is_waited_for(study):
    """As after kill -9, when an orphan still saves its state; other runs start meanwhile."""
    lock = RunFolder(study.results, study.name, "run0").locked()
    lock.__enter__()
    study.put("interrupted")
    with later(lambda: lock.__exit__(None, None, None), began(study, "run1")):
        result = study.sweep(study.runs("ok", "ok"))
    assert study.calls() == ["run1", "run0 --resume"]
    assert result.exit_status == 0
    assert study.output.getvalue().count("another process runs it") == 1


def test_a_run_that_was_finished_by_another_process_meanwhile_is_not_started(study):
    lock = RunFolder(study.results, study.name, "run0").locked()
    lock.__enter__()

    def finish() -> None:
        study.put("ok")
        lock.__exit__(None, None, None)

    with later(finish, began(study, "run1")):
        result = study.sweep(study.runs("ok", "ok"))
    assert study.calls() == ["run1"]
    assert result.counts == {"ok": 2}


def test_a_time_budget_starts_what_is_expected_to_end_in_it(study):
    """Each ok run says 0.25 s, of cost 1: one of cost 1000 is expected to take 250 s."""
    runs = [*study.runs("ok", cost=1.0), *study.runs("", "ok", cost=1000.0)[1:]]
    runs += study.runs("", "", "ok", cost=2.0)[2:]
    result = study.sweep(runs, time_budget="60s")
    assert study.calls() == ["run0", "run2"]
    assert (result.left_for_budget, result.stopped, result.exit_status) == (1, "budget", 0)
    assert "1 run did not start: " in study.output.getvalue()
    assert study.sweep(runs).exit_status == 0
    assert study.calls() == ["run1"]


def test_a_time_budget_interrupts_what_still_runs(study):
    result = study.sweep(study.runs("endless", "ok"), time_budget="0.5s")
    assert result.counts == {"interrupted": 1, "left": 1}
    assert (result.left_for_budget, result.exit_status) == (1, 0)
    assert study.record()["error"] == "stopped from outside"


def test_the_forecast_is_a_median_over_the_runs_of_this_machine(study):
    forecast, here = Forecast(), Environment.model_validate(ENVIRONMENT)
    (run,) = study.runs("x", cost=10.0)
    (unknown,) = study.runs("x")
    assert forecast.expected(run) is None
    forecast.learn(run, Outcome("ok", seconds=1e6, environment=here.model_copy(update={"cpu_cores": -1})))
    forecast.learn(run, Outcome("crashed"))
    assert forecast.expected(run) is None
    for seconds in (10.0, 20.0, 90.0):
        forecast.learn(run, Outcome("ok", seconds=seconds, environment=here), elapsed=seconds + 2)
    assert forecast.expected(run) == 22
    assert forecast.expected(study.runs("x", cost=100.0)[0]) == 202
    assert forecast.expected(unknown) == 22


def test_an_unwritable_folder_is_one_message_and_starts_nothing(study, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .*choose another with --results-dir"):
        study.sweep(study.runs("ok"))
    (tmp_path / "results").unlink()
    study.folder.mkdir(parents=True)
    (study.folder / ".logs").write_text("a file")
    result = study.sweep(study.runs("ok", "ok"))
    assert (result.exit_status, result.counts) == (2, {"left": 2})
    assert study.output.getvalue().count("cannot be written") == 1
    assert [path.name for path in study.folder.iterdir()] == [".logs"]


@pytest.mark.parametrize("behaviour", ["fills the disk", "finds a full disk"])
def test_the_first_run_that_cannot_be_written_stops_the_sweep(study, behaviour):
    result = study.sweep(study.runs(behaviour, "ok"))
    assert (result.exit_status, result.counts) == (2, {"interrupted": 1, "left": 1})
    said = study.output.getvalue()
    assert "cannot be written" in said.partition("error: ")[2]
    assert "No space left on device" in said.partition("error: ")[2]
    assert "To continue" in said


def test_a_child_that_cannot_be_started_stops_the_sweep(study):
    result = study.sweep(study.runs("ok", "ok"), command=lambda _: ["/no/such/program"])
    assert result.exit_status == 2
    assert "No such file" in (result.message or "")


def test_exit_statuses_and_counts(study):
    runs = study.runs("a", "b")
    ok, crashed, cut = Outcome("ok"), Outcome("crashed"), Outcome("interrupted")
    assert SweepResult(runs, {"run0": ok, "run1": ok}).exit_status == 0
    assert SweepResult(runs, {"run0": ok, "run1": crashed}).exit_status == 1
    assert SweepResult(runs, {"run0": ok, "run1": cut}).exit_status == 1
    assert SweepResult(runs, {"run0": ok, "run1": cut}, stopped="budget").exit_status == 0
    assert SweepResult(runs, {"run0": crashed, "run1": cut}, stopped="budget").exit_status == 1
    assert SweepResult(runs, {"run0": crashed}, stopped="signal").exit_status == 130
    assert SweepResult(runs, {}, stopped="unwritable").exit_status == 2
    assert SweepResult(runs, {"run1": ok}).counts == {"ok": 1, "left": 1}
    assert RETRIES["all"] >= RETRIES["oom"]


def test_no_file_is_left_behind_but_the_logs(study):
    study.sweep(study.runs("ok", "dies before its record"))
    assert {path.name for path in study.folder.iterdir()} == {".logs", "run0", "run1"}
