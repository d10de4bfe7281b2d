"""What the plots of a run look like: readable with any name, any number and any coupler."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.report.plots.run import adjacency_plot, spread, training_plot, trajectories_plot, weights_plot
from bench.report.plots.style import new_figure, plot_style, printable, shorten
from bench.study.run_files import read_run
from tests._records import made_data
from tests.report._made_runs import STEPS, TOKENS, made_history, made_run, texts, training

NASTY = "<b>bold</b> & $\\frac$ \t\n\x07 漢 " + "a_very_long_name " * 12


def test_labels_never_overlap_and_stay_near():
    wanted = np.array([0.1, 0.1, 0.1, 0.9])
    places = spread(wanted, 0.05)
    assert places == pytest.approx([0.05, 0.1, 0.15, 0.9])
    crowded = spread(np.full(28, 0.99), 0.03)
    assert np.diff(crowded).min() >= 0.03 - 1e-12
    assert crowded.max() <= 1 + 1e-12
    assert spread(np.zeros(100), 0.03)[-1] == pytest.approx(1)


def test_warnings_stand_in_the_figure(tmp_path):
    run = made_run(tmp_path / "run", data=made_data(embedded=True), status="check_failed")
    assert any("NOT WIKITEXT-2: embedded text" in text and "leak check failed" in text for text in texts(run))
    assert any("status: diverged" in text for text in texts(made_run(tmp_path / "other", status="diverged")))
    fine = texts(made_run(tmp_path / "fine"))
    assert not any("WIKITEXT" in text or "leak check" in text or "status" in text for text in fine)


def test_the_unigram_is_drawn_for_the_same_tokens_only(tmp_path):
    run = made_run(tmp_path / "run")
    assert f"unigram {math.exp(341.25 / TOKENS):,.1f}" in texts(run)
    text = (run / "history.jsonl").read_text().replace(f'"tokens": {TOKENS}}}', f'"tokens": {TOKENS + 1}}}')
    (run / "history.jsonl").write_text(text)
    assert not any(text.startswith("unigram") for text in texts(run))


@pytest.mark.filterwarnings("error")
def test_any_run_name_and_coupler_name_can_be_drawn(tmp_path):
    run = made_run(tmp_path / "run", run_name=NASTY, status="check_failed", data=made_data(embedded=True))
    record = json.loads((run / "record.json").read_text())
    record["config"]["model"]["coupler_type"] = "package.$module$:" + "W" * 200
    weights = record["communication"]["layer_0"]["hyperedge_weights"]
    weights["$\\frac$" + "x" * 100] = weights.pop("{1,2}")
    (run / "record.json").write_text(json.dumps(record))
    training(run)
    with plot_style():
        plot = weights_plot(read_run(run))
        assert plot is not None
        assert len(plot.files()) == 3
        figure = new_figure(read_run(run).record, "Nothing", 5, 1)
        figure.draw_without_rendering()
        assert figure.texts
        assert max(text.get_window_extent().x1 for text in figure.texts) <= figure.bbox.x1
        assert min(text.get_window_extent().y0 for text in figure.texts) >= 100 - 1, "runs into the panels"


@pytest.mark.parametrize("coupler", ["HGNN", pytest.param("GNN", marks=pytest.mark.slow)])
def test_no_text_lies_on_another(tmp_path, coupler, monkeypatch):
    """28 hyperedges whose weights end within a thousandth of each other; every cell of the heat maps."""
    run = made_run(tmp_path / "run", coupler, run_name="a name " * 40, status="check_failed")
    if coupler == "HGNN":
        record = json.loads((run / "record.json").read_text())
        names = [f"{{{i},{j}}}" for i in range(8) for j in range(i)]
        ends = np.linspace(1, 1.001, len(names))
        record["communication"] = {"layer_0": {"hyperedge_weights": dict(zip(names, ends, strict=True))}}
        (run / "record.json").write_text(json.dumps(record))
        trace = np.stack([np.ones_like(ends), ends])
        np.savez(run / "communication.npz", **{"step": [0, 12], "layer_0.hyperedge_weights": trace})  # pyright: ignore
    data = read_run(run)
    with plot_style():
        for draw in (training_plot, weights_plot,
                     trajectories_plot, adjacency_plot):  # fmt: skip
            plot = draw(data)
            if plot is not None:
                assert overlaps(plot.figure, monkeypatch) == [], plot.name


def overlaps(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the pairs of drawn texts that share more than a pixel in both directions."""
    drawn: dict[Text, None] = {}
    real = Text.draw
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: (drawn.update({text: None}), real(text, renderer)))
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text().strip()]
    assert len(boxes) > 10
    return [
        (one, other)
        for number, (one, a) in enumerate(boxes)
        for other, b in boxes[:number]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def test_long_names_keep_both_ends():
    assert shorten("a" * 60) == "a" * 60
    cut = shorten("a" * 100 + "b" * 100)
    assert (len(cut), cut[:39], cut[-20:]) == (60, "a" * 39, "b" * 20)
    assert printable("a\tb\x07漢$é") == "a b□□$é"


def test_one_evaluation_is_still_a_figure(tmp_path):
    run = made_run(tmp_path / "run", steps=1)
    figure, rows = training(run)
    assert [row["step"] for row in rows if row["validation_loss_nats"] is not None] == [1]
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines), "a single point has no line"


def test_numbers_beyond_all_scales_are_drawn(tmp_path):
    run = made_run(tmp_path / "run")
    rows = made_history(STEPS)
    rows[-1]["nll_sum"] = 800.0 * TOKENS
    rows[0]["gradient_norm"], rows[1]["gradient_norm"] = math.inf, 1e9
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training(run)[1][-1]["validation_perplexity"] == math.inf
