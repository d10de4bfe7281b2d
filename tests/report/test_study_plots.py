"""The plots of a study: their numbers against its files by hand, and their looks with any study."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats

from bench.report.comparison import Comparison, compare
from bench.report.contents import load_report, main_plot
from bench.report.plots.cost import Point, front
from bench.report.plots.frame import (
    ARROWS,
    BEST,
    SIDE_BY_SIDE,
    Curve,
    Frame,
    intervals,
    shifts_apart,
    short_names,
    usual_reach,
    value_range,
)
from bench.report.plots.run import smooth
from bench.report.plots.study import PALE, study_plots
from bench.report.plots.style import COUPLERS, Look, Plot
from bench.report.plots.swept import lines_of
from bench.report.quantities import peak_memory_bytes
from bench.study.runs import load_study
from gnnmoe.couplers.registry import coupler_names
from tests.report._layout import check_layout, texts_of
from tests.report._made_studies import made_study

REPOSITORY = Path(__file__).parents[2]
PATH = "examples/" + "a_long_folder_name/" * 5 + "coupler_{}.py:Coupler"
HOSTILE = {
    "a": PATH.format("one"), "b": PATH.format("two"), "c": "<script>alert('x')</script> & $\\frac{1}{2}$",
    "d": "🎉🎉 $E=mc^2$", "e": "\t\n% \x07漢",
}  # fmt: skip
EFFECTS = {"mean": 0.0, "GNN": 0.06, "HGNN all_pairs": -0.05, "topk": 0.0}
SEEDS, STEPS = 8, 24
LOST = {("GNN", 8): "oom", ("HGNN all_pairs", 4, 2): "diverged"}
NAMES = [
    "perplexity", "perplexity_by_num_experts", "loss_curves", "verdicts", "pareto", "coupler_cost",
    "hyperedge_weights", "mixing",
]  # fmt: skip
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
    """Return the points of all scatters, and the marks."""
    scatters = [one.get_offsets() for one in axes.collections if isinstance(one, PathCollection)]
    marks = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"]
    return np.concatenate([np.asarray(one) for one in (*scatters, *marks)]).tolist()


def segments(axes: Axes) -> list[np.ndarray]:
    """Return the intervals."""
    return [segment for one in axes.collections if isinstance(one, LineCollection)
            for segment in one.get_segments()]  # fmt: skip


def has(points: list[list[float]], x: Any, y: Any) -> bool:
    return any(point == pytest.approx([x, y], rel=1e-9, abs=1e-9) for point in points)


def has_segment(axes: Axes, ends: tuple[float, float], place: Any, vertical: bool = False) -> bool:
    along, across = (1, 0) if vertical else (0, 1)
    return any(segment[:, along] == pytest.approx(list(ends), rel=1e-9) and
               segment[:, across] == pytest.approx([place, place], rel=1e-9, abs=1e-9)
               for segment in segments(axes))  # fmt: skip


def test_every_figure_is_there_in_order(study):
    assert list(study[2]) == NAMES


def test_perplexity_is_exp_of_the_mean_loss_with_its_interval(study, records):
    axes, rows = study[2]["perplexity"].figure.axes[0], table(study[2]["perplexity"])
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
            assert has(offsets(axes), math.exp(value), place + 0.26)
    seeds = [row for row in rows if row["seed"] is not None]
    assert len(seeds) == sum(map(len, records.values()))
    for row in seeds:
        (record,) = (one for one in records[row["configuration"]] if one["seed"] == row["seed"])
        assert row["loss_nats"] == loss(record)


def test_the_forest_is_of_paired_differences_and_says_the_verdict_in_its_row(study, records):
    figure, comparison = study[2]["perplexity"].figure, study[1]
    axes, rows = figure.axes[1], table(study[2]["perplexity"])
    reference = {record["seed"]: loss(record) for record in records[comparison.reference.label]}
    beside = figure.axes[-1]
    assert beside.get_ylim() == axes.get_ylim(), "the words stand upside down"
    words = [tick.get_text() for tick in beside.get_yticklabels()]
    for place, row in enumerate(row for row in rows if row["seed"] is None and row["status"]):
        if not row["seeds"]:
            assert (row["status"], words[place]) == ("8 oom", "not measured")
            assert f"no result: {row['status']}" in [text.get_text() for text in figure.axes[0].texts]
            continue
        if row["configuration"] == comparison.reference.label:
            assert (words[place], row["verdict"]) == ("baseline", "reference")
            continue
        pairs = [loss(one) - reference[one["seed"]] for one in records[row["configuration"]]]
        assert row["seeds_paired"] == len(pairs) == (7 if "diverged" in row["status"] else 8)
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
    assert (
        figure.texts[0]
        .get_text()
        .startswith("HGNN · num_experts 8, HGNN · num_experts 4, mean · num_experts 8 are better than mean")
    )


def test_simple_models_are_lines_where_they_are_on_scale(study, records, tmp_path):
    (one,) = {
        record["quality"]["validation"]["unigram_nll_sum"] for found in records.values() for record in found
    }
    unigram = math.exp(one / records["mean · num_experts 4"][0]["quality"]["validation"]["tokens"])
    notes = [text.get_text() for text in study[2]["perplexity"].figure.axes[0].texts]
    assert f"unigram {unigram:,.1f} →" in notes
    assert any(note.startswith("← trigram ") for note in notes)
    values = {row["configuration"]: row["perplexity"] for row in table(study[2]["perplexity"])}
    assert values["unigram (reference line)"] == pytest.approx(unigram)
    wide = made_study(tmp_path / "wide", {"mean": 0.55, "GNN": -1.0}, seeds=2, history=0)
    axes = drawn(wide)[1]["perplexity"].figure.axes[0]
    assert f"unigram {unigram:,.1f}" in [text.get_text() for text in axes.texts]
    assert unigram in [pytest.approx(line.get_xdata()[0]) for line in axes.lines]  # pyright: ignore


def test_curves_are_means_over_seeds_and_differences_are_paired_by_step(study, records):
    plot, label, reference = study[2]["loss_curves"], "HGNN · num_experts 4", study[1].reference.label
    rows = {(row["configuration"], row["step"]): row for row in table(plot)}
    smoothed = {name: {one["seed"]: smooth([row["loss"] for row in one["history"] if row["kind"] == "train"],
                                           span=2) for one in records[name]}
                for name in (label, reference)}  # fmt: skip
    train = np.array(list(smoothed[label].values()))
    pairs = train - np.array([smoothed[reference][seed] for seed in smoothed[label]])
    scores = np.array([[row["nll_sum"] / row["tokens"] for row in record["history"]
                        if row["kind"] == "validation"] for record in records[label]])  # fmt: skip
    flops = records[label][0]["flops"]["training_flops_per_token"]
    assert train.shape == (7, STEPS), "the run that diverged is left out"
    for step in (1, 10, STEPS):
        row, values = rows[label, step], pairs[:, step - 1]
        assert row["seeds"] == 7
        assert row["train_loss_smoothed_nats"] == pytest.approx(train[:, step - 1].mean())
        assert row["difference_nats"] == pytest.approx(values.mean())
        half = (interval(values.tolist())[1] - interval(values.tolist())[0]) / 2
        assert row["difference_half_width_95_nats"] == pytest.approx(half)
        assert row["training_flops"] == pytest.approx(flops * row["tokens"])
    for place, step in enumerate(range(6, STEPS + 1, 6)):
        assert rows[label, step]["validation_perplexity"] == pytest.approx(math.exp(scores[:, place].mean()))
    losses, ahead = plot.figure.axes
    assert any(line.get_ydata() == pytest.approx(train.mean(axis=0)) for line in losses.lines)
    assert any(line.get_ydata() == pytest.approx(pairs.mean(axis=0)) for line in ahead.lines)
    assert losses.get_xlabel().startswith("training FLOPs"), "they differ between configurations"
    assert {one.label for one in study[1].group.configurations} >= {label}
    assert any(text.startswith("× HGNN · num_experts 4, seed 2: diverged") for text in texts_of(plot.figure))
    names = {text.get_text() for text in ahead.texts}
    assert len(names) == 6, "every line but the baseline's has its name"


def test_pareto_is_paired_on_both_axes(study, records):
    rows = {row["configuration"]: row for row in table(study[2]["pareto"])}
    reference = {record["seed"]: record for record in records[study[1].reference.label]}
    memory, time, _ = study[2]["pareto"].figure.axes
    for label, found in records.items():
        if label == study[1].reference.label:
            continue
        pairs = [(one, reference[one["seed"]]) for one in found]
        ratios = [loss(one) - loss(other) for one, other in pairs]
        steps = [math.log(np.median(one["speed"]["step_seconds"]) / np.median(other["speed"]["step_seconds"]))
                 for one, other in pairs]  # fmt: skip
        x = np.mean([one["memory"]["peak_allocated_bytes"] for one in found]) / 2**20
        y, ends = 100 * math.expm1(np.mean(ratios)), tuple(100 * np.expm1(interval(ratios)))
        assert has(offsets(memory), x, y)
        assert has_segment(memory, ends, x, vertical=True)
        assert has(offsets(time), 100 * math.expm1(np.mean(steps)), y)
        assert has_segment(time, tuple(100 * np.expm1(interval(steps))), y)
        assert rows[label]["difference_low_95_percent"] == pytest.approx(ends[0])


def test_a_committed_study_has_memory_by_part_and_no_panel_of_equal_sizes():
    comparison, plots = drawn(REPOSITORY / "results/reference/reference-tuned")
    assert len(plots["pareto"].figure.axes) == 2, "equal numbers of parameters are no panel"
    rows = {row["configuration"]: row for row in table(plots["memory"])}
    for one in comparison.group.configurations:
        peaks = [peak_memory_bytes(run.record) or 0 for run in one.counted.values()]
        assert rows[one.label]["total_mebibytes"] == pytest.approx(np.mean(peaks) / 2**20, rel=0.01)
    widths = [bar.get_width() for bar in plots["memory"].figure.axes[0].patches]  # pyright: ignore
    assert sum(widths) == pytest.approx(sum(row["total_mebibytes"] for row in rows.values()))


def test_the_matrix_has_the_verdict_of_each_pair_in_both_directions(study):
    figure, labels = (
        study[2]["verdicts"].figure,
        [row.configuration.label for row in Frame("s", study[1]).measured],
    )
    axes = figure.axes[0]
    cells = {
        (round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)): patch
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    }
    assert len(cells) == 7 * 7
    turned = {"better": "worse", "worse": "better"}
    for pair in study[1].pairs:
        row, column = labels.index(pair.candidate.label), labels.index(pair.reference.label)
        kind = pair.verdict.kind
        colours = [to_hex(cells[at].get_facecolor()) for at in ((row, column), (column, row))]
        assert colours == [PALE[kind], PALE[turned.get(kind) or kind]]
    assert {row["verdict"] for row in table(study[2]["verdicts"])} >= {"better", "worse"}


def test_the_front_is_what_no_other_point_beats():
    random = np.random.default_rng(3)
    for _ in range(50):
        points = [Point("a name", *place) for place in random.integers(0, 6, (8, 2)).astype(float).tolist()]
        free = {(one.x, one.y) for one in points if not any(
            other.y <= one.y and other.x <= one.x and (other.x, other.y) != (one.x, one.y)
            for other in points)}  # fmt: skip
        assert {(one.x, one.y) for one in front(points)} == free


def test_quality_is_drawn_against_a_swept_number_with_a_line_a_coupler(study, records):
    plot = study[2]["perplexity_by_num_experts"]
    assert {row["line"] for row in table(plot)} == {"mean", "GNN", "HGNN", "topk"}
    quality, memory, _ = plot.figure.axes
    found = [[loss(one) for one in records[f"topk · num_experts {number}"]] for number in (4, 8)]
    (line,) = (one for one in quality.lines if list(one.get_ydata()) == pytest.approx(
        [math.exp(np.mean(losses)) for losses in found]))  # fmt: skip
    assert list(line.get_xdata()) == [4, 8]
    for number, losses in zip((4, 8), found, strict=True):
        assert has_segment(quality, tuple(np.exp(interval(losses))), number, vertical=True)
    peaks = [np.mean([one["memory"]["peak_allocated_bytes"] for one in records[f"topk · num_experts {n}"]])
             for n in (4, 8)]  # fmt: skip
    assert any(list(one.get_ydata()) == pytest.approx(np.array(peaks) / 2**20) for one in memory.lines)
    assert "GNN: 8 oom" in texts_of(plot.figure), "what failed has its name"
    (row,) = (row for row in table(plot) if row["status"] == "8 oom")
    assert (row["line"], row["num_experts"], row["perplexity"]) == ("GNN", 8, None)


@pytest.mark.parametrize(("seeds", "answer"), [
    (2, "No learning_rate is significantly better than every other value"),
    (9, "Lowest perplexity at learning_rate 0.001 (mean, gate)"),
])  # fmt: skip
def test_a_learning_rate_has_a_logarithmic_axis_and_no_cost_and_its_title_claims_what_is_resolved(
    seeds, answer, tmp_path
):
    settings = {f"{coupler} {rate}": {"learning_rate": rate, "static_hyperedge_strategy": "all_pairs"}
                for coupler in ("mean", "gate") for rate in (0.001, 0.002, 0.008)}  # fmt: skip
    effects = {key: 0.01 * place for place, key in enumerate(settings)}
    study = made_study(tmp_path / "rates", effects, seeds=seeds, settings=settings, noise=1e-4, seed_noise=0)
    plots = drawn(study)[1]
    figure = plots["perplexity_by_learning_rate"].figure
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.001", "0.002", "0.008"]
    assert figure.texts[0].get_text() == answer
    colours = {text.get_text(): text.get_color() for text in axes.texts if text.get_gid() is None}
    assert colours == {"mean": COUPLERS["mean"][0], "gate": COUPLERS["gate"][0]}


def test_marks_at_one_place_stand_side_by_side_and_a_cut_interval_is_explained():
    figure = Figure(figsize=(5, 5))
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    places = [(0.5, 0.5), (0.5, 0.5), (0.5, 0.501), (0.1, 0.5)]
    assert shifts_apart(left, places[:1] + places[3:], 7.0) == [0, 0]
    assert not list(left.texts), "nothing was moved"
    assert shifts_apart(left, places, 7.0) == [0, 7, -7, 0]
    intervals(left, [0.2, 0.4], [(0.1, 0.9), None], vertical=True)
    assert [text.get_text() for text in left.texts] == [SIDE_BY_SIDE]
    intervals(left, [0.2], [(0.1, 1.9)], vertical=True, shift=7.0)
    intervals(right, [0.2], [(-0.1, 1.9)])
    assert [text.get_text() for text in left.texts] == [SIDE_BY_SIDE, ARROWS]
    assert not list(right.texts), "once in a figure"
    at = [
        line.get_transform().transform((0.2, 1)) - left.transData.transform((0.2, 1)) for line in left.lines
    ]
    assert np.allclose(at, [(7 * figure.dpi / 72, 0)])


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
        "9 of 64 runs do not count (GNN · num_experts 8: 8 oom; HGNN · num_experts 4: 1 diverged)"
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
             for line in lines_of(compare(load_study(path).groups[0]).rows, "num_experts")}  # fmt: skip
    assert lines == {
        "mean": ["mean · num_experts 2", "mean · num_experts 4"],
        **{f"C · code {code}": [f"C · num_experts {n} · code {code}" for n in (2, 4)]
           for code in ("aaaaaaaa", "bbbbbbbb")},
    }  # fmt: skip


# --- looks -----------------------------------------------------------------------------------------


def test_each_coupler_of_the_project_has_its_own_colour_and_marker():
    assert set(coupler_names()) <= set(COUPLERS)
    assert (
        len({look[0] for look in COUPLERS.values()})
        == len({look[1] for look in COUPLERS.values()})
        == len(COUPLERS)
    )
    assert Look.of("a/file.py:Mine") == Look.of("Mine") != Look.of("Yours")
    first, second = Look.of("HGNN", 0), Look.of("HGNN", 1)
    assert (first.colour, first.marker) == (second.colour, second.marker)
    assert (first.line, first.fill) != (second.line, second.fill)


def test_names_leave_out_what_most_share_and_are_never_the_same(study, tmp_path):
    names, note = short_names(
        load_study(REPOSITORY / "results/reference/reference-cpu").groups[0].configurations
    )
    assert names["HGNN · HypergraphConv · all_pairs · learned weights"] == "HGNN"
    assert names["HGNN · HNHN · all_pairs · learned weights"] == "HGNN · HNHN"
    assert "HGNN: HypergraphConv, all_pairs, learned weights" in note
    assert len(set(names.values())) == 13
    long = {"mean": 0.0, **dict.fromkeys("abc", 0.1)}
    folder = made_study(tmp_path / "long", long, seeds=1, arrays=False,
                        names={key: "x" * 80 + key + "y" * 80 for key in "abc"})  # fmt: skip
    found = short_names(load_study(folder).groups[0].configurations)[0]
    assert len(set(found.values())) == 4
    assert max(map(len, found.values())) <= 60


@pytest.mark.filterwarnings("error")
def test_hostile_names_and_failed_runs_stay_readable(tmp_path, monkeypatch):
    failed = {(key, 32, seed): "oom" for key in "ab" for seed in range(3)}
    failed |= {("e", 32, seed): "crashed" for seed in range(3)} | {("d", 2, 1): "diverged"}
    effects = {"mean": 0.0, "a": -0.03, "b": -0.02, "c": 0.01, "d": 0.02, "e": 0.0}
    folder = made_study(tmp_path / "study", effects, seeds=3, experts=(2, 32), names=HOSTILE,
                        failed=failed, embedded=True)  # fmt: skip
    comparison = compare(load_study(folder).groups[0])
    plots = study_plots("<script>alert(1)</script> $x$ 🎉 " + "a_very_long_name " * 12, comparison)
    assert len(plots) == 6
    for plot in plots:
        check_layout(plot.figure, monkeypatch)
        assert any("NOT WIKITEXT-2" in text for text in texts_of(plot.figure))
    files = plots[0].files()
    assert set(files) == {f"perplexity.{end}" for end in ("svg", "png", "csv")}
    assert plots[0].mark().encode() in files["perplexity.png"]
    assert plots[0].mark().encode() in files["perplexity.svg"]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_sixty_configurations_stay_readable(tmp_path, monkeypatch):
    effects = {"mean": 0.0, **{f"coupler_{number}": 0.003 * (number - 30) for number in range(62)}}
    failed = {f"coupler_{number}": "oom" for number in range(50, 58)}
    plots = drawn(made_study(tmp_path / "study", effects, seeds=2, failed=failed, arrays=False))[1]
    for name in ("perplexity", "loss_curves", "pareto", "verdicts"):
        check_layout(plots[name].figure, monkeypatch)
    assert f"In colour: the {BEST} best and the baseline; grey: 42 others." in " ".join(
        text.get_text() for text in plots["loss_curves"].figure.texts)  # fmt: skip
    assert len(plots["perplexity"].figure.axes[0].get_yticklabels()) == 63
    assert max(plot.figure.get_figheight() for plot in plots.values()) < 20


@pytest.mark.slow
def test_a_hundred_rows_are_cut_in_the_picture_and_not_in_the_table(tmp_path):
    effects = {"mean": 5.0, **{f"coupler_{number:03}": 0.01 * number for number in range(100)}}
    plots = drawn(made_study(tmp_path / "study", effects, seeds=1, noise=0, history=0, arrays=False))[1]
    shown = [tick.get_text() for tick in plots["perplexity"].figure.axes[0].get_yticklabels()]
    assert len(shown) == 78
    assert shown[-1].startswith("mean (baseline)"), "the baseline is never left out"
    assert "23 configurations between the best and the worst: table only." in " ".join(
        text.get_text() for text in plots["perplexity"].figure.texts)  # fmt: skip
    assert len({row[0] for row in plots["perplexity"].rows if row[-1]}) == 101


def test_a_baseline_without_a_result_is_compared_with_nothing(tmp_path):
    effects = {"mean": 0.0, "GNN": 0.1, "gate": 0.1}
    folder = made_study(tmp_path / "study", effects, seeds=2, failed={"mean": "oom"})
    comparison = compare(load_study(folder).groups[0], "mean")
    plots = {plot.name: plot for plot in study_plots("study", comparison)}
    assert len(plots["perplexity"].figure.axes) == len(plots["loss_curves"].figure.axes) == 1
    assert "pareto" not in plots


@pytest.mark.filterwarnings("error")
def test_one_run_has_no_interval_and_no_band(tmp_path, monkeypatch):
    plots = drawn(made_study(tmp_path / "study", {"HGNN": 0.0}, seeds=1))[1]
    assert set(plots) == {"loss_curves", "perplexity", "hyperedge_weights", "mixing"}, "nothing to compare"
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
        assert not segments(plot.figure.axes[0])
    seeds = drawn(made_study(tmp_path / "one_seed", {"mean": 0.0, "GNN": 0.1}, seeds=1))[1]
    assert "not resolved (one seed decides nothing)" in texts_of(seeds["perplexity"].figure)
    assert "coupler_cost" not in seeds, "the time of one run says nothing"


@pytest.mark.parametrize(
    ("effect", "noise", "title"),
    [(-0.2, 0.01, "GNN is better than mean"), (0.2, 0.01, "GNN is worse than mean"),
     (0.0, 1e-5, "GNN is equivalent to mean"), (0.0, 0.1, "GNN is not significantly different from mean")],
)  # fmt: skip
def test_the_title_answers_the_question(tmp_path, effect, noise, title):
    folder = made_study(tmp_path / "study", {"mean": 0.0, "GNN": effect}, seeds=8, noise=noise, arrays=False)
    assert main_plot(load_report(folder)).figure.texts[0].get_text() == title


def test_what_was_not_measured_is_left_out(tmp_path):
    bare = drawn(
        made_study(tmp_path / "bare", seeds=2, history=0, unmeasured=("speed", "memory", "communication"))
    )
    assert set(bare[1]) <= {"perplexity", "verdicts"}
    without = drawn(made_study(tmp_path / "without", {"GNN": 0.0, "gate": 0.1}, seeds=2))[1]
    assert "coupler_cost" not in without, "there is no mean coupler"
    failed = made_study(tmp_path / "failed", {"mean": 0.0, "GNN": 0.0}, seeds=2,
                        failed={"mean": "oom", "GNN": "crashed"})  # fmt: skip
    assert drawn(failed)[1] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_numbers_beyond_all_scales_are_drawn_and_said(tmp_path, monkeypatch):
    effects = {"mean": 0.0, "a": -0.03, "b": 0.02, "c": 790.0}
    folder = made_study(tmp_path / "study", effects, seeds=2, history=12)
    for file in sorted(folder.glob("*/history.jsonl"))[:3]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[2]["loss"], rows[3]["gradient_norm"] = math.nan, math.inf
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots = drawn(folder)[1]
    for plot in plots.values():
        check_layout(plot.figure, monkeypatch)
    assert {"inf →", "790 →"} <= set(texts_of(plots["perplexity"].figure))
    assert "above ↑: c" in texts_of(plots["loss_curves"].figure)
    assert plots["loss_curves"].figure.axes[0].get_ylim()[1] < 10
    assert math.inf in {row[3] for row in plots["perplexity"].rows}


def test_curves_are_smoothed_over_what_is_no_number_and_thinned():
    values = [8.0, 4.0, math.nan, 2.0, math.inf, 1.0]
    curve = Curve((0,), np.arange(6), np.array([values])).smoothed()
    assert curve.values_ST[0, :2] == pytest.approx(smooth([8.0, 4.0], span=2))
    assert np.isnan(curve.values_ST[0, [2, 4]]).all()
    assert np.isfinite(curve.values_ST[0, [3, 5]]).all()
    thin = Curve((0, 1), np.arange(1, 10_001), np.ones((2, 10_000))).thinned()
    assert thin.values_ST.shape == (2, 400)
    assert (thin.steps_T[0], thin.steps_T[-1]) == (1, 10_000)


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
    assert usual_reach([0.0, 0.0], gap=10, least=0.5) == 0.5
    low, high = value_range([100.0, 101.0, 102.0], [(0.0, 200.0), None, None])
    assert 95 < low < 100 < 102 < high < 107, "an interval far wider than the means is cut"
    assert value_range([500.0], [None]) == (495, 505), "one value gets a scale of whole percents"


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes(tmp_path, monkeypatch):
    folder = made_study(tmp_path / "study", {"mean": 0.0, "GNN": 0.1}, seeds=2, arrays=False)
    first = drawn(folder)[1]["pareto"].files()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)  # a user's own settings
    assert drawn(folder)[1]["pareto"].files() == first
    assert b"<dc:date>" not in first["pareto.svg"]


def test_the_committed_image_shows_the_committed_records():
    image = REPOSITORY / "docs/images/reference-cpu.png"
    plot = main_plot(load_report(REPOSITORY / "results/reference" / image.stem))
    assert plot.mark().encode() in image.read_bytes(), (
        f"python -m bench.report {image.stem} --results-dir results/reference --image {image}"
    )


def test_the_committed_picture_of_the_experts_is_that_of_its_report():
    """It is report/plots/expert_similarity.png of the study."""
    comparison = load_report(REPOSITORY / "results/reference/reference-experts").sections[0].comparison
    (plot,) = [one for one in study_plots("reference-experts", comparison) if one.name == "expert_similarity"]
    assert plot.mark().encode() in (REPOSITORY / "docs/images/reference-experts.png").read_bytes()
