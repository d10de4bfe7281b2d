"""What a study's hypergraphs learned: the readings equal the records, and the plots equal the readings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.report.comparison import Comparison, compare
from bench.report.plots.style import Plot
from bench.report.plots.weights import weights_plots
from bench.report.statistics import agreement
from bench.report.weights import BY_NAME, read_mixing, read_weights
from bench.study.runs import load_study
from tests.report._made_studies import made_study
from tests.report.test_run_plot_looks import overlaps

LEARNED = {"mean": 0.0, "HGNN all_pairs": -0.05}


def comparison(study: Path) -> Comparison:
    return compare(load_study(study).groups[0])


def sentences(study: Path) -> list[str]:
    return [reading.sentence() for reading in read_weights(comparison(study))]


def folders(study: Path, coupler: str = "HGNN") -> list[Path]:
    """Return the run folders of a coupler, by seed."""
    found = {}
    for path in study.glob("*/record.json"):
        record = json.loads(path.read_text())
        if record["config"]["model"]["coupler_type"] == coupler:
            found[record["seed"]] = path.parent
    return [found[seed] for seed in sorted(found)]


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the record says of each layer's hyperedge weights."""
    record = json.loads((folder / "record.json").read_text())
    for parts in record["communication"].values():
        parts["hyperedge_weights"] = change(parts["hyperedge_weights"])
    (folder / "record.json").write_text(json.dumps(record))


def change_trace(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> None:
    with np.load(folder / "communication.npz") as arrays:
        found = dict(arrays)
    np.savez(folder / "communication.npz", **change(found))


def table(plot: Plot) -> list[dict[str, Any]]:
    return [dict(zip(plot.columns, row, strict=True)) for row in plot.rows]


def texts(plot: Plot) -> str:
    axes = plot.figure.axes
    panels = [title for one in axes for title in (one.get_title(loc="left"), one.get_ylabel())]
    return "\n".join([text.get_text() for text in plot.figure.texts] + panels)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three seeds of two hypergraphs, a top-k router and a mean; one run without memory."""
    couplers = {"mean": 0.0, "HGNN all_pairs": -0.05, "HGNN all_triplets": -0.02, "topk": 0.02}
    failed = {("HGNN all_triplets", 1): "oom"}
    return made_study(tmp_path_factory.mktemp("weights") / "made", couplers, seeds=3, failed=failed)


@pytest.fixture(scope="module")
def plots(made) -> dict[str, Plot]:
    return {plot.name: plot for plot in weights_plots("made", comparison(made))}


def test_the_readings_are_the_records(made):
    readings = read_weights(comparison(made))
    assert [(r.configuration.label, r.layer, r.seeds) for r in readings] == [
        ("HGNN · all_pairs", 0, (0, 1, 2)), ("HGNN · all_pairs", 1, (0, 1, 2)),
        ("HGNN · all_triplets", 0, (0, 2)), ("HGNN · all_triplets", 1, (0, 2)),
    ]  # fmt: skip
    assert readings[0].members == ("{0,1}", "{0,2}", "{0,3}", "{1,2}", "{1,3}", "{2,3}")
    assert readings[2].members == ("{0,1,2}", "{0,1,3}", "{0,2,3}", "{1,2,3}")
    for reading in readings:
        for place, seed in enumerate(reading.seeds):
            run = reading.configuration.counted[seed]
            recorded = run.record.model_dump()["communication"][f"layer_{reading.layer}"]["hyperedge_weights"]
            assert dict(zip(reading.members, reading.weights_SM[place], strict=True)) == recorded
            trace = np.load(run.folder / "communication.npz")
            assert reading.trajectories is not None
            assert np.array_equal(reading.trajectories.steps_T, trace["step"])
            expected = trace[f"layer_{reading.layer}.hyperedge_weights"]
            assert np.array_equal(reading.trajectories.weights_TSM[:, place], expected)
        assert reading.from_one
        assert reading.range == (reading.weights_SM.min(), reading.weights_SM.max())
        assert reading.mean_M == pytest.approx(np.mean(reading.weights_SM, axis=0))


def test_agreement_by_hand_and_its_sentence(tmp_path):
    """Of three pairs of hyperedges two are in the same order in both seeds: τ = (2 − 1) / 3."""
    study = made_study(tmp_path / "study", LEARNED, seeds=2, experts=(3,))
    for folder, weights in zip(folders(study), ((0.93, 1.0, 1.08), (0.95, 1.05, 1.01)), strict=True):
        change_weights(folder, lambda found, weights=weights: dict(zip(found, weights, strict=True)))
    reading = read_weights(comparison(study))[0]
    assert reading.agreement is not None
    assert reading.agreement.tau == pytest.approx(1 / 3)
    words = reading.agreement.words()
    assert "2 seeds may agree on the order (mean Kendall τ 0.33" in words
    assert reading.sentence() == (
        f"HGNN, layer 0: weights between 0.93 and 1.08 (all 1 at the start); {words}."
    )


def test_what_seeds_share_is_told_from_what_they_do_not(tmp_path):
    """In made studies the weights of layer 0 are common to all seeds, those of layer 1 are not."""
    study = made_study(tmp_path / "study", {"HGNN all_triplets": 0.0}, seeds=8)
    first, second = read_weights(comparison(study))
    assert first.agreement == agreement(first.weights_SM)
    assert first.agreement is not None
    assert first.agreement.reproducible
    assert second.agreement is not None
    assert not second.agreement.reproducible
    assert "; 8 seeds do not agree on the order (mean Kendall τ" in second.sentence()
    by_name = {plot.name: plot for plot in weights_plots("study", comparison(study))}
    for name in ("hyperedge_weights_1", "hyperedge_weights_over_steps_1"):
        panels = by_name[name].figure.axes
        assert panels[0].get_title(loc="left") == f"layer 0\n{first.agreement.words()}"
        assert panels[1].get_title(loc="left").startswith("layer 1\n8 seeds do not agree on the order")
        assert BY_NAME in texts(by_name[name]).replace("\n", " ")


def test_weights_that_never_moved_are_no_reading(tmp_path):
    """Not learnable (all 1), and drawn at random but left there, with and without the file of samples."""
    study = made_study(tmp_path / "study", LEARNED, seeds=2)
    for folder in folders(study):
        change_weights(folder, lambda found: dict.fromkeys(found, 1.0))
        change_trace(
            folder, lambda found: {**found, **{k: v * 0 + 1 for k, v in found.items() if "hyper" in k}}
        )
    assert sentences(study) == []
    assert [plot.name for plot in weights_plots("study", comparison(study))] == ["mixing"]
    raw = np.array([0.25, -1.5, 2.0, 0.5, 0.0, 1.0])
    for folder in folders(study):
        change_weights(folder, lambda found: dict(zip(found, raw, strict=True)))
        change_trace(
            folder, lambda found: {**found, **{k: v * 0 + raw for k, v in found.items() if "hyper" in k}}
        )
    assert sentences(study) == []
    change_weights(folders(study)[1], lambda found: {**found, "{0,3}": 2.1})
    assert sentences(study)[0].startswith("HGNN, layer 0: weights between −1.50 and 2.10; 2 seeds")


def test_runs_with_other_steps_and_without_a_file(tmp_path):
    study = made_study(tmp_path / "study", LEARNED, seeds=3, history=12, eval_every=4)
    one, two, three = folders(study)
    change_trace(one, lambda found: {name: values[[0, 1, 3]] for name, values in found.items()})  # not step 8
    (two / "communication.npz").unlink()
    reading = read_weights(comparison(study))[0]
    assert (reading.seeds, reading.weights_SM.shape) == ((0, 1, 2), (3, 6)), "the weights need no samples"
    found = reading.trajectories
    assert found is not None
    assert (found.seeds, found.steps_T.tolist()) == ((0, 2), [0, 4, 12])
    expected = np.load(three / "communication.npz")["layer_0.hyperedge_weights"][[0, 1, 3]]
    assert np.array_equal(found.weights_TSM[:, 1], expected)
    change_trace(one, lambda found: {name: values[[0]] for name, values in found.items()})
    reading = read_weights(comparison(study))[0]
    assert reading.trajectories is None
    names = [plot.name for plot in weights_plots("study", comparison(study))]
    assert names == ["hyperedge_weights_1", "mixing"]
    for folder in (one, three):
        (folder / "communication.npz").unlink()
    assert " (all 1 at the start)" not in sentences(study)[0], "nobody knows"
    assert len(sentences(study)) == 2


def test_one_seed_and_one_hyperedge_have_nothing_to_agree_on(tmp_path):
    one = made_study(tmp_path / "one", LEARNED, seeds=1)
    assert sentences(one)[0].endswith("(all 1 at the start); one seed, so nothing to compare.")
    plots = {plot.name: plot for plot in weights_plots("one", comparison(one))}
    assert "one seed, so nothing to compare" in texts(plots["hyperedge_weights_1"])
    assert {row["standard_deviation"] for row in table(plots["mixing"])} == {""}
    single = made_study(tmp_path / "single", {"HGNN all_global": 0.0}, seeds=3)
    reading = read_weights(comparison(single))[0]
    assert (reading.members, reading.agreement) == (("{0,1,2,3}",), None)
    assert "; one hyperedge, so no order to compare." in reading.sentence()


def test_nothing_that_counts_gives_nothing(tmp_path):
    study = made_study(
        tmp_path / "study", LEARNED, seeds=2, failed={"mean": "oom", "HGNN all_pairs": "crashed"}
    )
    assert sentences(study) == []
    assert read_mixing(comparison(study)) == []
    assert weights_plots("study", comparison(study)) == []
    silent = made_study(tmp_path / "silent", LEARNED, seeds=2, unmeasured=("communication",))
    assert weights_plots("silent", comparison(silent)) == []


def test_a_run_with_other_hyperedges_is_left_out(tmp_path):
    """The code may have changed between seeds: values of other names are never mixed."""
    study = made_study(tmp_path / "study", LEARNED, seeds=3)
    change_weights(folders(study)[1], lambda found: dict(zip(reversed(found), found.values(), strict=True)))
    assert [reading.seeds for reading in read_weights(comparison(study))] == [(0, 2), (0, 2)]


def test_shares_are_the_records_with_their_deviation(made, plots):
    readings = {reading.configuration.label: reading for reading in read_mixing(comparison(made))}
    assert set(readings) == {"mean", "HGNN · all_pairs", "HGNN · all_triplets", "topk"}
    assert readings["HGNN · all_triplets"].seeds == (0, 2)
    assert readings["mean"].ratio_LE == pytest.approx(np.ones((2, 4)), abs=1e-12)
    by_label = {one.label: one for one in comparison(made).group.configurations}
    rows = table(plots["mixing"])
    assert len(rows) == 4 * 2 * 4
    for row in rows:
        runs = by_label[row["configuration"]].counted.values()
        shares = [
            run.record.model_dump()["communication"][f"layer_{row['layer']}"]["mixing"][str(row["expert"])]
            for run in runs
        ]
        assert row["share"] == pytest.approx(np.mean(shares), abs=1e-12)
        assert row["standard_deviation"] == pytest.approx(np.std(shares, ddof=1), abs=1e-12)
        assert row["seeds"] == len(shares)


def test_the_heat_maps_say_the_shares_and_have_one_over_e_in_the_middle(made, plots):
    readings, figure = read_mixing(comparison(made)), plots["mixing"].figure
    for reading, axes in zip(readings, figure.axes, strict=False):
        (image,) = axes.images
        assert image.norm(1.0) == pytest.approx(0.5)
        shown = np.array([float(text.get_text()) for text in axes.texts]).reshape(reading.mean_LE.shape)
        assert shown == pytest.approx(reading.mean_LE, abs=6e-4)
        assert np.asarray(image.get_array()) == pytest.approx(reading.ratio_LE)


def test_the_tables_are_the_readings(made, plots):
    readings = read_weights(comparison(made))
    assert list(plots) == ["hyperedge_weights_1", "hyperedge_weights_over_steps_1", "hyperedge_weights_2",
                           "hyperedge_weights_over_steps_2", "mixing"]  # fmt: skip
    bars, steps = plots["hyperedge_weights_2"], plots["hyperedge_weights_over_steps_2"]
    assert "seed_1" not in bars.columns, "it ran out of memory"
    expected = []
    for one in readings[2:]:
        values = zip(one.members, one.mean_M, *one.weights_SM, strict=True)
        expected += [(one.configuration.label, one.layer, *row) for row in values]
    assert bars.rows == expected
    assert len(steps.rows) == 2 * 2 * 4 * 4  # layers, seeds, steps, hyperedges
    for row in table(steps):
        reading = readings[2 + row["layer"]]
        assert reading.trajectories is not None
        place = (reading.trajectories.steps_T.tolist().index(row["step"]), reading.seeds.index(row["seed"]),
                 reading.members.index(row["hyperedge"]))  # fmt: skip
        assert row["weight"] == reading.trajectories.weights_TSM[place]


def test_bars_end_at_the_means_and_dots_lie_at_the_seeds(made, plots):
    reading = read_weights(comparison(made))[0]
    axes = plots["hyperedge_weights_1"].figure.axes[0]
    ends = [bar.get_y() + bar.get_height() for bar in axes.patches]  # pyright: ignore
    assert ends == pytest.approx(reading.mean_M)
    dots = np.asarray(axes.lines[-1].get_ydata(), dtype=float)
    assert np.array_equal(dots.reshape(3, 6), reading.weights_SM)
    low, high = axes.get_ylim()
    assert low < reading.weights_SM.min() <= reading.weights_SM.max() < high


def test_of_many_configurations_the_best_are_drawn_and_the_figures_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.plots.weights.MOST_FIGURES", 1)
    monkeypatch.setattr("bench.report.plots.weights.MOST_MAPS", 2)
    couplers = {"HGNN a": 0.3, "HGNN b": 0.0, "HGNN c": 0.2}
    settings = {key: {"learning_rate": 0.001 * (2 + place), "static_hyperedge_strategy": "all_pairs"}
                for place, key in enumerate(couplers)}  # fmt: skip
    study = made_study(tmp_path / "study", couplers, seeds=2, settings=settings)
    plots = {plot.name: plot for plot in weights_plots("study", comparison(study))}
    assert list(plots) == ["hyperedge_weights_1", "hyperedge_weights_over_steps_1", "mixing"]
    assert {row["configuration"] for row in table(plots["hyperedge_weights_1"])} == {
        "HGNN · learning_rate 0.003"
    }
    said = texts(plots["hyperedge_weights_1"]).replace("\n", " ")
    assert "Drawn: the 1 best of 3 configurations with learned weights." in said
    assert "2 of 3 configurations" in texts(plots["mixing"]).replace("\n", " ")
    assert len({row["configuration"] for row in table(plots["mixing"])}) == 3, "the table has all"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_hundred_hyperedges_and_any_name_can_be_drawn(tmp_path, monkeypatch):
    name = "/a path/<b>$\\frac$ 漢 " + "very_long_" * 20 + "file.py:Class"
    monkeypatch.setattr("bench.report.plots.weights.SEED_LINES", 200)
    couplers = {"HGNN all_pairs": -0.05, "other": 0.0}
    study = made_study(tmp_path / "study", couplers, seeds=2, experts=(16,), names={"other": name},
                       run_name=name, embedded=True)  # fmt: skip
    found = comparison(study)
    assert [len(reading.members) for reading in read_weights(found)] == [120, 120]
    for plot in weights_plots("study", found):
        assert overlaps(plot.figure, monkeypatch) == [], plot.name
        widths = [text.get_window_extent().x1 for text in plot.figure.texts]
        assert max(widths) <= plot.figure.bbox.x1, plot.name
        assert "NOT WIKITEXT-2" in texts(plot)
