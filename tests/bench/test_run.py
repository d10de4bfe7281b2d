"""The main job from its command line to its record, and every way in which a run can end."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.cli import parse
from bench.config import RunConfig
from bench.data.corpus import load_corpus
from bench.files import NOT_WRITTEN, NotWritten, lock
from bench.record import Record, RunFolder, record_of
from bench.report import quantities
from bench.report.plots.run import plot_run
from bench.run.__main__ import main
from bench.run.prepare import prepare
from gnnmoe.couplers.registry import coupler_names
from tests.bench._runs import act_at_step, interrupt, only_run, refusal, results_of
from tests.bench.conftest import TINY

QUICK = ("HGNN", "dense", "topk")  # weights of hyperedges, other blocks, and losses of the coupler's own
COUPLERS = [
    pytest.param(name, marks=[pytest.mark.core(f"coupler:{name}"), *[pytest.mark.slow] * (name not in QUICK)])
    for name in coupler_names()
]


@pytest.fixture(scope="module")
def plain(small_data_dir, tmp_path_factory) -> tuple[list[str], str]:
    """One run that many tests read: its flags, and what it printed in 80 columns."""
    results, printed = tmp_path_factory.mktemp("plain") / "results", io.StringIO()
    flags = [*TINY, "--device", "cpu", "--data-dir", str(small_data_dir), "--results-dir", str(results)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        assert main(flags) == 0
    return flags, printed.getvalue()


@pytest.fixture
def written(plain) -> tuple[Path, dict]:
    """The folder and the record of the plain run, to be read."""
    return only_run(results_of(plain[0]))


@pytest.fixture
def finished(plain, tmp_path) -> list[str]:
    """The flags of the plain run, whose results are a copy for one test."""
    shutil.copytree(results_of(plain[0]), tmp_path / "results")
    return [*plain[0], "--results-dir", str(tmp_path / "results")]


@pytest.mark.core("record")
@pytest.mark.parametrize("coupler", COUPLERS)
def test_a_run_leaves_a_whole_record(tiny, coupler, capsys):
    assert main([*tiny, "--coupler", coupler, "--evaluate-test", "--run-name", "first"]) == 0
    folder, record = only_run(results_of(tiny))
    assert tuple(record) == tuple(Record.model_fields)
    assert (record["status"], record["error"], record["run_name"]) == ("ok", None, "first")
    assert folder.name == record["run_id"]
    assert folder.parent.name == record["study"] == "default"
    files = {"record.json", "history.jsonl", "communication.npz", "nll.npz", "log.txt", "checkpoint.pt"}
    files |= set() if coupler == "dense" else {"experts.npz"}  # one expert has nothing to compare
    assert {path.name for path in folder.iterdir()} == files
    assert record["command"].startswith("python -m bench.run --embed-dim 8")
    assert record["check"]["passed"] is True
    assert "(B, L) = (4, 16)" in record["check"]["checks"]["trained_isolation"]["detail"]
    assert "status ok" in (folder / "log.txt").read_text()
    assert str(folder) in capsys.readouterr().out.replace("\n", "")


def test_plots_are_drawn_at_the_end_and_a_failure_of_theirs_is_a_note(tiny, monkeypatch, capsys):
    def broken(folder):
        plot_run(folder)
        raise RuntimeError("no fonts")

    monkeypatch.setattr("bench.report.plots.run.plot_run", broken)
    assert main([*tiny, "--coupler", "mean", "--plots", "--max-steps", "2"]) == 0
    folder, _ = only_run(results_of(tiny))
    assert {"training.svg", "training.png", "training.csv"} <= {p.name for p in (folder / "plots").iterdir()}
    assert "note: the plots could not be drawn: RuntimeError: no fonts" in capsys.readouterr().err


def test_a_signal_while_drawing_changes_nothing_of_a_finished_run(finished, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("bench.report.plots.run.plot_run", interrupt)
        assert main([*finished, "--plots"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "interrupted: the run is finished; the same command draws its plots.\n"
    assert "record:" in printed.out
    drawn: list[Path] = []
    monkeypatch.setattr("bench.report.plots.run.plot_run", drawn.append)
    assert main([*finished, "--plots"]) == 0
    assert drawn == [only_run(results_of(finished))[0]]


def test_a_second_signal_while_drawing_leaves_the_run_interrupted(tiny, monkeypatch, capsys):
    monkeypatch.setattr("bench.report.plots.run.plot_run", interrupt)
    act_at_step(monkeypatch, 1, interrupt)
    assert main([*tiny, "--coupler", "mean", "--plots"]) == 130
    said = "interrupted: the run stays interrupted; its plots were not drawn.\n"
    assert capsys.readouterr().err.endswith(said)
    assert only_run(results_of(tiny))[1]["status"] == "interrupted"


def test_a_signal_while_the_end_is_written_is_ignored(tiny, monkeypatch):
    write = RunFolder.write_record

    def signalled(self, record):
        if record.status == "ok":
            signal.raise_signal(signal.SIGINT)
        write(self, record)

    monkeypatch.setattr(RunFolder, "write_record", signalled)
    assert main([*tiny, "--coupler", "mean", "--max-steps", "2"]) == 0
    assert only_run(results_of(tiny))[1]["status"] == "ok"


def test_what_a_kill_while_drawing_left_is_mended_by_the_next_call(tiny, tmp_path, capsys):
    """Plots are drawn without training, and half-written files go, but not those of a living process."""
    flags = [*tiny, "--coupler", "mean", "--max-steps", "2"]
    assert main(flags) == 0
    folder, record = only_run(results_of(tiny))
    (folder / "plots").mkdir()
    parts = [folder / ".checkpoint.pt.1a2b3c4d", folder / "plots" / ".training.png.1a2b3c4d"]
    for part in parts:
        part.write_text("half")
    living = lock(RunFolder(tmp_path / "results", "default", folder.name).lock)
    assert living is not None
    assert "another process is at run" in refusal(capsys, [*flags, "--plots"])
    assert all(part.exists() for part in parts)
    living.release()
    assert main([*flags, "--plots"]) == 0
    assert not any(part.exists() for part in parts)
    assert {"training.svg", "training.png", "training.csv"} <= {p.name for p in (folder / "plots").iterdir()}
    drawn = (folder / "plots" / "training.svg").stat().st_mtime_ns
    assert main([*flags, "--plots"]) == 0
    assert (folder / "plots" / "training.svg").stat().st_mtime_ns == drawn, "once is enough"
    assert only_run(results_of(tiny))[1] == record


def test_what_is_reported_is_what_was_used(written):
    """A3 and D1 in small: shapes, steps and tokens are counted from the tensors."""
    folder, record = written
    stored = np.load(folder / "nll.npz")
    total = stored["validation_nll"].astype(np.float64).sum()
    assert record["quality"]["validation"]["nll_sum"] == pytest.approx(total, rel=1e-6)
    assert stored["validation_document"].shape == stored["validation_nll"].shape == (128,)
    assert quantities.perplexity(record_of(record)) == pytest.approx(math.exp(total / 128), rel=1e-6)
    assert record["requested"] == {"batch_size": 4, "max_seq_length": 16, "micro_batch_size": None,
                                   "memory_budget": None, "memory_target": None}  # fmt: skip
    used = record["used"]
    assert used["batch_shapes"] == {"4x16": 4}
    assert (used["steps"], used["tokens"]) == (4, 4 * 4 * 16)
    blocks = record["data"]["splits"]["train"]["tokens"] // 16
    (epoch,) = used["ledger"]["epochs"]
    counts = {"batches": 4, "samples": 16, "tokens": 256, "updates": 4}
    assert epoch == {"epoch": 0, "batch_size": 4, "asked": counts, "got": counts}
    evaluations = used["ledger"]["evaluations"]
    assert evaluations["validation in training"] == {"evaluations": 2, "asked": 256, "got": 256}
    assert evaluations["validation at the end"] == {"evaluations": 1, "asked": 128, "got": 128}
    assert used["epochs"] == pytest.approx(4 / (blocks // 4), abs=1e-6)
    assert record["speed"]["step_tokens"] == [64, 64]
    assert len(record["speed"]["step_seconds"]) == 2
    quality = record["quality"]["validation"]
    assert (quality["tokens"], quality["length"], quality["stride"]) == (8 * 16, 16, 8)
    assert record["quality"]["test"]["value"] is None
    assert "--evaluate-test" in record["quality"]["test"]["reason"]


def test_history_and_communication_over_steps(written):
    folder, record = written
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4]
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates[0] == pytest.approx(8e-3)
    assert rates[-1] == pytest.approx(8e-3 * 0.05)
    trace = np.load(folder / "communication.npz")
    assert trace["step"].tolist() == [0, 2, 4]
    weights = trace["layer_0.hyperedge_weights"]
    assert weights.shape == (3, 6)
    assert np.allclose(weights[0], 1.0)
    assert not np.allclose(weights[-1], 1.0, atol=1e-4)
    summary = record["communication"]["layer_0"]
    assert list(summary["hyperedge_weights"]) == ["{0,1}", "{0,2}", "{0,3}", "{1,2}", "{1,3}", "{2,3}"]
    for name in ("mixing", "adjacency"):
        assert trace[f"layer_0.{name}"].shape[:2] == (3, 4)
    assert sum(summary["mixing"].values()) == pytest.approx(1.0, abs=1e-5)


def test_a_damaged_record_is_kept_and_run_again_to_the_same_numbers(finished, capsys):
    folder, first = only_run(results_of(finished))
    losses = (folder / "nll.npz").read_bytes()
    (folder / "record.json").write_text('{"status": ')
    assert main(finished) == 0
    assert "an earlier record (damaged) is kept" in capsys.readouterr().out
    second = json.loads((folder / "record.json").read_text())
    assert second["quality"] == first["quality"]
    assert (folder / "nll.npz").read_bytes() == losses
    assert (folder.with_name(folder.name + ".1") / "nll.npz").exists()


def test_at_one_seed_couplers_share_the_batches_and_the_start(small_data_dir, tmp_path):
    """Seeds: trunk, experts and batches are the same bit for bit, whatever the coupler."""
    seen = []
    for flags in (["--coupler", "HGNN"], ["--coupler", "GNN"], ["--coupler", "mean"], ["--seed", "1"]):
        places = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path)]
        prepared = prepare(parse(RunConfig, [*TINY, *places, *flags], presets=True))
        trunk = [
            p
            for name, p in prepared.execution.build(
                prepared.model_config, prepared.config.training.seed
            ).named_parameters()
            if "coupler" not in name
        ]
        batches = [batch["input_ids"] for batch in islice(prepared.loaders["train"], 2)]
        seen.append([*trunk, *batches])
    first, *others, other_seed = seen
    for tensors in others:
        assert all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True))
    assert not torch.equal(first[0], other_seed[0])
    assert not torch.equal(first[-1], other_seed[-1])


@pytest.mark.parametrize(
    ("error", "status", "exit_status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", 1),
        (ValueError("shape mismatch"), "crashed", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (None, "diverged", 1),
    ],
)
def test_whatever_happens_the_record_is_written(tiny, monkeypatch, capsys, error, status, exit_status):
    def failing(*_):
        if error is not None:
            raise error
        return torch.tensor(math.nan), torch.tensor(1.0)

    monkeypatch.setattr("bench.training.loop.training_step", failing)
    assert main(tiny) == exit_status
    folder, record = only_run(results_of(tiny))
    assert record["status"] == status
    assert ("training loss is nan at step 1" in record["error"]) == (status == "diverged")
    assert record["used"]["steps"] == (status == "diverged")
    assert record["quality"]["value"] is None
    assert record["time"]["end"] is not None
    assert ("Traceback" in capsys.readouterr().err) == (status == "crashed")
    assert not list(folder.glob(".*")), "no half-written file stays"


def test_a_leaking_coupler_is_stopped_by_the_leak_check(tiny, capsys):
    """Fact 1: the leak is caught at E = 4 pairs; ``--allow-failed-check`` trains, the status stays."""
    leak = ["--coupler", "examples.leaking_coupler:LeakingCoupler"]
    assert main([*tiny, *leak]) == 1
    folder, record = only_run(results_of(tiny))
    assert record["status"] == "check_failed"
    assert "sees" in record["error"]
    assert record["quality"]["value"] is None
    assert main([*tiny, *leak, "--allow-failed-check"]) == 1
    allowed = json.loads((folder / "record.json").read_text())
    assert allowed["status"] == "check_failed"
    assert allowed["quality"]["validation"]["tokens"] == 128
    assert (folder.with_name(folder.name + ".1") / "record.json").exists()
    capsys.readouterr()
    assert main([*tiny, *leak, "--allow-failed-check"]) == 1
    assert "is finished" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_with_a_message(tiny, monkeypatch, capsys):
    write, calls = RunFolder.write_record, []

    def full(self, record):
        calls.append(record.status)
        if len(calls) > 1:
            raise NotWritten(28, "No space left on device", "record.json")
        write(self, record)

    monkeypatch.setattr(RunFolder, "write_record", full)
    assert main(tiny) == NOT_WRITTEN
    assert calls == ["interrupted", "ok"]
    assert "record.json cannot be written: No space left" in " ".join(capsys.readouterr().out.split())
    folder, record = only_run(results_of(tiny))
    assert record["status"] == "interrupted"
    assert not list(folder.glob(".*"))


def test_a_single_expert_trains_and_says_once_that_it_is_the_mean(tiny, capsys):
    """Bad input: num_experts 1 is fine; no hyperedges, mean readout, said once."""
    assert main([*tiny, "--num-experts", "1", "--batch-size", "12", "--num-eval-samples", "2"]) == 0
    said = capsys.readouterr().err
    assert said.count("has no hyperedges") == 1
    assert "note: HGNN: all_pairs has no hyperedges at num_experts 1" in said
    trained = only_run(results_of(tiny))[1]["check"]["checks"]["trained_isolation"]
    assert "(B, L) = (12, 16)" in trained["detail"], "the run's own batch, also of few validation sequences"


def test_the_embedded_text_is_announced_loudly(tiny, capsys):
    """Data: the warning is on screen, in the record and in the final table."""
    flags = tiny[: tiny.index("--data-dir")] + tiny[tiny.index("--results-dir") :]
    assert main([*flags, "--data-source", "embedded"]) == 0
    printed = capsys.readouterr().out
    assert "WARNING: NOT WIKITEXT-2" in printed
    assert printed.count("NOT WIKITEXT-2") == 2
    _, record = only_run(results_of(tiny))
    assert "NOT WIKITEXT-2" in record["data"]["warning"]
    unknown = load_corpus(source="embedded").splits["validation"].unknown_words(128)  # seen once in training
    assert record["quality"]["validation"]["unknown_words"] == unknown > 0
    assert f"{unknown} of the tokens" in " ".join(printed.split())


def test_the_table_fits_80_columns_and_says_what_counts(plain):
    printed = plain[1]
    table = printed[printed.index("HGNN ·") :].splitlines()
    places = ("record:", "plots:", "next:")
    assert max(len(line) for line in table if not line.startswith(places)) <= 80
    text = " ".join(" ".join(table).split())
    for part in (
        "perplexity",
        "(n-gram baselines: unigram",
        "tokens/s",
        "MiB",
        "experts 3,",
        "equal shares are 0.250",
        "counts as planned:",
        "✓ passed: ",
        "updates, as requested",
        "final training loss",
        "record:",
    ):
        assert part in text


@pytest.mark.slow
def test_on_real_wikitext_a_few_steps_beat_the_start(tmp_path, wikitext_dir, monkeypatch):
    monkeypatch.setenv("GNNMOE_DATA_DIR", str(wikitext_dir))
    flags = "--embed-dim 8 --num-layers 1 --max-seq-length 32 --batch-size 8 --max-steps 12 --eval-every 6"
    flags += " --num-eval-samples 16 --speed-steps 1"
    assert main([*flags.split(), "--results-dir", str(tmp_path)]) == 0
    folder, record = only_run(tmp_path)
    assert record["data"]["vocabulary"]["size"] == 33278
    assert record["data"]["splits"]["train"]["tokens"] == 2_088_628
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    losses = [row["nll_sum"] / row["tokens"] for row in rows if row["kind"] == "validation"]
    assert losses[1] < losses[0]
    assert record["quality"]["validation"]["unknown_words"] == 0  # the text itself holds <unk>
    unigram = quantities.unigram_perplexity(record_of(record))
    assert unigram is not None
    assert 500 < unigram < 2000


def test_a_loss_beyond_any_perplexity_still_has_its_table(tiny, capsys):
    assert main([*tiny, "--coupler", "mean", "--learning-rate", "1000", "--max-grad-norm", "1e9"]) in (0, 1)
    assert "record:" in capsys.readouterr().out
