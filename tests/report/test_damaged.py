"""What was damaged in a study is told, with the file and the key, and nothing else suffers from it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.record import read_record, record_of
from bench.report.__main__ import main
from bench.report.contents import make_plots, make_report
from bench.report.page import render_page
from bench.study.run_files import history_text, read_arrays, read_run
from bench.study.runs import load_study
from tests._records import made_diagnostics
from tests.report._made_studies import made_study
from tests.study.test_study import change, runs_of

REPOSITORY = Path(__file__).parents[2]
DAMAGE: list[tuple[str, Any, str]] = [
    ("config", 3, "config is 3; it must be an object"),
    ("config__model", None, "config.model is None"),
    ("config__model__coupler_type", None, "config.model.coupler_type is None; it must be a text"),
    ("config__training", [], r"config.training is \[\]"),
    ("config__data", 1, "config.data is 1"),
    ("seed", "0", "seed is '0'; it must be a whole number"),
    ("time", None, "time is None"),
    ("time__start", 7, "time.start is 7"),
    ("time__seconds", {"total": "long"}, "time.seconds.total is 'long'"),
    ("time__parts", {}, r"time.parts is \{\}; it must be a list"),
    ("time__parts", [{"command": "x"}], "it lacks time.parts.0.start"),
    ("data", [], r"data is \[\]"),
    ("environment", "cpu", "environment is 'cpu'"),
    ("environment", {"device_type": "cpu"}, "it lacks environment.python"),
    ("quality", {}, "it lacks quality.validation"),
    ("quality__validation", 3.5, "quality.validation is 3.5"),
    ("quality__validation", {"tokens": 5}, "it lacks quality.validation.nll_sum"),
    ("quality__validation__nll_sum", float("nan"), "quality.validation.nll_sum is nan; .* a finite number"),
    ("quality__validation__tokens", 0, "quality.validation.tokens is 0; it must be a number above 0"),
    ("quality__validation__length", "64", "quality.validation.length is '64'"),
    ("quality__validation__unigram_nll_sum", "1", "quality.validation.unigram_nll_sum is '1'"),
    ("speed__step_seconds", [], "speed.step_seconds is .*not empty"),
    ("speed__step_seconds", [0.0] * 10, "speed.step_seconds.0 is 0.0; it must be a number above 0"),
    ("speed__step_tokens", [64], "speed.step_tokens is .*as long as step_seconds, 10"),
    ("speed__fetch_seconds", [], "speed.fetch_seconds is .*not empty"),
    ("speed__matrix_flops_per_second", 0, "speed.matrix_flops_per_second is 0; it must be a number above 0"),
    ("speed__marginal", {"step_seconds": [1.0]}, "it lacks speed.marginal.reference"),
    ("speed__more", 1, "speed.more is no known field"),
    ("memory__peak_allocated_bytes", "much", "memory.peak_allocated_bytes is 'much'"),
    ("parameters", {"total": 5}, "it lacks parameters.expert"),
    ("flops", 5, "flops is 5"),
    ("used__ledger", {}, "it lacks used.ledger.epochs"),
    ("used__ledger__epochs", [3], "used.ledger.epochs.0 is 3"),
    ("check__checks", [], r"check.checks is \[\]"),
    ("communication", {"first": {}}, "communication.first is .* the name of a layer"),
    ("communication__layer_0", [], r"communication.layer_0 is \[\]"),
    ("communication", {"layer_" + "9" * 5000: {}}, r"communication.layer_9+"),
    ("diagnostics", made_diagnostics(1e308), r"diagnostics.layers.0.cosine.0.1 is 1e\+308"),
    ("diagnostics", made_diagnostics(0.5, (1e308, 1e308)), "diagnostics.layers.0.ablation_nats.0 is"),
    ("diagnostics", made_diagnostics(0.5, error=-1.0), "diagnostics.layers.0.ablation_standard_error.0 is"),
]


@pytest.fixture
def study(tmp_path) -> Path:
    return made_study(tmp_path / "made", {"mean": 0.0, "HGNN all_pairs": 0.02}, seeds=2, history=2)


def test_a_damaged_record_is_unreadable_and_says_where(study):
    run = runs_of(study, "HGNN")[0]
    sound = (run / "record.json").read_bytes()
    for key, value, says in DAMAGE:
        (run / "record.json").write_bytes(sound)
        change(run, **{key: value})
        with pytest.raises(ValueError, match=f"{run / 'record.json'} is damaged: {says}"):
            read_record(run)
        assert [folder for folder, _ in load_study(study).unreadable] == [run], key
    assert len(make_report(load_study(study)).study.runs) == 3


def test_huge_weights_are_shown(study):
    for run in runs_of(study, "HGNN"):
        change(run, communication__layer_0__hyperedge_weights={"{0,1}": -1e308, "{0,2}": 1e308})
    report = make_report(load_study(study))
    assert "HGNN, layer 0: weights between −1.0e+308 and 1.0e+308" in report.sections[0].weights[0].sentence()


def test_what_is_no_record_is_unreadable(study):
    run = runs_of(study, "HGNN")[0]
    for text in ("3", "null", "[]", '"text"', "{}", "[" * 100_000, "\udcff"):
        (run / "record.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        [(folder, why)] = load_study(study).unreadable
        assert folder == run, text[:9]
        assert str(run / "record.json") in why


def test_ls_lists_all_other_studies_beside_a_damaged_one(tmp_path, study, capsys):
    made_study(tmp_path / "sound", {"mean": 0.0}, seeds=1, history=2)
    made_study(tmp_path / "wholly", {"mean": 0.0}, seeds=1, history=2)
    (runs_of(study, "mean")[0] / "record.json").write_text("3")
    change(runs_of(tmp_path / "wholly", "mean")[0], time=None)
    assert main(["ls", "--results-dir", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 ok" in out
    assert "1 ok" in out
    assert "sound" in out
    assert "wholly" in out


def test_every_committed_record_is_sound():
    records = list((REPOSITORY / "results").glob("**/record.json"))
    for path in records:
        record_of(json.loads(path.read_text()))


def test_lines_of_a_history_that_are_no_rows_are_passed_over(study):
    run = runs_of(study, "mean")[0]
    before = read_run(run)
    path, (first, *rest) = (
        run / "history.jsonl",
        (run / "history.jsonl").read_bytes().splitlines(keepends=True),
    )
    row = {**before.train[0], "kind": "train"}
    changes: list[dict[str, Any]] = [
        {"loss": "x"},
        {"tokens": 0},
        {"step": True},
        {"epoch": 2**63},
        {"loss": 1},
    ]
    wrong = b"".join(json.dumps({**row, **change}).encode() + b"\n" for change in changes)
    wrong += (
        b'12\nnull\n[]\n{"kind": "train"}\n{"step": 1}\n{"kind": [], "step": 1}\n\xff\xfe\n'
        + b"[" * 9999
        + b"\n"
    )
    path.write_bytes(first + wrong + b"".join(rest) + b'{"kin')
    lines = path.read_bytes().count(b"\n") + 1
    message = f"{path} is damaged: 13 of {lines} lines are no rows of a history and are left out; the first"
    after = read_run(run)
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert after.train == before.train
    assert after.validation == before.validation


@pytest.mark.parametrize(
    ("name", "data"),
    [("nll.npz", b""), ("nll.npz", b"PK\x03\x04 cut short"), ("communication.npz", b"\x80\x04K\x03."),
     ("communication.npz", b"junk")],
)  # fmt: skip
def test_arrays_that_cannot_be_read_are_left_out_and_told(study, name, data):
    run = runs_of(study, "HGNN")[0]
    (run / name).write_bytes(data)
    with pytest.raises(ValueError, match=str(run / name)):
        read_arrays(run / name)
    found = load_study(study)
    [(folder, why)] = found.unreadable
    assert folder == run
    assert str(run / name) in why
    assert len(found.runs) == 4
    own = next(other for other in found.runs if other.folder == run)
    assert own.articles is None if name == "nll.npz" else own.data.trace == {}
    report = make_report(found)
    if data == b"junk":
        assert make_plots(report)
    assert name in render_page(report, {})


@pytest.mark.parametrize("name", ["nll.npz", "history.jsonl.gz"])
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(study, monkeypatch, name):
    run = runs_of(study, "HGNN")[0]
    monkeypatch.setattr("bench.study.run_files.MOST_UNPACKED", 2**20)
    np.savez_compressed(run / "nll.npz", validation_nll=np.zeros(2**18))
    (run / "history.jsonl.gz").write_bytes(gzip.compress(bytes(2**21)))
    (run / "history.jsonl").unlink()
    read = read_arrays if name == "nll.npz" else lambda path: history_text(path.parent)
    with pytest.raises(ValueError, match=rf"{name} has .*more than 1 MiB"):
        read(run / name)


def test_arrays_that_do_not_fit_together_are_left_out(study):
    run = runs_of(study, "HGNN")[0]
    np.savez(
        run / "communication.npz", **{"step": np.arange(3), "layer_0.hyperedge_weights": np.ones((2, 3))}
    )
    np.savez(run / "nll.npz", validation_nll=np.ones(3), validation_document=np.array([0, 1]))
    found = load_study(study)
    own = next(other for other in found.runs if other.folder == run)
    assert list(own.data.trace) == ["step"]
    assert own.articles is None
    np.savez(run / "communication.npz", step=np.array([object()], dtype=object))
    assert read_run(run).trace == {}
    (run / "nll.npz").unlink()
    assert load_study(study).runs[0].articles is not None or load_study(study).runs[1].articles is not None
