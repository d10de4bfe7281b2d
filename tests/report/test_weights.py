"""What a study's hypergraphs learned: the readings equal the records, and the plots equal the readings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.report.comparison import Comparison, compare
from bench.report.plots.frame import Frame
from bench.report.plots.style import Plot, plot_style
from bench.report.plots.weights import mixing_plot, weights_plot
from bench.report.statistics import agreement
from bench.report.weights import read_mixing, read_weights
from bench.study.runs import load_study
from tests.report._layout import check_layout, texts_of
from tests.report._made_studies import made_study

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


def plots_of(study: Path) -> dict[str, Plot]:
    """Return the plots of weights and shares, by name."""
    frame = Frame(study.name, comparison(study))
    with plot_style():
        return {plot.name: plot for draw in (weights_plot, mixing_plot) if (plot := draw(frame))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three seeds of two hypergraphs, a top-k router and a mean; one run without memory."""
    couplers = {"mean": 0.0, "HGNN all_pairs": -0.05, "HGNN all_triplets": -0.02, "topk": 0.02}
    failed = {("HGNN all_triplets", 1): "oom"}
    return made_study(tmp_path_factory.mktemp("weights") / "made", couplers, seeds=3, failed=failed)


@pytest.fixture(scope="module")
def plots(made) -> dict[str, Plot]:
    return plots_of(made)


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
        assert reading.from_one
        assert reading.range == (reading.weights_SM.min(), reading.weights_SM.max())


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
    figure = plots_of(study)["hyperedge_weights"].figure
    assert figure.texts[0].get_text() == "The seeds agree on which hyperedges matter in 1 of 2 layers"
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles[0].startswith("HGNN, layer 0\nτ +")
    assert titles[1].startswith("HGNN, layer 1\nτ ")


def test_weights_that_never_moved_are_no_reading(tmp_path):
    """Not learnable (all 1), and drawn at random but left there, with and without the file of samples."""
    study = made_study(tmp_path / "study", LEARNED, seeds=2)
    for folder in folders(study):
        change_weights(folder, lambda found: dict.fromkeys(found, 1.0))
        change_trace(
            folder, lambda found: {**found, **{k: v * 0 + 1 for k, v in found.items() if "hyper" in k}}
        )
    assert sentences(study) == []
    assert list(plots_of(study)) == ["mixing"]
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
    assert reading.from_one
    for folder in (one, three):
        (folder / "communication.npz").unlink()
    assert " (all 1 at the start)" not in sentences(study)[0], "nobody knows"
    assert len(sentences(study)) == 2


def test_one_seed_and_one_hyperedge_have_nothing_to_agree_on(tmp_path):
    one = made_study(tmp_path / "one", LEARNED, seeds=1)
    assert sentences(one)[0].endswith("(all 1 at the start); one seed, so nothing to compare.")
    figure = plots_of(one)["hyperedge_weights"].figure
    assert figure.texts[0].get_text() == "Hyperedge weights after training"
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
    assert plots_of(study) == {}
    silent = made_study(tmp_path / "silent", LEARNED, seeds=2, unmeasured=("communication",))
    assert plots_of(silent) == {}


def test_a_run_with_other_hyperedges_is_left_out(tmp_path):
    """The code may have changed between seeds: values of other names are never mixed."""
    study = made_study(tmp_path / "study", LEARNED, seeds=3)
    change_weights(folders(study)[1], lambda found: dict(zip(reversed(found), found.values(), strict=True)))
    assert [reading.seeds for reading in read_weights(comparison(study))] == [(0, 2), (0, 2)]


def test_shares_are_the_records_and_equal_shares_are_not_drawn(made, plots):
    readings = {reading.configuration.label: reading for reading in read_mixing(comparison(made))}
    assert set(readings) == {"mean", "HGNN · all_pairs", "HGNN · all_triplets", "topk"}
    assert readings["HGNN · all_triplets"].seeds == (0, 2)
    assert readings["mean"].shares_SLE == pytest.approx(np.full((3, 2, 4), 0.25), abs=1e-12)
    by_label = {one.label: one for one in comparison(made).group.configurations}
    rows = table(plots["mixing"])
    assert "topk" in {row["configuration"] for row in rows}
    assert not {"mean"} & {row["configuration"] for row in rows}
    for row in rows:
        run = by_label[row["configuration"]].counted[row["seed"]]
        shares = run.record.model_dump()["communication"][f"layer_{row['layer']}"]["mixing"]
        assert row["share × E"] == pytest.approx(4 * shares[row["expert"]], abs=1e-12)


def test_the_maps_are_the_weights_by_seed_with_one_in_the_middle(made, plots):
    readings, plot = read_weights(comparison(made)), plots["hyperedge_weights"]
    for reading, axes in zip(readings, plot.figure.axes, strict=False):
        (image,) = axes.images
        assert image.norm(1.0) == pytest.approx(0.5)
        assert np.array_equal(np.asarray(image.get_array()), reading.weights_SM)
        shown = np.array([float(text.get_text()) for text in axes.texts]).reshape(reading.weights_SM.shape)
        assert shown == pytest.approx(reading.weights_SM, abs=6e-3)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == list(reading.members)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [str(seed) for seed in reading.seeds]
    expected = [
        [one.configuration.label, one.layer, seed, member, one.weights_SM[y, x]]
        for one in readings
        for y, seed in enumerate(one.seeds)
        for x, member in enumerate(one.members)
    ]
    assert plot.rows == expected


def test_of_many_maps_the_best_are_drawn_and_the_figure_says_so(made, monkeypatch):
    monkeypatch.setattr("bench.report.plots.maps.MOST_MAPS", 2)
    plot = plots_of(made)["hyperedge_weights"]
    assert "Drawn: 2 of 4 maps, the best configurations." in " ".join(texts_of(plot.figure))
    assert len({tuple(row[:2]) for row in plot.rows}) == 4, "the table has all"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_hundred_hyperedges_and_any_name_can_be_drawn(tmp_path, monkeypatch):
    name = "/a path/<b>$\\frac$ 漢 " + "very_long_" * 20 + "file.py:Class"
    couplers = {"HGNN all_pairs": -0.05, "other": 0.0}
    study = made_study(tmp_path / "study", couplers, seeds=2, experts=(16,), names={"other": name},
                       run_name=name, embedded=True)  # fmt: skip
    found = comparison(study)
    assert [len(reading.members) for reading in read_weights(found)] == [120, 120]
    for plot in plots_of(study).values():
        check_layout(plot.figure, monkeypatch)
        assert any("NOT WIKITEXT-2" in text for text in texts_of(plot.figure))
