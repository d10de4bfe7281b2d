"""A run at a fitted length, from end to end: judged, kept, resumed and used as the model that it is."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import bench.run.resume
from bench.check.isolation import rows_to_judge
from bench.data.corpus import load_corpus
from bench.record import Record
from bench.run.__main__ import main
from bench.study.runs import Basis
from bench.training.checkpoint import load_checkpoint
from bench.training.loaders import checkpoint_scorer
from tests.bench._runs import act_at_step, interrupt, only_folder, refusal, results_of
from tests.bench.conftest import TINY
from tests.bench.test_resume import assert_equal_but_for_times

FIT = (
    "--coupler mean --num-experts 2 --fit-shape --memory-budget 80KiB --shape-min-length 8"
    " --shape-length-step 4 --dropout-rate 0.1 --max-steps 9 --eval-every 3"
).split()
LENGTH = 8  # what fits of 16, one row at once of a batch of 4


@pytest.fixture(scope="module")
def fitted(small_data_dir, tmp_path_factory) -> tuple[Path, list[int], str]:
    """The folder of a finished run, the lengths at which the leak check looked, and what was printed."""
    results, judged, printed = tmp_path_factory.mktemp("fitted"), [], io.StringIO()

    def run_leak_check(config, real=bench.run.resume.run_leak_check, **named):
        judged.append(config.max_seq_length)
        return real(config, **named)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(bench.run.resume, "run_leak_check", run_leak_check)
        assert main([*TINY, *FIT, "--data-dir", str(small_data_dir), "--results-dir", str(results)]) == 0
    return only_folder(results), judged, printed.getvalue()


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_d4_the_fitted_shape_is_what_the_run_uses(fitted):
    """D4, D1: requested, tuned and used side by side; D6: the speed pass has the fitted shape too."""
    folder, judged, _ = fitted
    record = record_of(folder)
    assert judged == [LENGTH], "the model that trains"
    assert f"(B, L) = (2, {LENGTH})" in record["check"]["checks"]["trained_isolation"]["detail"]
    assert (record["tuned"]["length"], record["tuned"]["micro_batch_size"]) == (LENGTH, 1)
    asked, tuned, used = record["requested"], record["tuned"], record["used"]
    assert (asked["max_seq_length"], asked["batch_size"], asked["memory_budget"]) == (16, 4, "80KiB")
    assert tuned["stopped"] == "limit"
    assert tuned["measured_peak_bytes"] <= int(80 * 1024 * 0.85) == tuned["limit_bytes"]
    assert tuned["predicted_peak_bytes"] == pytest.approx(tuned["measured_peak_bytes"], rel=0.1)
    assert used["lengths"] == [LENGTH]
    assert used["micro_batch_shapes"] == {f"1x{LENGTH}": 9 * 4}
    assert used["batch_shapes"] == {f"4x{LENGTH}": 9}, "the batch of an update stays"
    assert record["quality"]["validation"]["length"] == LENGTH
    assert record["speed"]["step_tokens"] == [4 * LENGTH] * 2
    assert record["memory"]["peak_allocated_bytes"] <= tuned["limit_bytes"] * 1.1
    assert f"length {LENGTH}, micro-batch 1 of at most 4" in fitted[2]
    other = Record.model_validate({**record, "used": {**used, "lengths": [LENGTH, 16]}})
    own = Record.model_validate(record)
    assert not Basis.of(own, False).fits(Basis.of(other, False)), "another length is not compared"
    assert Basis.of(own, True).fits(Basis.of(other, True))


@pytest.mark.parametrize(
    ("sizes", "at_once", "rows"),
    [([4, 4], 1, 2), ([4, 4], 3, 3), ([4, 4], None, 4), ([1, 1], None, 2), ([1, 1], 1, 2), ([1], 1, 1)],
)
def test_rows_to_judge(sizes, at_once, rows):
    ids = torch.arange(sum(sizes) * 3).view(-1, 3)
    batches = [{"input_ids": part} for part in ids.split(sizes)]
    assert torch.equal(rows_to_judge(batches, at_once), ids[:rows])


def test_its_checkpoint_names_the_model_that_trained_and_serves_as_a_difficulty_model(fitted, tiny):
    path = fitted[0] / "checkpoint.pt"
    state = load_checkpoint(path)
    assert set(state) == {"schema", "run_id", "identity", "code", "model"}, "its best weights only"
    assert state["run_id"] == fitted[0].name, "the id is that of what was asked for"
    assert state["identity"]["model"]["max_seq_length"] == LENGTH
    place = tiny.index("--max-steps")
    flags = [*tiny[:place], *tiny[place + 2 :], "--max-seq-length", str(LENGTH), "--epochs", "2"]
    flags += ["--max-batches-per-epoch", "2", "--min-steps-per-epoch", "1", "--coupler", "mean"]
    assert main([*flags, "--batch-size", "2", "--curriculum", f"model:{path}"]) == 0
    record = record_of(only_folder(results_of(flags)))
    assert record["data"]["training_blocks"]["curriculum"]["order_source"] == "model"


def test_resuming_from_its_checkpoint_is_refused_in_the_right_words(fitted, tiny, capsys):
    """Its identity names the length that was used, not the one asked for: that is not what is wrong."""
    flags = [*tiny, *FIT, "--resume-checkpoint", str(fitted[0] / "checkpoint.pt")]
    assert "is of a finished run; nothing is left to do" in refusal(capsys, flags)


def without_times(folder: Path) -> dict:
    """Take the times out of what was found before training, and whether it was kept; return the record."""
    record = record_of(folder)
    record["tuned"]["from_cache"] = None
    for found in (record["tuned"], *record["tuned"]["trials"]):
        found["seconds"] = found["tokens_per_second"] = None
    (folder / "record.json").write_text(json.dumps(record))
    return record


def test_interrupted_and_resumed_it_equals_an_undisturbed_one(fitted, tiny, small_data_dir, monkeypatch):
    run = [*tiny, *FIT]
    with monkeypatch.context() as patch:
        act_at_step(patch, 5, interrupt)
        assert main(run) == 130
    folder = only_folder(results_of(run))
    path, corpus = folder / "checkpoint.pt", load_corpus(data_dir=small_data_dir)
    asked = load_checkpoint(path)["identity"]["model"]["max_seq_length"]
    assert asked == 16, "what --resume compares with its flags"
    checkpoint_scorer(path, LENGTH, corpus, torch.device("cpu"))  # all the same it can be loaded
    monkeypatch.setattr("bench.tune.find.search_here", lambda *_: pytest.fail("fitted again"))
    assert main([*run, "--resume"]) == 0
    ours, theirs = without_times(folder), without_times(fitted[0])
    assert ours["time"]["resumed_at_step"] == 3
    assert ours["tuned"] == theirs["tuned"]
    assert ours["used"] == theirs["used"]
    assert ours["used"]["micro_batch_shapes"] == {f"1x{LENGTH}": 36}
    assert_equal_but_for_times(folder, fitted[0])
