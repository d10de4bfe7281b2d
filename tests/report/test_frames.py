"""``bench.load`` and ``bench.history``: a study as data frames."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import bench
from bench.record import read_record
from bench.report.tables import runs_table
from bench.study.run_files import history_text
from bench.study.runs import load_study
from gnnmoe.config import Refused

REPOSITORY = Path(__file__).parents[2]
SMALL = REPOSITORY / "results/reference/small"
DOCS = (REPOSITORY / "docs/python.md").read_text()


@pytest.fixture(scope="module")
def runs():
    return bench.load("small", REPOSITORY / "results")


@pytest.fixture(scope="module")
def steps():
    return bench.history(SMALL)


def test_a_row_has_the_figures_of_its_record(runs):
    assert len(runs) == len(list(SMALL.glob("*/record.json"))) == runs.run_id.nunique()
    for row in runs.iloc[::7].itertuples():
        record = json.loads((SMALL / row.run_id / "record.json").read_text())
        sums = record["quality"]["validation"]
        assert row.loss == pytest.approx(sums["nll_sum"] / sums["tokens"], rel=1e-12)
        assert row.perplexity == pytest.approx(math.exp(row.loss), rel=1e-12)
        assert row.bits_per_byte == pytest.approx(sums["nll_sum"] / math.log(2) / sums["bytes"], rel=1e-12)
        assert row.parameters == record["parameters"]["total"]
        assert row.training_flops_per_token == record["flops"]["training_flops_per_token"]
        assert row.peak_memory_bytes == record["memory"]["peak_allocated_bytes"]
        assert (row.seed, row.coupler_type) == (record["seed"], record["config"]["model"]["coupler_type"])
        assert row.learning_rate == record["config"]["training"]["learning_rate"]
        assert row.stale is None, "a record that was published before there were hashes"


def test_a_row_of_the_history_is_a_row_of_the_file(runs, steps):
    name = runs.run_id[0]
    rows = [json.loads(line) for line in (history_text(SMALL / name) or "").splitlines()]
    rows = [row for row in rows if row["kind"] in ("train", "validation")]
    ours = steps[steps.run_id == name]
    assert len(ours) == len(rows)
    for row in (rows[0], rows[-1]):
        found = ours[(ours.kind == row["kind"]) & (ours.step == row["step"])].iloc[0]
        loss = row["loss"] if "loss" in row else row["nll_sum"] / row["tokens"]
        assert found.loss == pytest.approx(loss, rel=1e-12)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-12)


def test_stale_says_whether_the_code_has_changed(small_data_dir, tmp_path, monkeypatch):
    from bench.run.__main__ import main

    flags = "--embed-dim 8 --num-heads 1 --num-layers 1 --max-seq-length 16 --batch-size 4 --max-steps 1"
    folder = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path), "--no-plots", "--quiet"]
    assert main([*flags.split(), "--coupler", "mean", "--num-eval-samples", "4", *folder]) == 0
    assert bench.load("default", tmp_path).stale.tolist() == [False]
    monkeypatch.setattr("bench.training.environment.project_sha256", lambda: "0" * 64)
    assert bench.load("default", tmp_path).stale.tolist() == [True]
    [record] = [read_record(path.parent) for path in tmp_path.glob("default/*/record.json")]
    record.config.model["coupler_type"] = "gone.py:Gone"
    monkeypatch.setattr("bench.study.runs.read_record", lambda _: record)
    assert bench.load("default", tmp_path).stale.tolist() == [None]


def test_the_csv_of_runs_has_the_same_columns(runs):
    written = pd.read_csv(io.StringIO(runs_table(load_study(SMALL).groups).csv())).set_index("run_id")
    ours = runs.set_index("run_id").loc[written.index]
    assert set(ours.columns) - set(written.columns) == {"stale"}
    for column in ("configuration", "status", "coupler_type", "seed", "learning_rate", "loss", "perplexity"):
        assert written[column].tolist() == ours[column].tolist(), column


def test_every_column_is_documented(runs, steps):
    first, last = map(runs.columns.get_loc, ("coupler_type", "perplexity"))
    for column in {*runs.columns, *steps.columns} - {*runs.columns[first:last]}:
        assert f"`{column}`" in DOCS


def test_another_study_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(Refused, match="Studies are looked for in"):
        bench.load("nothing", tmp_path)


def test_the_package_imports_neither_pandas_nor_torch():
    script = "import sys, bench; sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == 0
