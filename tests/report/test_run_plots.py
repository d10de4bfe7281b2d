"""The plots of one run: what they show equals what was recorded, with any name and any number."""

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

from bench.report.plots.run import (
    memory_plot,
    plot_run,
    smooth,
    smoothing_span,
    training_plot,
    trajectories_plot,
    weights_plot,
)
from bench.report.plots.style import plot_style, printable, shorten, spread
from bench.study.run_files import read_run
from tests._records import made_data
from tests.report._layout import check_layout
from tests.report._made_runs import (
    MEMORY,
    STEPS,
    TOKENS,
    made_history,
    made_run,
    texts,
    training,
    without_history,
)

EXPECTED = {
    "HGNN": {"training", "hyperedge_weights", "hyperedge_weights_over_steps", "memory"},
    "mean": {"memory"},
}
NASTY = "<b>bold</b> & $\\frac$ \t\n\x07 漢 " + "a_very_long_name " * 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, tuple[Path, list[Path]]]:
    """By coupler, a run folder and what ``plot_run`` says it wrote there."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"HGNN": made_run(folder / "HGNN")}
    runs["mean"] = without_history(folder / "mean", "mean")
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


def test_the_training_table_is_the_made_history(drawn):
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
    hgnn = drawn["HGNN"][0]
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
    assert {row["part"]: int(row["bytes"]) for row in table(hgnn, "memory")} == MEMORY


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
    assert {path.stem for path in plot_run(run)} == {"memory"}
    assert {path.stem for path in (run / "plots").iterdir()} == {"memory"}, "an old figure is left"
    blocked = made_run(tmp_path / "blocked", status="check_failed", communication=nothing, memory=nothing)
    (blocked / "history.jsonl").write_text("")
    assert plot_run(blocked) == []
    assert not (blocked / "plots").exists()
    silent = without_history(tmp_path / "silent")
    (silent / "communication.npz").unlink()
    assert {path.stem for path in plot_run(silent)} == {"hyperedge_weights", "memory"}


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


# --- looks -----------------------------------------------------------------------------------------


def test_labels_never_overlap_and_stay_near():
    places = spread(np.array([0.1, 0.1, 0.1, 0.9]), 0.05)
    assert places == pytest.approx([0.05, 0.1, 0.15, 0.9])
    crowded = spread(np.full(28, 0.99), 0.03)
    assert np.diff(crowded).min() >= 0.03 - 1e-12
    assert crowded.max() <= 1 + 1e-12


def test_the_header_is_one_line_and_warnings_stand_below(tmp_path):
    run = made_run(tmp_path / "run", data=made_data(embedded=True), status="check_failed")
    assert any("NOT WIKITEXT-2: embedded text" in text and "leak check failed" in text for text in texts(run))
    assert any("status: diverged" in text for text in texts(made_run(tmp_path / "other", status="diverged")))
    fine = made_run(tmp_path / "fine")
    header = [text.get_text() for text in training(fine, laid_out=False)[0].texts]
    assert header[0] == f"Training reached perplexity {math.exp(300.5 / TOKENS):,.1f} on validation"
    assert len(header) == 2
    assert header[1].endswith("HGNN · HypergraphConv · all_pairs · E 3 · seed 3 · made")


def test_the_unigram_is_drawn_for_the_same_tokens_only(tmp_path):
    run = made_run(tmp_path / "run")
    assert f"unigram {math.exp(341.25 / TOKENS):,.1f}" in texts(run)
    text = (run / "history.jsonl").read_text().replace(f'"tokens": {TOKENS}}}', f'"tokens": {TOKENS + 1}}}')
    (run / "history.jsonl").write_text(text)
    assert not any(text.startswith("unigram") for text in texts(run))


@pytest.mark.filterwarnings("error")
def test_no_text_lies_on_another_with_any_name(tmp_path, monkeypatch):
    """28 hyperedges whose weights end within a thousandth of each other."""
    run = made_run(tmp_path / "run", run_name=NASTY, status="check_failed", data=made_data(embedded=True))
    record = json.loads((run / "record.json").read_text())
    record["config"]["model"]["coupler_type"] = "package.$module$:" + "W" * 200
    names = ["$\\frac$" + "x" * 100, *(f"{{{i},{j}}}" for i in range(8) for j in range(i))][:28]
    ends = np.linspace(1, 1.001, len(names))
    record["communication"] = {"layer_0": {"hyperedge_weights": dict(zip(names, ends, strict=True))}}
    (run / "record.json").write_text(json.dumps(record))
    trace = np.stack([np.ones_like(ends), ends])
    np.savez(run / "communication.npz", **{"step": [0, 12], "layer_0.hyperedge_weights": trace})  # pyright: ignore
    data = read_run(run)
    for draw in (training_plot, weights_plot, trajectories_plot, memory_plot):
        with plot_style():
            plot = draw(data)
        assert plot is not None
        check_layout(plot.figure, monkeypatch)
    assert shorten("a" * 55) == "a" * 53 + "…"
    assert printable("a\tb\x07漢$é") == "a b□□$é"


def test_one_evaluation_is_still_a_figure(tmp_path):
    figure, rows = training(made_run(tmp_path / "run", steps=1))
    assert [row["step"] for row in rows if row["validation_loss_nats"] is not None] == [1]
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines), "a single point has no line"


def test_numbers_beyond_all_scales_are_drawn(tmp_path):
    run = made_run(tmp_path / "run")
    rows = made_history(STEPS)
    rows[-1]["nll_sum"] = 800.0 * TOKENS
    rows[0]["gradient_norm"], rows[1]["gradient_norm"] = math.inf, 1e9
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training(run)[1][-1]["validation_perplexity"] == math.inf
