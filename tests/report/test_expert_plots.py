"""The pictures of what the experts learned: their numbers against the records, and their looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.report.comparison import compare
from bench.report.plots.experts import ablation_plot, effective_rank_plot, similarity_plot
from bench.report.plots.frame import Frame
from bench.report.plots.study import study_plots
from bench.report.plots.style import COUPLERS, Plot, plot_style
from bench.study.runs import load_study
from tests.report._layout import check_layout, texts_of
from tests.report._made_experts import add_experts
from tests.report._made_studies import made_study

NAMES = ["expert_similarity", "expert_ablation", "effective_rank"]
COUPLED = {"mean": 0.0, "gate": -0.03, "HGNN all_pairs": 0.02}
MANY = {
    "mean": 0.0, "HGNN all_pairs": -0.03, "gate": -0.05, "GNN": 0.03, "topk": 0.01, "HGNN all_triplets": 0.04,
    "attention": 0.05, "mean_linear": 0.1, "static": 0.02,
}  # fmt: skip


def plots_of(study: Path) -> dict[str, Plot]:
    frame = Frame(study.name, compare(load_study(study).groups[0]))
    with plot_style():
        found = [draw(frame) for draw in (similarity_plot, ablation_plot, effective_rank_plot)]
    return {plot.name: plot for plot in found if plot is not None}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "study"
    return add_experts(made_study(path, COUPLED, seeds=3, failed={("gate", 2): "oom"}))


@pytest.fixture(scope="module")
def plots(study) -> dict[str, Plot]:
    return plots_of(study)


def layers_of(study: Path, coupler: str, number: int) -> list[dict[str, Any]]:
    """Return the diagnostics of a layer of the runs of a coupler that ended well."""
    records = [json.loads(path.read_text()) for path in sorted(study.glob("*/record.json"))]
    return [
        record["diagnostics"]["layers"][number] for record in records
        if record["status"] == "ok" and record["config"]["model"]["coupler_type"] == coupler
    ]  # fmt: skip


def rows_of(plot: Plot, label: str, layer: int) -> list[dict[str, Any]]:
    rows = [dict(zip(plot.columns, row, strict=True)) for row in plot.rows]
    return [row for row in rows if (row["configuration"], row["layer"]) == (label, layer)]


def test_the_pictures_are_in_the_report_in_order(study):
    names = [plot.name for plot in study_plots("study", compare(load_study(study).groups[0]))]
    assert names[-3:] == NAMES


def test_similarity_is_the_mean_over_seeds_of_sorted_experts(study, plots):
    plot = plots["expert_similarity"]
    for coupler in ("mean", "gate", "HGNN"):
        expected = np.zeros((4, 4))
        found = layers_of(study, coupler, 1)
        for layer in found:
            cosine = np.array(layer["cosine"])
            order = sorted(range(4), key=lambda expert, cosine=cosine: -cosine[expert].sum())
            expected += cosine[order][:, order] / len(found)
        rows = rows_of(plot, coupler, 1)
        assert len(rows) == 6
        for row in rows:
            assert row["cosine"] == pytest.approx(expected[row["expert"] - 1, row["other_expert"] - 1])
            assert row["seeds"] == len(found)
    title = plot.figure.texts[0].get_text()
    assert title.startswith("How alike are the experts? Mean cosine ")
    values = np.asarray(plot.figure.axes[0].images[0].get_array())
    first = rows_of(plot, "gate", 0)[0]  # the best configuration; experts 2 and 1
    assert values[1, 0] == pytest.approx(first["cosine"])
    assert values[0, 1] == pytest.approx(first["cka"])


def test_ablation_has_the_sorted_rises_with_intervals_over_seeds(study, plots):
    rises = np.sort([layer["ablation_nats"] for layer in layers_of(study, "HGNN", 0)], axis=1)
    rows = rows_of(plots["expert_ablation"], "HGNN", 0)
    assert [row["expert_sorted"] for row in rows] == [1, 2, 3, 4]
    for row, of_seeds in zip(rows, rises.T, strict=True):
        low, high = stats.t.interval(0.95, 2, of_seeds.mean(), stats.sem(of_seeds))
        assert row["rise_nats"] == pytest.approx(of_seeds.mean())
        assert (row["rise_low_95_nats"], row["rise_high_95_nats"]) == pytest.approx((low, high))
    panel = plots["expert_ablation"].figure.axes[0]
    lines = {line.get_color(): line.get_ydata() for line in panel.lines if len(line.get_xdata()) == 4}
    assert lines[COUPLERS["HGNN"][0]] == pytest.approx(rises.mean(0))


def test_one_seed_has_the_intervals_of_the_tokens(tmp_path):
    study = add_experts(made_study(tmp_path / "one", COUPLED, seeds=1))
    plots = plots_of(study)
    (layer,) = layers_of(study, "mean", 1)
    rows = rows_of(plots["expert_ablation"], "mean", 1)
    assert rows[0]["rise_low_95_nats"] == pytest.approx(min(layer["ablation_nats"]) - 1.96 * 4e-4)
    assert any("95% intervals over tokens" in text for text in texts_of(plots["expert_ablation"].figure))
    assert not any("Bands" in text for text in texts_of(plots["effective_rank"].figure))


def test_effective_rank_is_the_mean_over_layers_and_seeds_by_step(study, plots):
    ends = [layers_of(study, "mean", number) for number in range(2)]
    expected = np.mean([layer["effective_rank"] for some in ends for layer in some])
    rows = [row for row in plots["effective_rank"].rows if row[0] == "mean"]
    assert [row[1] for row in rows] == [0, 4, 8, 12]
    assert rows[0][3] == pytest.approx(3.6)
    assert rows[-1][3] == pytest.approx(expected)
    assert "E = 4" in texts_of(plots["effective_rank"].figure)


def test_without_diagnostics_or_a_difference_nothing_is_drawn(tmp_path):
    study = made_study(tmp_path / "old", COUPLED, seeds=2)
    assert plots_of(study) == {}
    for path in add_experts(study).glob("*/record.json"):
        record = json.loads(path.read_text())
        for layer in record["diagnostics"]["layers"]:
            layer |= {"ablation_nats": [0.0] * 4, "cosine": [[0.5] * 4] * 4, "cka": [[0.5] * 4] * 4}
        path.write_text(json.dumps(record))
        (path.parent / "communication.npz").unlink()
    assert plots_of(study) == {}


@pytest.mark.parametrize(
    ("couplers", "seeds", "experts", "layers"),
    [
        (COUPLED, 2, 4, 2),
        pytest.param(MANY, 8, 4, 2, marks=pytest.mark.slow),
        pytest.param(MANY, 1, 16, 6, marks=pytest.mark.slow),
        pytest.param({"x" * 90: 0.0, "mean": 0.1}, 2, 4, 3, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_clipped_or_overlaps(couplers, seeds, experts, layers, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.report._made_experts.LAYERS", layers)
    study = add_experts(made_study(tmp_path / "study", couplers, seeds=seeds, experts=(experts,)))
    plots = plots_of(study)
    assert list(plots) == NAMES
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
