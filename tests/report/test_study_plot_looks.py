"""What the plots of a study look like: readable with any name, number, status and count."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from bench.report.comparison import compare
from bench.report.plots.frame import (
    MAX_LOOKS,
    Curve,
    Frame,
    curves_range,
    looks,
    short_names,
    usual_reach,
    value_range,
)
from bench.report.plots.run import smooth
from bench.report.plots.study import study_plots
from bench.report.plots.style import DPI, Plot, settle
from bench.report.plots.style import plot_style as style
from bench.study.runs import load_study
from tests.report._made_studies import made_study

PATH = "examples/" + "a_long_folder_name/" * 5 + "coupler_{}.py:Coupler"
HOSTILE = {
    "a": PATH.format("one"), "b": PATH.format("two"), "c": "<script>alert('x')</script> & $\\frac{1}{2}$",
    "d": "🎉🎉 $E=mc^2$", "e": "\t\n% \x07漢",
}  # fmt: skip


def plots_of(folder: Path, name: str | None = None) -> dict[str, Plot]:
    comparison = compare(load_study(folder).groups[0])
    return {plot.name: plot for plot in study_plots(name or folder.name, comparison)}


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]  # pyright: ignore[reportAttributeAccessIssue]


def check_layout(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawn text leaves the picture or lies on another one, at the resolution of the png."""
    drawn: dict[Text, None] = {}
    real = Text.draw
    with monkeypatch.context() as patch, style():
        settle(figure)
        figure.set_dpi(DPI)
        patch.setattr(Text, "draw", lambda text, renderer: (drawn.update({text: None}), real(text, renderer)))
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text().strip()]
    assert len(boxes) > 10
    for text, box in boxes:
        outside = max(-box.x0, -box.y0, box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1)
        assert outside <= 1, f"{text!r} leaves the picture by {outside:.0f} pixels"
    for (one, a), (other, b) in combinations(boxes, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) <= 1, f"{one!r} lies on {other!r}"


@pytest.mark.filterwarnings("error")
def test_hostile_names_and_failed_runs_stay_readable(tmp_path, monkeypatch):
    failed = {(key, 32, seed): "oom" for key in "ab" for seed in range(3)}
    failed |= {("e", 32, seed): "crashed" for seed in range(3)} | {("d", 2, 1): "timeout"}
    effects = {"mean": 0.0, "a": -0.03, "b": -0.02, "c": 0.01, "d": 0.02, "e": 0.0}
    folder = made_study(tmp_path / "study", effects, seeds=3, experts=(2, 32), names=HOSTILE,
                        failed=failed, embedded=True)  # fmt: skip
    plots = plots_of(folder, "<script>alert(1)</script> $x$ 🎉 " + "a_very_long_name " * 12)
    assert len(plots) == 6
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
    assert set(plots["coupler_cost"].files()) == {f"coupler_cost.{end}" for end in ("svg", "png", "csv")}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_sixty_configurations_stay_readable(tmp_path, monkeypatch):
    effects = {"mean": 0.0, **{f"coupler_{number}": 0.003 * (number - 30) for number in range(62)}}
    failed = {f"coupler_{number}": "oom" for number in range(50, 58)}
    folder = made_study(tmp_path / "study", effects, seeds=2, failed=failed, arrays=False)
    plots = plots_of(folder)
    for name in ("perplexity", "loss_curves", "pareto"):
        check_layout(plots[name].figure, monkeypatch)
    assert "In colour: the best 7 and the reference; grey: 47 others." in " ".join(
        text.get_text() for text in plots["loss_curves"].figure.texts)  # fmt: skip
    assert "and 3 more" in texts_of(plots["pareto"].figure)
    rows = [tick.get_text() for tick in plots["perplexity"].figure.axes[0].get_yticklabels()]
    assert len(rows) == 63
    assert max(plot.figure.get_figheight() for plot in plots.values()) < 20
    training = plots["loss_curves"].figure.axes[0]
    assert len(training.lines) == 8
    (grey,) = (one for one in training.collections if isinstance(one, LineCollection))
    assert len(grey.get_segments()) == 47, "the others are one artist"


@pytest.mark.slow
def test_a_hundred_rows_are_cut_in_the_picture_and_not_in_the_table(tmp_path):
    effects = {"mean": 5.0, **{f"coupler_{number:03}": 0.01 * number for number in range(100)}}
    folder = made_study(tmp_path / "study", effects, seeds=1, noise=0, history=0, arrays=False)
    plots = plots_of(folder)
    shown = [tick.get_text() for tick in plots["perplexity"].figure.axes[0].get_yticklabels()]
    assert len(shown) == 78
    assert shown[-1].startswith("mean (reference)"), "the reference is never left out"
    assert "23 configurations between the best and the worst: table only." in " ".join(
        text.get_text() for text in plots["perplexity"].figure.texts)  # fmt: skip
    assert len({row[0] for row in plots["perplexity"].rows if row[-1]}) == 101
    assert len(plots["coupler_cost"].rows) == 100


@pytest.mark.slow
def test_many_lines_that_ran_out_of_memory_are_counted(tmp_path):
    effects = {"mean": 0.0, **{f"coupler_{number}": 0.01 * number for number in range(14)}}
    failed = {(key, 8, 0): "oom" for key in effects}
    plots = plots_of(made_study(tmp_path / "study", effects, seeds=1, experts=(2, 8), failed=failed))
    for axes in plots["experts"].figure.axes:
        assert len([line for line in axes.lines if line.get_markerfacecolor() == "white"]) == 10
        assert {"+5", "out of memory"} <= {text.get_text() for text in axes.texts}
    assert sum(row[-2] for row in plots["experts"].rows) == 15


def test_a_reference_without_a_result_is_no_reference_line(tmp_path):
    effects = {"mean": 0.0, "GNN": 0.1, "gate": 0.1}
    folder = made_study(tmp_path / "study", effects, seeds=2, failed={"mean": "oom"})
    comparison = compare(load_study(folder).groups[0], "mean")
    plots = {plot.name: plot for plot in study_plots("study", comparison)}
    words = [tick.get_text() for tick in plots["perplexity"].figure.axes[-1].get_yticklabels()]
    assert words == ["no seed in common", "no seed in common", "reference"]
    assert [axes.get_title(loc="left") for axes in plots["loss_curves"].figure.axes[:2]] == [
        "Training loss, smoothed", "Validation loss"]  # fmt: skip


def test_no_two_looks_are_the_same_in_grey():
    labels = [f"coupler {number}" for number in range(MAX_LOOKS)]
    found = looks(labels, labels[3], ranked=labels)
    assert found[labels[3]].colour == "black"
    assert len({(look.colour, look.line) for look in found.values()}) == MAX_LOOKS
    assert len({look.marker for look in found.values()}) == MAX_LOOKS
    many = [*labels, "one more"]
    kept = looks(many, "one more", ranked=many[::-1])
    assert set(kept) == {"one more", *labels[-7:]}


def test_short_names_are_never_the_same():
    long = ["x" * 80 + f"{number}" + "y" * 80 for number in range(3)]
    names = short_names([*long, "🎉", "漢", "mean"])
    assert len(set(names.values())) == 6
    assert names["mean"] == "mean"
    assert all(len(name) <= 48 for name in names.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_one_run_has_no_interval_and_no_band(tmp_path, monkeypatch):
    plots = plots_of(made_study(tmp_path / "study", {"HGNN": 0.0}, seeds=1))
    assert set(plots) == {"loss_curves", "perplexity", "pareto", "training"}, "nothing to compare with"
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
        drawn = [one for axes in plot.figure.axes for one in axes.collections]
        assert not any(isinstance(one, LineCollection) and one.get_segments() for one in drawn)
    assert [
        axes for axes in plots["loss_curves"].figure.axes if "Difference" in axes.get_title(loc="left")
    ] == []
    deviation = plots["loss_curves"].columns.index("train_loss_smoothed_standard_deviation_nats")
    assert {row[deviation] for row in plots["loss_curves"].rows} == {None}
    seeds = plots_of(made_study(tmp_path / "one_seed", {"mean": 0.0, "GNN": 0.1}, seeds=1))
    words = texts_of(seeds["perplexity"].figure)
    assert "not resolved (one seed decides nothing)" in words


def test_what_was_not_measured_is_left_out(tmp_path):
    bare = plots_of(made_study(tmp_path / "bare", seeds=2, history=0, unmeasured=("speed", "memory")))
    assert set(bare) == {"perplexity", "pareto"}
    assert [axes.get_title(loc="left") for axes in bare["pareto"].figure.axes] == ["against parameters"]
    assert "experts" not in bare, "their number does not vary"
    without = plots_of(made_study(tmp_path / "without", {"GNN": 0.0, "gate": 0.1}, seeds=2))
    assert "coupler_cost" not in without, "there is no mean coupler"
    failed = made_study(tmp_path / "failed", {"mean": 0.0, "GNN": 0.0}, seeds=2,
                        failed={"mean": "oom", "GNN": "crashed"})  # fmt: skip
    assert plots_of(failed) == {}
    folder = made_study(tmp_path / "half", {"mean": 0.0, "GNN": 0.1}, seeds=2, history=8)
    for file in folder.glob("*/history.jsonl"):
        lines = [line for line in file.read_text().splitlines() if '"train"' in line]
        file.write_text("\n".join(lines))
    half = plots_of(folder)
    assert [axes.get_title(loc="left") for axes in half["loss_curves"].figure.axes[:-1]] == [
        "Training loss, smoothed"
    ]
    assert "no evaluation was recorded" in texts_of(half["training"].figure)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_numbers_beyond_all_scales_are_drawn_and_said(tmp_path, monkeypatch):
    effects = {"mean": 0.0, "a": -0.03, "b": 0.02, "c": 790.0}
    folder = made_study(tmp_path / "study", effects, seeds=2, history=12)
    for file in sorted(folder.glob("*/history.jsonl"))[:3]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[2]["loss"], rows[3]["gradient_norm"] = math.nan, math.inf
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots = plots_of(folder)
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
    assert len(plots["training"].files()) == len(plots["perplexity"].files()) == 3
    assert {"inf →", "790 →"} <= set(texts_of(plots["perplexity"].figure))
    assert "1 line above ↑" in texts_of(plots["loss_curves"].figure)
    assert any("perplexity above 1,000,000,000: c." in text for text in texts_of(plots["pareto"].figure))
    assert plots["loss_curves"].figure.axes[0].get_ylim()[1] < 10
    assert math.inf in {row[3] for row in plots["perplexity"].rows}


def test_smoothing_passes_over_what_is_no_number():
    values = [8.0, 4.0, math.nan, 2.0, math.inf, 1.0]
    curve = Curve((0,), np.arange(6), np.array([values])).smoothed()
    finite = smooth([8.0, 4.0], span=2)
    assert curve.values_ST[0, :2] == pytest.approx(finite)
    assert np.isnan(curve.values_ST[0, [2, 4]]).all()
    assert np.isfinite(curve.values_ST[0, [3, 5]]).all()


def test_long_histories_are_thinned_to_what_a_picture_can_show():
    curve = Curve((0, 1), np.arange(1, 10_001), np.ones((2, 10_000)))
    thin = curve.thinned()
    assert thin.values_ST.shape == (2, 400)
    assert (thin.steps_T[0], thin.steps_T[-1]) == (1, 10_000)
    assert np.ptp(np.diff(thin.steps_T)) <= 1


def test_seeds_are_compared_at_steps_that_all_have(tmp_path):
    folder = made_study(tmp_path / "study", {"mean": 0.0}, seeds=3, history=12)
    file = min(folder.glob("*/history.jsonl"))
    rows = [line for line in file.read_text().splitlines() if json.loads(line)["step"] > 5]
    file.write_text("\n".join(rows))
    frame = Frame("study", compare(load_study(folder).groups[0]))
    assert frame.training_losses["mean"].steps_T.tolist() == list(range(6, 13))
    assert frame.validation_losses["mean"].steps_T.tolist() == [8, 12]


def test_ranges_show_most_and_cut_what_lies_far_off():
    assert usual_reach([0.1, 0.2, 0.3, 790.0], gap=10) == 0.3
    assert usual_reach([0.1, 0.2, 0.3, 1.0], gap=10) == 1.0
    assert usual_reach([0.1, 790.0], gap=10) == 0.1
    assert usual_reach([0.0, 0.0], gap=10, least=0.5) == 0.5
    low, high = value_range([100.0, 101.0, 102.0], [(0.0, 200.0), None, None])
    assert 95 < low < 100 < 102 < high < 107, "an interval far wider than the means is cut"
    low, high = value_range([500.0], [None])
    assert (low, high) == (495, 505), "one value gets a scale of whole percents"
    flat = Curve((0,), np.arange(4), np.full((1, 4), 5.0))
    wild = Curve((0,), np.arange(4), np.full((1, 4), 1e9))
    low, high = curves_range([flat, flat, wild])
    assert low < 5 < high < 6


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes(tmp_path, monkeypatch):
    folder = made_study(tmp_path / "study", {"mean": 0.0, "GNN": 0.1}, seeds=2, arrays=False)
    first = plots_of(folder)["pareto"].files()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)  # a user's own settings
    assert plots_of(folder)["pareto"].files() == first
    assert ET.fromstring(first["pareto.svg"]).tag.endswith("svg")
    assert np.ptp(imread(io.BytesIO(first["pareto.png"]))[..., :3]) > 0.5
    assert b"<dc:date>" not in first["pareto.svg"]
