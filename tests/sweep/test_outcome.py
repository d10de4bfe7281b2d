"""What a child's end means: every way to end becomes a status, and is written down once."""

from __future__ import annotations

import json

import pytest

import bench.sweep.outcome
from bench.record import Record, RunFolder, Time, TimePart
from bench.sweep.outcome import look
from tests._records import PART, made_speed
from tests.sweep._fake import Study


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path)


KILLED = "killed by signal 9 (SIGKILL), perhaps for memory"
ENDS = {
    "ok": ("ok", None),
    "diverged": ("diverged", "as it was told"),
    "check_failed": ("check_failed", "as it was told"),
    "oom": ("oom", "as it was told"),
    "crashed": ("crashed", "as it was told"),
    "dies": ("crashed", KILLED),
    "dies before its record": ("crashed", KILLED),
    "runs out of memory": ("oom", "torch.OutOfMemoryError: CUDA out of memory."),
    "raises": ("crashed", "KeyError: 'x'"),
    "leaves nothing": ("crashed", "ended with exit status 0, but left no finished record under"),
    "is ended by others": ("interrupted", None),
}


def test_every_end_becomes_a_status(study):
    runs = study.runs(*ENDS)
    result = study.sweep(runs, slots=4)
    assert result.exit_status == 1
    for run in runs:
        status, error = ENDS[run.label]
        text, outcome = (run.folder / "record.json").read_text(), result.outcomes[run.run_id]
        record = json.loads(text, parse_constant=lambda name: pytest.fail(name))  # no NaN
        assert outcome.status == status == record["status"], run.label
        assert set(Record.model_fields) == set(record)
        if error is None:
            assert record["error"] is None
        else:
            assert record["error"].startswith(error)
            assert (outcome.error or "").startswith(error)


def test_the_tail_of_the_log_is_in_the_record_and_the_whole_of_it_beside(study):
    study.sweep(study.runs("raises"))
    lines = study.record()["error"].splitlines()
    assert lines[0] == "KeyError: 'x'"
    assert lines[-2:] == ["KeyError: 'x'", "record: path"]
    assert len(lines) == 22
    assert "line 49" in (study.folder / "run0" / "log.txt").read_text()
    assert "line 0\n" in (study.folder / ".logs" / "run0.log").read_text()
    time = study.record()["time"]
    assert time["seconds"].keys() == {"prepare", "total"}
    assert [part["command"] for part in time["parts"]] == ["the first"], "the child had begun its part"
    assert time["end"] == time["parts"][0]["end"] is not None


def test_a_child_that_dies_before_it_goes_on_adds_a_part_of_its_own(study):
    study.put("interrupted")
    study.sweep(study.runs("dies before its record"))
    time = study.record()["time"]
    assert study.record()["status"] == "crashed"
    assert time["start"] == PART["start"]
    assert time["parts"][0] == PART
    assert time["parts"][1]["command"].endswith("'dies before its record' --resume")
    assert time["seconds"] == {"prepare": 0.1, "total": time["parts"][1]["seconds"]["total"]}


def test_a_run_that_dies_before_its_record_gets_one_of_what_is_known(study):
    study.sweep(study.runs("ok", "dies before its record"))
    record = study.record("run1")
    assert record["seed"] == 1
    assert record["run_id"] == "run1"
    assert record["study"] == "study"
    assert record["environment"]["value"] is None
    assert "last words" in record["error"]
    assert not [path for path in (study.folder / "run1").iterdir() if path.name.startswith(".")]


def test_an_earlier_failure_is_not_taken_for_this_childs(study):
    """Retried, and killed before it wrote: the earlier record is kept, the new one says what happened now."""
    study.put("oom", error="earlier")
    study.sweep(study.runs("dies before its record"), retry="oom")
    assert study.record()["status"] == "crashed"
    assert study.record("run0.1")["error"] == "earlier"


def test_a_time_limit_is_a_status(study):
    result = study.sweep(study.runs("endless", "deaf"), 2, grace=0.2, run_timeout="0.5s")
    for run_id in ("run0", "run1"):
        assert study.record(run_id)["status"] == "timeout"
        assert study.record(run_id)["error"].startswith("stopped after its time limit of 0.5 s")
    assert result.seconds < 10


def test_a_damaged_checkpoint_starts_the_run_again(study):
    study.put("interrupted")
    result = study.sweep(study.runs("needs a checkpoint"))
    assert study.calls() == ["run0 --resume", "run0 --force"]
    assert [line for line in study.output.getvalue().splitlines() if "it cannot go on" in line] == [
        "needs a checkpoint: it cannot go on (this cannot be run), so it starts at the beginning; "
        "its folder is kept as run0.1 (or .2, …)"
    ]
    assert result.outcomes["run0"].status == "ok"
    assert study.record("run0.1")["status"] == "interrupted"


def test_a_run_that_its_child_finds_busy_is_tried_again_as_it_was(study):
    study.put("interrupted")
    assert study.sweep(study.runs("finds it busy once", "ok")).exit_status == 0
    assert study.calls() == ["run0 --resume", "run1", "run0 --resume"]


def test_a_resumed_run_does_not_say_how_long_a_whole_one_takes(study):
    part = PART | {"seconds": {"total": 2.0}}
    for parts, seconds in (
        ([part], 2.0),
        ([part, part], None),
        ([part, part | {"resumed_at_step": 5}], None),
    ):
        study.put("ok", time=Time.of([TimePart.model_validate(part) for part in parts]).model_dump())
        found = look(study.runs("ok")[0], frozenset(), force=False)
        assert found.outcome is not None
        assert found.outcome.seconds == seconds


def test_the_lock_of_a_process_that_was_killed_after_its_run_is_removed(study):
    study.put("ok")
    study.put("ok", "run1")
    left, held = (study.folder / f".{name}.lock" for name in ("run0", "run1"))
    left.touch()
    with RunFolder(study.results, study.name, "run1").locked():
        study.sweep(study.runs("ok", "ok"))
        assert not left.exists()
        assert held.exists()


FAILURES = ("crashed", "diverged", "timeout", "check_failed")


@pytest.mark.parametrize(
    ("retry", "flags"),
    [
        (None, {"ok": None, "interrupted": "--resume", "crashed": None}),
        ("failed", {"oom": None, **dict.fromkeys(FAILURES, "--force")}),
        ("oom", {"oom": "--force", "check_failed": None}),
        ("all", {"ok": None, "oom": "--force", "crashed": "--force"}),
    ],
)
def test_which_runs_are_run_again(study, retry, flags):
    """``flags`` says for each status of a record with which flag its run starts again; None: it does not."""
    runs = study.runs(*["ok"] * len(flags))
    for run, status in zip(runs, flags, strict=True):
        study.put(status, run.run_id)
    result = study.sweep(runs, retry=retry)
    again = {run.run_id: flag for run, flag in zip(runs, flags.values(), strict=True) if flag is not None}
    assert sorted(study.calls()) == [f"{run_id} {flag}" for run_id, flag in again.items()]
    for run, status in zip(runs, flags, strict=True):
        assert result.outcomes[run.run_id].status == ("ok" if run.run_id in again else status)


def test_a_damaged_record_is_a_failure_and_a_folder_without_one_is_not(study):
    study.put("ok")
    (study.folder / "run0" / "record.json").write_text('{"status":')
    (study.folder / "run1").mkdir()
    result = study.sweep(study.runs("ok", "ok"))
    assert [result.outcomes[run].status for run in ("run0", "run1")] == ["damaged", "ok"]
    assert study.sweep(study.runs("ok", "ok"), retry="failed").exit_status == 0


def test_a_failed_check_is_final_until_it_is_allowed_to(study):
    study.put("check_failed")
    (run,) = study.runs("ok")
    assert look(run, frozenset(), force=False).flags is None
    allowed = run.__class__(**{**vars(run), "arguments": ("--allow-failed-check",)})
    assert look(allowed, frozenset(), force=False).flags == ()
    study.put("check_failed", speed=made_speed([1.0], 8))
    assert look(allowed, frozenset(), force=False).flags is None


def test_a_record_of_another_version_is_damaged_and_stays(study):
    study.put("ok", schema_version="1.99")
    assert study.sweep(study.runs("ok")).outcomes["run0"].status == "damaged"
    assert study.calls() == []
    assert study.record()["schema_version"] == "1.99"


def test_the_status_that_cannot_be_written_leaves_the_record_as_it_was(study, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_record", full)
        result = study.sweep(study.runs("dies", "dies before its record", "ok"))
        assert (result.stopped, result.exit_status) == ("unwritable", 2)
        assert "No space left on device" in (result.message or "")
    assert study.record()["status"] == "interrupted"
    assert not (study.folder / "run1").exists()
    assert len(study.calls()) == 1, "nothing more was started"
    with monkeypatch.context() as patch:
        patch.setattr(bench.sweep.outcome.RunFolder, "write_record", full)
        study.sweep(study.runs("x", "dies before its record")[1:])
    assert not (study.folder / "run1").exists(), "whole or not at all"


def test_a_refused_run_has_no_record_and_the_sweep_goes_on(study):
    result = study.sweep(study.runs("refused", "ok"))
    assert result.outcomes["run0"].status == "refused"
    assert result.outcomes["run0"].error == "this cannot be run."
    assert result.outcomes["run1"].status == "ok"
    assert not (study.folder / "run0").exists()
    assert result.exit_status == 1


def test_force_runs_everything_again(study):
    study.sweep(study.runs("ok", "ok"))
    study.calls()
    study.sweep(study.runs("ok", "ok"), force=True)
    assert study.calls() == ["run0 --force", "run1 --force"]
    assert study.record("run0.1")["status"] == "ok"
