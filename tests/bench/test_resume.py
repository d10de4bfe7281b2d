"""A run that cannot be lost: interrupted in any way and continued, it equals an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.run.__main__ import main
from bench.training.checkpoint import differing_fields, load_checkpoint
from tests._records import without_diagnostic_times
from tests.bench._forked import fork_context
from tests.bench._runs import act_at_step, interrupt, only_folder, refusal, results_of
from tests.bench.conftest import TINY

FLAGS = ["--max-steps", "9", "--eval-every", "3", "--dropout-rate", "0.1", "--num-experts", "2"]
SCHEDULE = [*FLAGS, "--epochs", "3", "--max-batches-per-epoch", "3", "--min-steps-per-epoch", "1"]
SCHEDULE += ["--batch-schedule", "0:4,1:8,2:12", "--curriculum", "rarity"]


@pytest.fixture
def run(tiny) -> list[str]:
    return [*tiny, *FLAGS]


def whole_run(flags: list[str], data: Path, results: Path) -> Path:
    """Train without an interruption; return the folder, which many tests read and none changes."""
    places = ["--data-dir", str(data), "--results-dir", str(results)]
    assert main([*TINY, *flags, *places, "--quiet"]) == 0
    return only_folder(results)


@pytest.fixture(scope="module")
def undisturbed(small_data_dir, tmp_path_factory) -> Path:
    return whole_run(FLAGS, small_data_dir, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def scheduled(small_data_dir, tmp_path_factory) -> Path:
    """An undisturbed run with a schedule of batch sizes and a curriculum."""
    return whole_run(SCHEDULE, small_data_dir, tmp_path_factory.mktemp("scheduled"))


def assert_equal_but_for_times(folder: Path, expected: Path) -> None:
    """Losses, weights, batches, communication and record are equal, bit for bit."""
    assert (folder / "history.jsonl").read_text() == (expected / "history.jsonl").read_text()
    for name in ("nll.npz", "communication.npz", "experts.npz"):
        ours, theirs = np.load(folder / name), np.load(expected / name)
        assert set(ours) == set(theirs)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (load_checkpoint(path / "checkpoint.pt")["model"] for path in (folder, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (
        without_diagnostic_times(json.loads((path / "record.json").read_text()))
        for path in (folder, expected)
    )
    for record in (ours, theirs):
        del record["environment"]["git_changes_sha256"]  # of a file that someone edits meanwhile
    for key in set(theirs) - {"time", "speed", "memory", "check", "command", "config"}:
        assert ours[key] == theirs[key], key
    assert ours["memory"]["peak_allocated_bytes"] == theirs["memory"]["peak_allocated_bytes"]
    assert ours["config"]["training"] == theirs["config"]["training"]


def parts_of(folder: Path) -> list[dict]:
    """Return the parts that a run's record names, after checking what the record says of them all."""
    record = json.loads((folder / "record.json").read_text())
    time, parts = record["time"], record["time"]["parts"]
    assert record["command"] == parts[0]["command"]
    assert time["start"] == parts[0]["start"]
    assert (time["end"], time["resumed_at_step"]) == (parts[-1]["end"], parts[-1]["resumed_at_step"])
    for phase, seconds in time["seconds"].items():
        assert seconds == pytest.approx(sum(part["seconds"].get(phase, 0.0) for part in parts))
    return parts


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.core("resume")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_cut_off_inside_a_step_and_continued(run, undisturbed, monkeypatch, step, capsys):
    """As a kill would: nothing is saved at that moment, so it goes on from the last checkpoint."""
    with monkeypatch.context() as patch:
        act_at_step(patch, step, interrupt)
        assert main(run) == 130
    folder = only_folder(results_of(run))
    assert json.loads((folder / "record.json").read_text())["status"] == "interrupted"
    log, (part,) = (folder / "log.txt").read_text(), parts_of(folder)
    assert main([*run, "--resume"]) == 0
    assert_equal_but_for_times(folder, undisturbed)
    first, last = parts_of(folder)
    assert first == part, "as its own end had it, not as its checkpoint"
    assert last["resumed_at_step"] == ((step - 1) // 3 * 3 or None)
    assert last["command"] == f"{first['command']} --resume"
    later = (folder / "log.txt").read_text().removeprefix(log).splitlines()
    where = f"continues after step {(step - 1) // 3 * 3}" if step > 3 else "starts at the beginning"
    assert later[0].partition(" ")[2] == f"part 2 of the run {where}: {last['command']}"
    assert later[-1].endswith("status ok")


def test_killed_between_its_last_checkpoint_and_its_record_it_runs_again(run, undisturbed, capsys):
    folder = results_of(run) / "default" / undisturbed.name
    shutil.copytree(undisturbed, folder)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert main([*run, "--resume"]) == 0
    assert "it starts at the beginning" in " ".join(capsys.readouterr().out.split())
    assert_equal_but_for_times(folder, undisturbed)


@pytest.mark.slow
def test_interrupted_twice_and_in_the_last_evaluation(run, undisturbed, monkeypatch):
    for step, sent in ((2, signal.SIGINT), (5, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            act_at_step(patch, step, lambda sent=sent: os.kill(os.getpid(), sent))
            assert main([*run, "--resume"] if step == 5 else run) == 130
    with monkeypatch.context() as patch:
        patch.setattr("bench.run.session.evaluate", interrupt)
        assert main([*run, "--resume"]) == 130
    assert main([*run, "--resume"]) == 0
    folder = only_folder(results_of(run))
    assert_equal_but_for_times(folder, undisturbed)
    assert [part["resumed_at_step"] for part in parts_of(folder)] == [None, 2, 7, 9]
    assert (folder / "log.txt").read_text().count("status interrupted: stopped from outside") == 3


def test_killed_at_any_moment_and_continued(run, undisturbed):
    """kill -9 before training and within it; each leaves a folder that the next call understands."""
    log = ""
    for rows in (0, 5):
        started = list(results_of(run).glob("*/*/record.json"))
        kill_when_history_has(rows, [*run, "--resume"] if started else run)
        folder = only_folder(results_of(run))
        assert (folder / "log.txt").read_text().startswith(log)
        log = (folder / "log.txt").read_text()
        assert len(parts_of(folder)) == (0, 5).index(rows) + 1
    assert main([*run, "--resume"]) == 0
    assert_equal_but_for_times(folder, undisturbed)
    assert (folder / "log.txt").read_text().startswith(log)
    parts = parts_of(folder)
    assert len(parts) == 3
    assert all((part["end"] is None) == (part["seconds"].keys() <= {"prepare", "total"}) for part in parts)
    assert parts[-1]["end"] is not None


def kill_when_history_has(rows: int, flags: list[str]) -> None:
    """Start the run in a process and kill it as soon as there are a record and so many rows."""
    child = fork_context().Process(target=main, args=(flags,), daemon=True)
    child.start()
    try:
        while child.is_alive():
            for record in results_of(flags).glob("*/*/record.json"):
                if len((record.parent / "history.jsonl").read_text().splitlines()) >= rows:
                    child.kill()
            time.sleep(0.002)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL, "the run ended before it was killed"


@pytest.fixture(scope="module")
def stopped(small_data_dir, tmp_path_factory) -> Path:
    """The folder of a run that was stopped inside step 5, with a checkpoint after step 3."""
    results = tmp_path_factory.mktemp("stopped")
    places = ["--data-dir", str(small_data_dir), "--results-dir", str(results)]
    with pytest.MonkeyPatch.context() as patch:
        act_at_step(patch, 5, interrupt)
        assert main([*TINY, *FLAGS, *places]) == 130
    return only_folder(results)


@pytest.fixture
def interrupted(run, stopped) -> Path:
    """A copy of that run, of this test's own."""
    return only_folder(shutil.copytree(stopped.parents[1], results_of(run)))


def test_an_interrupted_run_asks_what_to_do(run, interrupted, capsys):
    before = sorted(path.name for path in interrupted.iterdir())
    message = refusal(capsys, run)
    assert "--resume continues it" in message
    assert "--force starts again" in message
    assert sorted(path.name for path in interrupted.iterdir()) == before
    assert main([*run, "--force"]) == 0
    assert (interrupted.with_name(interrupted.name + ".1") / "checkpoint.pt").exists()


def test_resuming_another_config_names_the_fields_that_differ(run, interrupted, capsys):
    message = refusal(capsys, [*run, "--resume", "--learning-rate", "0.001"])
    assert interrupted.name in message
    assert "learning_rate: 0.008 there, 0.001 here" in message
    way = ["--resume-checkpoint", str(interrupted / "checkpoint.pt")]
    message = refusal(capsys, [*run, *way, "--num-experts", "3"])
    assert "num_experts: 2 there, 3 here" in message
    assert message.count(" there, ") == 1
    there = {"a": {"x": 1, "y": 2}, "b": 3}
    assert differing_fields(there, {"a": {"x": 1, "y": 5}, "c": 4}) == [
        "y: 2 there, 5 here", "b: 3 there, None here", "c: None there, 4 here",
    ]  # fmt: skip


def test_nothing_to_resume_and_a_finished_run(run, undisturbed, capsys):
    assert "drop --resume to start" in refusal(capsys, [*run, "--resume"])
    assert not results_of(run).exists(), "nothing is written"
    shutil.copytree(undisturbed.parents[1], results_of(run))
    assert main([*run, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_checkpoint_elsewhere_is_continued(run, interrupted, undisturbed, tmp_path):
    """``--checkpoint-dir`` and ``--resume-checkpoint``: also into another results folder."""
    flags = [*run, "--results-dir", str(tmp_path / "moved")]
    flags += ["--checkpoint-dir", str(tmp_path / "checkpoints")]
    assert main([*flags, "--resume-checkpoint", str(interrupted / "checkpoint.pt")]) == 0
    folder = only_folder(results_of(flags))
    assert not (folder / "checkpoint.pt").exists()
    (tmp_path / "checkpoints" / f"{folder.name}.pt").rename(folder / "checkpoint.pt")
    assert_equal_but_for_times(folder, undisturbed)
    (before,), (first, last) = parts_of(interrupted), parts_of(folder)
    assert (first["command"], first["start"]) == (before["command"], before["start"])
    assert first["end"] is not None, "the checkpoint knows when it was saved"
    assert last["command"].endswith("checkpoint.pt")
    assert "building the model" in (folder / "log.txt").read_text().partition("part 2 of the run")[0]


def test_a_full_disk_while_training_ends_the_run_with_its_status(run, undisturbed, monkeypatch, capsys):
    """Bad input: the run ends with its status, nothing half-written; what was saved stays."""
    with monkeypatch.context() as patch:
        act_at_step(patch, 5, lambda: patch.setattr("bench.run.session.save_checkpoint", full_disk))
        assert main(run) == 1
    folder = only_folder(results_of(run))
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "crashed"
    assert "No space left" in record["error"]
    assert load_checkpoint(folder / "checkpoint.pt")["trainer"]["done"]["steps"] == 3
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    way = ["--resume-checkpoint", str(folder / "checkpoint.pt")]
    assert f"next: python -m bench.run {' '.join([*run, *way])}" in " ".join(capsys.readouterr().out.split())
    assert f"{' '.join(way)} goes on from its last checkpoint" in refusal(capsys, [*run, "--resume"])
    assert main([*run, *way]) == 0
    assert_equal_but_for_times(folder, undisturbed)
    assert [part["resumed_at_step"] for part in parts_of(folder)] == [None, 3]


@pytest.mark.core("resume")
@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), "evaluating"])
def test_schedule_and_curriculum_go_on_where_they_were(tiny, scheduled, monkeypatch, step):
    """Batch sizes, blocks, ledger and what is measured afterwards are those of the last epoch."""
    flags = [*tiny, *SCHEDULE]
    with monkeypatch.context() as patch:
        if step == "evaluating":
            patch.setattr("bench.run.session.check_trained_isolation", interrupt)
        else:
            act_at_step(patch, step, interrupt)
        assert main(flags) == 130
    assert main([*flags, "--resume"]) == 0
    folder = only_folder(results_of(flags))
    assert_equal_but_for_times(folder, scheduled)
    ours, theirs = (json.loads((path / "record.json").read_text()) for path in (folder, scheduled))
    assert theirs["used"]["batch_shapes"] == {"4x16": 3, "8x16": 3, "12x16": 3}
    assert ours["speed"]["step_tokens"] == theirs["speed"]["step_tokens"] == [192, 192]
