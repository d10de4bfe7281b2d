"""The numbers that the plots of a study draw and list, against the same from its files by hand."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.figure import Figure
from scipy import stats

from bench.report.comparison import Comparison, compare
from bench.report.plots.cost import Point, front, lines_of
from bench.report.plots.frame import Frame
from bench.report.plots.run import smooth
from bench.report.plots.study import NAMES, study_plots
from bench.report.plots.style import Plot
from bench.study.runs import load_study
from tests.report._made_studies import made_study

EFFECTS = {"mean": 0.0, "GNN": 0.06, "HGNN all_pairs": -0.05, "topk": 0.0}
SEEDS, STEPS = 8, 24
LOST = {("GNN", 8): "oom", ("HGNN all_pairs", 4, 2): "crashed"}
Rows = dict[str, list[dict[str, Any]]]


def drawn(folder: Path) -> tuple[Comparison, dict[str, Plot]]:
    comparison = compare(load_study(folder).groups[0])
    return comparison, {plot.name: plot for plot in study_plots(folder.name, comparison)}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Comparison, dict[str, Plot]]:
    """Four couplers at four and eight experts; one of them runs out of memory at eight."""
    failed = {(key, 8, seed): status for (key, *_), status in LOST.items() for seed in range(SEEDS)
              if status == "oom"}  # fmt: skip
    failed |= {key: status for key, status in LOST.items() if status != "oom"}
    path = tmp_path_factory.mktemp("plots") / "study"
    made_study(path, EFFECTS, seeds=SEEDS, experts=(4, 8), history=STEPS, failed=failed, eval_every=6)
    return path, *drawn(path)


@pytest.fixture(scope="module")
def records(study) -> Rows:
    """The records of the runs that ended well, by label, each with its history."""
    found: Rows = defaultdict(list)
    for one in study[1].group.configurations:
        for run in one.runs:
            record = json.loads((run.folder / "record.json").read_text())
            lines = (run.folder / "history.jsonl").read_text().splitlines()
            if record["status"] == "ok":
                found[one.label].append(record | {"history": [json.loads(line) for line in lines]})
    return found


def table(plot: Plot) -> list[dict[str, Any]]:
    return [dict(zip(plot.columns, row, strict=True)) for row in plot.rows]


def interval(values: list[float]) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def loss(record: dict[str, Any]) -> float:
    return record["quality"]["validation"]["nll_sum"] / record["quality"]["validation"]["tokens"]


def offsets(axes: Axes) -> list[list[float]]:
    """Return the points of all scatters."""
    found = [np.asarray(one.get_offsets()) for one in axes.collections if isinstance(one, PathCollection)]
    return np.concatenate(found).tolist() if found else []


def segments(axes: Axes) -> list[np.ndarray]:
    """Return the intervals."""
    return [segment for one in axes.collections if isinstance(one, LineCollection)
            for segment in one.get_segments()]  # fmt: skip


def has(points: list[list[float]], x: float, y: float) -> bool:
    return any(point == pytest.approx([x, y], rel=1e-9, abs=1e-9) for point in points)


def has_segment(axes: Axes, ends: tuple[float, float], place: float, vertical: bool = False) -> bool:
    along, across = (1, 0) if vertical else (0, 1)
    return any(segment[:, along] == pytest.approx(list(ends), rel=1e-9) and
               segment[:, across] == pytest.approx([place, place], rel=1e-9, abs=1e-9)
               for segment in segments(axes))  # fmt: skip


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def test_every_figure_is_there_in_order(study):
    assert tuple(study[2]) == NAMES


def test_perplexity_is_exp_of_the_mean_loss_with_its_interval(study, records):
    axes, rows = panel(study[2]["perplexity"].figure, "Perplexity"), table(study[2]["perplexity"])
    means = [row for row in rows if row["seed"] is None and row["seeds"]]
    assert [row["loss_nats"] for row in means] == sorted(row["loss_nats"] for row in means)
    assert len(means) == 7
    for place, row in enumerate(means):
        losses = [loss(record) for record in records[row["configuration"]]]
        ends = tuple(np.exp(interval(losses)))
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(losses)))
        assert (row["perplexity_low_95"], row["perplexity_high_95"]) == pytest.approx(ends)
        assert has(offsets(axes), math.exp(np.mean(losses)), place)
        assert has_segment(axes, ends, place)
        for value in losses:
            assert has(offsets(axes), math.exp(value), place + 0.22)
    seeds = [row for row in rows if row["seed"] is not None]
    assert len(seeds) == sum(map(len, records.values()))
    for row in seeds:
        (record,) = (one for one in records[row["configuration"]] if one["seed"] == row["seed"])
        assert row["loss_nats"] == loss(record)


def test_the_forest_is_of_paired_differences_and_says_the_verdict(study, records):
    figure, comparison = study[2]["perplexity"].figure, study[1]
    axes, rows = panel(figure, "Difference"), table(study[2]["perplexity"])
    reference = {record["seed"]: loss(record) for record in records[comparison.reference.label]}
    words = [tick.get_text() for tick in figure.axes[-1].get_yticklabels()]
    for place, row in enumerate(row for row in rows if row["seed"] is None and row["status"]):
        if not row["seeds"]:
            assert (row["status"], words[place]) == ("8 oom", "not measured")
            assert f"no result: {row['status']}" in [text.get_text() for text in figure.axes[0].texts]
            continue
        if row["configuration"] == comparison.reference.label:
            assert words[place] == row["verdict"] == "reference"
            continue
        pairs = [loss(one) - reference[one["seed"]] for one in records[row["configuration"]]]
        assert row["seeds_paired"] == len(pairs) == (7 if "crashed" in row["status"] else 8)
        assert row["difference_nats"] == pytest.approx(np.mean(pairs))
        assert has(offsets(axes), float(np.mean(pairs)), place)
        assert has_segment(axes, interval(pairs), place)
        found = next(one for one in comparison.rows if one.configuration.label == row["configuration"])
        assert found.against is not None
        assert words[place] == row["verdict"] == found.against.verdict.words()
    assert {"better", "worse"} <= set(words)
    low, high = (round(float(x), 9) for x in axes.patches[0].get_extents().transformed(
        axes.transData.inverted()).intervalx)  # fmt: skip
    assert (low, high) == (-0.01, 0.01), "the band is the minimum effect"


def test_simple_models_are_lines_where_they_are_on_scale(study, records, tmp_path):
    (one,) = {
        record["quality"]["validation"]["unigram_nll_sum"] for found in records.values() for record in found
    }
    unigram = math.exp(one / records["mean · num_experts 4"][0]["quality"]["validation"]["tokens"])
    notes = [text.get_text() for text in panel(study[2]["perplexity"].figure, "Perplexity").texts]
    assert f"unigram {unigram:,.1f} →" in notes
    assert any(note.startswith("← trigram ") for note in notes)
    values = {row["configuration"]: row["perplexity"] for row in table(study[2]["perplexity"])}
    assert values["unigram (reference line)"] == pytest.approx(unigram)
    wide = made_study(tmp_path / "wide", {"mean": 0.55, "GNN": -1.0}, seeds=2, history=0)
    axes = panel(drawn(wide)[1]["perplexity"].figure, "Perplexity")
    assert f"unigram {unigram:,.1f}" in [text.get_text() for text in axes.texts]
    assert unigram in [pytest.approx(line.get_xdata()[0]) for line in axes.lines]  # pyright: ignore


def test_curves_are_means_over_seeds_and_bands_their_deviation(study, records):
    plot = study[2]["loss_curves"]
    rows = {(row["configuration"], row["step"]): row for row in table(plot)}
    training, validation = (panel(plot.figure, title) for title in ("Training", "Validation loss"))
    label = "HGNN · num_experts 4"
    train = np.array([smooth([row["loss"] for row in record["history"] if row["kind"] == "train"], span=2)
                      for record in records[label]])  # fmt: skip
    scores = np.array([[row["nll_sum"] / row["tokens"] for row in record["history"]
                        if row["kind"] == "validation"] for record in records[label]])  # fmt: skip
    assert train.shape == (7, STEPS), "the crashed run is left out"
    for step in range(1, STEPS + 1):
        row, values = rows[label, step], train[:, step - 1]
        assert row["seeds"] == 7
        assert row["train_loss_smoothed_nats"] == pytest.approx(values.mean())
        assert row["train_loss_smoothed_standard_deviation_nats"] == pytest.approx(values.std(ddof=1))
    for place, step in enumerate(range(6, STEPS + 1, 6)):
        row, values = rows[label, step], scores[:, place]
        assert row["validation_perplexity"] == pytest.approx(math.exp(values.mean()))
        assert row["validation_loss_standard_deviation_nats"] == pytest.approx(values.std(ddof=1))
    assert any(line.get_ydata() == pytest.approx(train.mean(axis=0)) for line in training.lines)
    lines = [line for line in validation.lines if line.get_ydata() == pytest.approx(scores.mean(axis=0))]
    assert len(lines) == 1
    bands = [one.get_paths()[0].vertices for one in validation.collections if isinstance(one, PolyCollection)]
    wanted = scores.mean(axis=0) + scores.std(axis=0, ddof=1)
    assert any(all(np.isclose(np.asarray(band)[:, 1], value).any() for value in wanted) for band in bands)


def test_differences_over_steps_are_paired_by_seed(study, records):
    rows = {(row["configuration"], row["step"]): row for row in table(study[2]["loss_curves"])}
    label, reference = "HGNN · num_experts 4", study[1].reference.label
    last: dict[str, dict[int, float]] = defaultdict(dict)
    for name in (label, reference):
        for record in records[name]:
            row = [row for row in record["history"] if row["kind"] == "validation"][-1]
            last[name][record["seed"]] = row["nll_sum"] / row["tokens"]
    pairs = [value - last[reference][seed] for seed, value in last[label].items()]
    row = rows[label, STEPS]
    assert row["difference_from_reference_nats"] == pytest.approx(np.mean(pairs))
    assert row["difference_from_reference_standard_deviation_nats"] == pytest.approx(np.std(pairs, ddof=1))


def test_training_is_the_mean_over_seeds(study, records):
    plot = study[2]["training"]
    rows = {(row["configuration"], row["step"]): row for row in table(plot)}
    for label, found in records.items():
        train = np.array([[(row["learning_rate"], row["gradient_norm"]) for row in record["history"]
                           if row["kind"] == "train"] for record in found])  # fmt: skip
        norms = np.mean([smooth(one, span=2) for one in train[:, :, 1].tolist()], axis=0)
        for step in (1, 10, STEPS):
            assert rows[label, step]["learning_rate"] == pytest.approx(train[:, step - 1, 0].mean())
            assert rows[label, step]["gradient_norm_smoothed"] == pytest.approx(norms[step - 1])
    titles = [axes.get_title(loc="left") for axes in plot.figure.axes]
    assert titles == ["Training loss, smoothed", "Perplexity on validation", "Learning rate",
                      "Gradient norm, smoothed"]  # fmt: skip
    evaluation = plot.figure.axes[1]
    for place, text in zip(evaluation.get_yticks(), evaluation.get_yticklabels(), strict=True):
        assert math.exp(place) == pytest.approx(float(text.get_text().replace(",", "")))


def test_pareto_draws_means_with_intervals_on_both_axes(study, records):
    plot = study[2]["pareto"]
    rows = {row["configuration"]: row for row in table(plot)}
    quantities = {
        "against memory": lambda record: record["memory"]["peak_allocated_bytes"] / 2**20,
        "against throughput": lambda record: (
            sum(record["speed"]["step_tokens"]) / sum(record["speed"]["step_seconds"])
        ),
    }
    for title, quantity in quantities.items():
        axes = panel(plot.figure, title)
        points = [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xdata()) == 1]  # pyright: ignore
        for found in records.values():
            values, losses = [quantity(record) for record in found], [loss(record) for record in found]
            x, y = float(np.mean(values)), math.exp(np.mean(losses))
            assert has(points, x, y)
            assert has_segment(axes, tuple(np.exp(interval(losses))), x, vertical=True)
            if title == "against throughput":
                assert has_segment(axes, interval(values), y)
    row = rows["topk · num_experts 4"]
    assert row["parameters"] == records["topk · num_experts 4"][0]["parameters"]["total"]
    ends = interval([quantities["against throughput"](one) for one in records["topk · num_experts 4"]])
    assert (row["tokens_per_second_low_95"], row["tokens_per_second_high_95"]) == pytest.approx(ends)


def test_out_of_memory_is_a_mark_at_the_edge_and_named(study):
    figure = study[2]["pareto"].figure
    rows = {row["configuration"]: row for row in table(study[2]["pareto"])}
    assert [label for label, row in rows.items() if row["out_of_memory"]] == ["GNN · num_experts 8"]
    for title, marker in (("against memory", ">"), ("against throughput", "<"), ("against parameters", "^")):
        axes = panel(figure, title)
        assert {"out of memory:", "GNN · num_experts 8"} <= {text.get_text() for text in axes.texts}
        (mark,) = (line for line in axes.lines if line.get_markerfacecolor() == "white")
        assert mark.get_marker() == marker
        (x,) = axes.transData.inverted().transform(mark.get_transform().transform(mark.get_xydata()))[:, 0]
        if title == "against parameters":
            assert x * 1e6 == pytest.approx(rows["GNN · num_experts 8"]["parameters"])
        else:
            low, high = axes.get_xlim()
            assert (x - low) / (high - low) == pytest.approx(0.03 if marker == "<" else 0.97)


@pytest.mark.parametrize("more_is_better", [False, True])
def test_the_front_is_what_no_other_point_beats(more_is_better):
    random = np.random.default_rng(3)
    for _ in range(50):
        places = random.integers(0, 6, (8, 2)).astype(float).tolist()
        points = [Point("a name", x, y, None, None) for x, y in places]
        sign = -1 if more_is_better else 1
        free = {(one.x, one.y) for one in points if not any(
            other.y <= one.y and sign * other.x <= sign * one.x and (other.x, other.y) != (one.x, one.y)
            for other in points)}  # fmt: skip
        found = front(points, more_is_better)
        assert {(one.x, one.y) for one in found} == free
        assert [sign * one.x for one in found] == sorted(sign * one.x for one in found)


def test_experts_is_a_line_a_coupler(study, records):
    plot = study[2]["experts"]
    assert {row["line"] for row in table(plot)} == {"mean", "GNN", "HGNN", "topk"}
    memory, speed, step = plot.figure.axes
    assert [axes.get_xscale() + axes.get_yscale() for axes in plot.figure.axes] == ["loglog"] * 3
    timed = [records[f"topk · num_experts {number}"] for number in (4, 8)]
    wanted = [np.mean([np.median(one["speed"]["step_seconds"]) for one in found]) for found in timed]
    (line,) = (one for one in step.lines if one.get_ydata() == pytest.approx(1e3 * np.array(wanted)))
    assert list(line.get_xdata()) == [4, 8]
    for axes, height in ((memory, 0.97), (speed, 0.03), (step, 0.97)):
        (mark,) = (one for one in axes.lines if one.get_markerfacecolor() == "white")
        assert mark.get_xydata().tolist() == [[8, pytest.approx(height)]]  # pyright: ignore
        assert "out of memory" in [text.get_text() for text in axes.texts]
    (row,) = (row for row in table(plot) if row["out_of_memory"])
    assert (row["line"], row["num_experts"], row["status"]) == ("GNN", 8, "8 oom")
    assert row["peak_memory_mebibytes"] is None


def test_cost_is_paired_and_the_floor_runs_at_the_models_own_rate(study, records):
    plot = study[2]["coupler_cost"]
    rows = {row["configuration"]: row for row in table(plot)}
    assert set(rows) == {label for label in records if not label.startswith("mean")}
    for place, (label, row) in enumerate(rows.items()):
        beside = records[f"mean · num_experts {label[-1]}"]
        assert row["mean_coupler_configuration"] == f"mean · num_experts {label[-1]}"
        steps = {one["seed"]: np.median(one["speed"]["step_seconds"]) for one in beside}
        pairs = [
            1e3 * (np.median(one["speed"]["step_seconds"]) - steps[one["seed"]]) for one in records[label]
        ]
        assert row["added_step_milliseconds"] == pytest.approx(np.mean(pairs))
        assert row["added_step_high_95_milliseconds"] == pytest.approx(interval(pairs)[1])
        flops = [one[0]["flops"]["training_flops_per_token"] for one in (records[label], beside)]
        rate = flops[1] * 1024 / np.mean(list(steps.values()))
        floor = 1e3 * (flops[0] - flops[1]) * 1024 / rate
        assert row["mean_coupler_flops_per_second"] == pytest.approx(rate)
        assert row["floor_milliseconds"] == pytest.approx(floor)
        axes = plot.figure.axes[0]
        assert has(offsets(axes), row["added_step_milliseconds"], place)
        assert has(offsets(axes), floor, place)
        assert has_segment(axes, interval(pairs), place)


def test_the_header_says_what_a_reader_must_not_miss(study, tmp_path):
    frame = Frame("study", study[1])
    assert frame.warnings() == [
        "9 of 64 runs do not count (GNN · num_experts 8: 8 oom; HGNN · num_experts 4: 1 crashed)"
    ]
    made = made_study(tmp_path / "made", {"mean": 0.0}, seeds=1, embedded=True, arrays=False)
    comparison, plots = drawn(made)
    assert Frame("made", comparison).warnings() == ["NOT WIKITEXT-2: embedded text"]
    for plot in plots.values():
        assert "NOT WIKITEXT-2: embedded text" in [text.get_text() for text in plot.figure.texts]


def test_made_studies_are_what_was_asked_for(tmp_path):
    one, other = (made_study(tmp_path / name / "same", {"mean": 0.0, "GNN": 0.5}, seeds=40, noise=0.01)
                  for name in ("one", "other"))  # fmt: skip
    files = [{path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()}
             for made in (one, other)]  # fmt: skip
    assert files[0] == files[1]
    comparison = compare(load_study(one).groups[0])
    against = comparison.rows[1].against
    assert against is not None
    assert against.paired.mean == pytest.approx(0.5, abs=4 * 0.01 * math.sqrt(2 / 40))
    assert against.paired.standard_deviation == pytest.approx(0.01 * math.sqrt(2), rel=0.4)
    run = comparison.group.runs[0]
    assert run.articles is not None
    assert run.articles[0].sum() / run.articles[1].sum() == pytest.approx(run.loss(), rel=1e-5)
    assert run.data.validation[-1]["nll_sum"] / run.data.validation[-1]["tokens"] == pytest.approx(run.loss())


def test_no_line_over_the_experts_has_two_versions_of_a_coupler(tmp_path):
    couplers = {"mean": 0.0, "old": 0.1, "new": 0.1}
    path = made_study(tmp_path / "made", couplers, seeds=2, experts=(2, 4), history=2,
                      names={"old": "c.py:C", "new": "./c.py:C"})  # fmt: skip
    for file in path.glob("*/record.json"):
        record = json.loads(file.read_text())
        code = {"c.py:C": "a" * 64, "./c.py:C": "b" * 64}.get(record["config"]["model"]["coupler_type"])
        if code:
            record["environment"]["coupler_sha256"] = code
            record["config"]["model"]["coupler_type"] = "c.py:C"
            record["configuration"] = f"{record['config']['model']['num_experts']:012}"
            file.write_text(json.dumps(record))
    lines = {line.name: [row.configuration.label for row in line.rows]
             for line in lines_of(compare(load_study(path).groups[0]).rows)}  # fmt: skip
    assert lines == {
        "mean": ["mean · num_experts 2", "mean · num_experts 4"],
        **{f"C · code {code}": [f"C · num_experts {n} · code {code}" for n in (2, 4)]
           for code in ("aaaaaaaa", "bbbbbbbb")},
    }  # fmt: skip
