"""The plots of one run, drawn from made records: what they show equals what was recorded."""

from __future__ import annotations

import csv
import json
import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from bench.report.plots.run import plot_run, smooth, smoothing_span, trajectories_plot, weights_plot
from bench.study.run_files import read_run
from tests.report._made_runs import (
    STEPS,
    made_communication,
    made_history,
    made_run,
    texts,
    without_history,
)

EXPECTED = {
    "HGNN": {"training", "hyperedge_weights", "hyperedge_weights_over_steps", "parameters"},
    "GNN": {"adjacency", "parameters"},
    "mean": {"parameters"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    """By coupler, a run folder and what ``plot_run`` says it wrote there."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"HGNN": made_run(folder / "HGNN")}
    runs |= {coupler: without_history(folder / coupler, coupler) for coupler in ("GNN", "mean")}
    return {coupler: (run, plot_run(run)) for coupler, run in runs.items()}


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "plots" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("coupler", EXPECTED)
def test_every_figure_is_an_svg_a_png_and_a_csv(drawn, coupler):
    run, written = drawn[coupler]
    assert {path.name for path in written} == {
        f"{name}.{end}" for name in EXPECTED[coupler] for end in ("svg", "png", "csv")
    }
    assert sorted(written) == sorted((run / "plots").iterdir())
    for path in written:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        if path.suffix == ".png":
            assert np.ptp(imread(path)[..., :3]) > 0.5, f"{path.name} is empty"


def test_the_training_table_is_themade_history(drawn):
    run, _ = drawn["HGNN"]
    rows = {int(row["step"]): row for row in table(run, "training")}
    history = made_history(STEPS)
    assert sorted(rows) == list(range(1, STEPS + 1))
    for row in history:
        found = rows[row["step"]]
        if row["kind"] == "train":
            assert float(found["train_loss_nats"]) == row["loss"]
            assert float(found["learning_rate"]) == row["learning_rate"]
            assert float(found["gradient_norm"]) == row["gradient_norm"]
            assert int(found["train_tokens"]) == row["tokens"]
        else:
            loss = row["nll_sum"] / row["tokens"]
            assert float(found["validation_loss_nats"]) == loss
            assert float(found["validation_perplexity"]) == math.exp(loss)
    assert [step for step, row in rows.items() if row["validation_loss_nats"]] == [4, 8, 12]


def test_the_other_tables_are_the_record(drawn):
    hgnn, gnn = drawn["HGNN"][0], drawn["GNN"][0]
    rows = table(hgnn, "hyperedge_weights")
    weights = {(int(row["layer"]), row["hyperedge"]): float(row["weight"]) for row in rows}
    record = read_run(hgnn).record.model_dump()["communication"]
    assert weights == {
        (n, k): v for n in range(2) for k, v in record[f"layer_{n}"]["hyperedge_weights"].items()
    }
    trace = read_run(hgnn).trace
    for row in table(hgnn, "hyperedge_weights_over_steps"):
        time = trace["step"].tolist().index(int(row["step"]))
        position = ["{0,1}", "{0,2}", "{1,2}"].index(row["hyperedge"])
        assert float(row["weight"]) == trace[f"layer_{row['layer']}.hyperedge_weights"][time, position]
    assert len(table(hgnn, "hyperedge_weights_over_steps")) == trace["step"].size * 2 * 3
    for row in table(gnn, "adjacency"):
        matrix = made_communication("GNN", int(row["layer"]))[row["graph_layer"]]
        assert float(row["adjacency"]) == matrix[int(row["listens"])][int(row["speaks"])]
    assert len(table(gnn, "adjacency")) == 2 * 2 * 9
    counts = {row["part"]: int(row["parameters"]) for row in table(gnn, "parameters")}
    assert counts == {"expert": 600, "coupler": 150, "other": 250}


def test_smoothing_by_hand():
    """Span 3 keeps 1/2: (8·½ + 4) / 1.5, then ((8·½ + 4)·½ + 2) / 1.75."""
    assert smooth([8.0, 4.0, 2.0], span=3) == pytest.approx([8.0, 16 / 3, 24 / 7])
    assert smooth([5.0] * 4, span=10) == pytest.approx([5.0] * 4)
    assert [smoothing_span(n) for n in (1, 60, 120, 5000)] == [2, 6, 12, 100]


def test_what_is_missing_is_left_out(tmp_path):
    nothing = {"value": None, "reason": "the run did not get this far"}
    run = made_run(tmp_path / "run", status="crashed", communication=nothing, quality=nothing)
    data = read_run(run)
    assert weights_plot(data) is None
    assert trajectories_plot(data) is None, "no names without the record"
    assert not any(text.startswith("unigram") for text in texts(run))
    (run / "history.jsonl").unlink()
    (run / "plots").mkdir()
    (run / "plots" / "training.svg").write_text("of an earlier call")
    assert {path.stem for path in plot_run(run)} == {"parameters"}
    assert {path.stem for path in (run / "plots").iterdir()} == {"parameters"}, "an old figure is left"
    blocked = made_run(tmp_path / "blocked", status="check_failed", communication=nothing, parameters=nothing)
    (blocked / "history.jsonl").write_text("")
    assert plot_run(blocked) == []
    assert not (blocked / "plots").exists()
    silent = without_history(tmp_path / "silent")
    (silent / "communication.npz").unlink()
    assert {path.stem for path in plot_run(silent)} == {"hyperedge_weights", "parameters"}


def test_no_record_and_a_broken_record_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no record\.json"):
        plot_run(tmp_path)
    (tmp_path / "record.json").write_text('{"status": ')
    with pytest.raises(ValueError, match="cut short"):
        plot_run(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="it lacks run_id"):
        plot_run(tmp_path)


def test_a_history_cut_short_or_written_twice_is_read(tmp_path):
    run = made_run(tmp_path / "run")
    again = {**made_history(1)[0], "step": 2, "loss": 1.25}
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps(again) + '\n{"kind": "train", "st')
    train = read_run(run).train
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert train[1]["loss"] == 1.25


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(drawn, monkeypatch):
    run, written = drawn["HGNN"]
    first = {path.name: path.read_bytes() for path in written}
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)  # a user's own settings
    assert {path.name: path.read_bytes() for path in plot_run(run)} == first
    assert matplotlib.rcParams["font.size"] == 20.0
    assert b"<dc:date>" not in first["training.svg"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, monkeypatch, existing):
    run = without_history(tmp_path / "run", "mean")
    before = {path.name: path.read_bytes() for path in plot_run(run)} if existing else {}
    real, calls = os.fsync, []

    def full_after_two(file: int) -> None:
        calls.append(file)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full_after_two)
    with pytest.raises(OSError, match="No space left"):
        plot_run(run)
    found = {path.name: path.read_bytes() for path in run.glob("plots/*")}
    assert found == before
    assert (run / "plots").exists() == existing
