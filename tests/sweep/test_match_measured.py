"""Matching by memory and by time, whose costs no formula says; and what a plan expects of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from bench.config import RunConfig, TrainingConfig
from bench.device import cpu_threads
from bench.measure.memory import CannotPredict
from bench.measure.timing import Training, step_time_ratio
from bench.sweep import plan
from bench.sweep.__main__ import main
from bench.sweep.executors.local import slots_for
from bench.sweep.plan import (
    MOST_TRIALS,
    TOLERANCES,
    Match,
    Matched,
    TrainingCosts,
    matched,
    matched_here,
    reference_for,
)
from gnnmoe import GNNMoEConfig

CPU = torch.device("cpu")
SMALL = {"embed_dim": 8, "num_layers": 1, "max_seq_length": 8, "vocab_size": 40}


def config_of(coupler: str, **fields) -> GNNMoEConfig:
    return GNNMoEConfig(coupler_type=coupler, **{**SMALL, **fields})


def run_config(**training) -> RunConfig:
    return RunConfig(training=TrainingConfig(batch_size=2, **training))


class MadeUp:
    """Weighs by a function of the width, and counts how often it is asked."""

    def __init__(self, of) -> None:
        self.of, self.asked = of, []

    def __call__(self, quantity, ours, theirs) -> float:
        assert theirs.coupler_type == "HGNN"
        assert theirs.ffn_dim is None
        self.asked.append(ours.ffn_dim)
        return self.of(ours.ffn_dim)


def match_of(config: GNNMoEConfig, match: Match, weigh) -> Matched:
    return matched(config, match, reference_for(config, match, []), weigh)


def kept_match(config: GNNMoEConfig, match: Match, costs: TrainingCosts) -> Matched:
    return matched_here(config, match, reference_for(config, match, []), costs)


# --- the search ------------------------------------------------------------------------------------


SHAPES = {"straight": lambda x: x, "square": lambda x: x**2, "root": lambda x: x**0.5,
          "bent": lambda x: max(0.9 + 0.1 * x, x)}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_width_whose_cost_is_the_references_is_found(shape):
    """From a width of 32: smaller, larger, and costs that are no straight line."""
    cost = SHAPES[shape]
    for exact, quantity in product((1, 2, 5, 31, 32, 33, 100, 1000), ("memory", "time")):
        weigh = MadeUp(lambda width, exact=exact: cost(width / exact))
        found = match_of(config_of("GNN"), Match(quantity, "HGNN"), weigh)
        assert abs(found.off_by) <= TOLERANCES[quantity], (exact, quantity)
        assert found.off_by == cost((found.ffn_dim or 0) / exact) - 1
        assert len(weigh.asked) == len(set(weigh.asked)) <= MOST_TRIALS


def test_a_model_that_is_too_large_at_any_width_takes_the_smallest():
    found = match_of(config_of("GNN"), Match("memory", "HGNN"), MadeUp(lambda width: 2 + width / 100))
    assert (found.ffn_dim, found.off_by) == (1, pytest.approx(1.01))


def test_a_model_that_stays_too_small_is_refused():
    with pytest.raises(ValueError, match=r"experts 2,048 wide still cost less than the reference"):
        match_of(config_of("GNN"), Match("time", "HGNN"), MadeUp(lambda width: 0.5))


def test_noise_that_never_settles_ends_the_search():
    ratios = iter([0.5, 1.5, *[1.05, 0.95] * 50])
    found = match_of(config_of("GNN"), Match("time", "HGNN"), MadeUp(lambda width: next(ratios)))
    assert abs(found.off_by) == pytest.approx(0.05)


def test_the_reference_itself_is_not_weighed():
    weigh = MadeUp(lambda width: 1.0)
    assert match_of(config_of("HGNN"), Match("time", "HGNN"), weigh) == Matched(None, 0.0)
    assert weigh.asked == []


# --- the costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coupler", ["gate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GNN", "dense"))]
)
def test_memory_is_matched_by_the_predicted_peak(coupler):
    options = {"match": "none"} if coupler == "dense" else {}
    config = config_of(coupler, num_experts=2, coupler_options=options)
    costs = TrainingCosts(run_config(), CPU)
    found = kept_match(config, Match.parse("memory HGNN"), costs)
    assert found.ffn_dim is not None
    wide = replace(config, ffn_dim=found.ffn_dim)
    peaks = [
        Training(one, run_config(), CPU).peak_bytes() for one in (wide, config_of("HGNN", num_experts=2))
    ]
    assert found.off_by == peaks[0] / peaks[1] - 1
    assert abs(found.off_by) < 0.02


def test_a_coupler_that_cannot_be_predicted_is_refused_with_what_to_do(monkeypatch):
    def cannot(self):
        raise CannotPredict("the peak of coupler x cannot be predicted; measure it instead.")

    monkeypatch.setattr(Training, "peak_bytes", cannot)
    with pytest.raises(ValueError, match="match memory: the peak of coupler x cannot be predicted"):
        TrainingCosts(run_config(), CPU).ratio("memory", config_of("GNN"), config_of("HGNN"))
    monkeypatch.setattr(Training, "step_seconds", lambda self: 2.0)

    class Configuration:
        training = Training(config_of("GNN"), run_config(), CPU)

    assert plan.expected(Configuration()) == ("?", 2.0)  # pyright: ignore[reportArgumentType]


def test_time_is_the_median_ratio_of_steps_in_turn(monkeypatch):
    """On a clock by which a step takes as long as the experts are wide."""
    now = [0.0]

    def step(model, *_):
        now[0] += model.config.ffn_dim

    monkeypatch.setattr("bench.measure.timing.training_step", step)
    monkeypatch.setattr("bench.measure.timing.perf_counter", lambda: now[0])
    ours, theirs = (Training(config_of("GNN", ffn_dim=width), run_config(), CPU) for width in (30, 20))
    assert step_time_ratio(ours, theirs) == 1.5


def test_a_match_by_time_is_found_again(monkeypatch, tmp_path):
    """Another measurement would be another width, and another run: a stopped sweep could not go on."""
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path))
    asked = []

    def ratio(ours, theirs):
        asked.append(ours.model.ffn_dim)
        return ours.model.ffn_dim / (19 + len(asked))  # no two sweeps would agree

    monkeypatch.setattr(plan, "step_time_ratio", ratio)
    match, costs = Match.parse("time HGNN"), TrainingCosts(run_config(), CPU)
    first = kept_match(config_of("GNN"), match, costs)
    measured = len(asked)
    assert measured > 0
    assert kept_match(config_of("GNN"), match, TrainingCosts(run_config(seed=7), CPU)) == first
    assert len(asked) == measured
    for other in (config_of("gate"), config_of("GNN", num_experts=5)):
        kept_match(other, match, costs)
        assert len(asked) > measured
        measured = len(asked)
    other = RunConfig(training=TrainingConfig(batch_size=4))
    kept_match(config_of("GNN"), match, TrainingCosts(other, CPU))
    assert len(asked) > measured
    measured = len(asked)
    matched_here(config_of("GNN"), match, config_of("HGNN", hgnn_conv_type="HNHN"), costs)
    assert len(asked) > measured, "to another reference"
    for path in tmp_path.glob("match-*.json"):
        path.write_text(path.read_text().replace("1", "2"))
    measured = len(asked)
    with pytest.warns(UserWarning, match="match by time in .* is broken"):
        kept_match(config_of("GNN"), match, costs)
    assert len(asked) > measured


def test_time_is_measured_and_kept_with_the_threads_that_a_run_of_the_sweep_has(monkeypatch, tmp_path):
    """Whatever the sweep's own process has: 3 here, where a run in a slot has 1."""
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path))
    of_a_run = int(slots_for("cpu")[0]["OMP_NUM_THREADS"])
    seen = []
    monkeypatch.setattr(plan, "step_time_ratio", lambda *_: seen.append(torch.get_num_threads()) or 1.0)
    monkeypatch.setattr(Training, "step_seconds", lambda _: seen.append(torch.get_num_threads()) or 2.0)
    monkeypatch.setattr(Training, "peak_bytes", lambda _: 1024)

    class Configuration:
        training = Training(config_of("GNN"), run_config(), CPU)

    for own in (3, 2):
        with cpu_threads(own):
            kept_match(config_of("GNN"), Match.parse("time HGNN"), TrainingCosts(run_config(), CPU))
            plan.expected(Configuration())  # pyright: ignore[reportArgumentType]
            assert torch.get_num_threads() == own
    assert seen == [of_a_run] * 3  # the second match was kept
    monkeypatch.setattr(plan, "slots_for", lambda *_: [{"OMP_NUM_THREADS": "4"}])
    kept_match(config_of("GNN"), Match.parse("time HGNN"), TrainingCosts(run_config(), CPU))
    assert seen[3:] == [4]


def test_a_match_by_time_that_cannot_be_kept_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(plan, "step_time_ratio", lambda *_: 1.0)
    with pytest.raises(ValueError, match=r"cannot be kept in .*file .*GNNMOE_CACHE_DIR"):
        kept_match(config_of("GNN"), Match.parse("time HGNN"), TrainingCosts(run_config(), CPU))


# --- the plan --------------------------------------------------------------------------------------


def test_the_plan_shows_memory_and_time_in_80_columns_and_writes_nothing(
    small_data_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Training, "step_seconds", lambda self: 0.5 * self.model.num_experts)
    flags = ["--results-dir", str(tmp_path / "results"), "--data-dir", str(small_data_dir), "--plan"]
    words = "coupler=GNN num_experts=2,4 embed_dim=8 num_layers=1 max_seq_length=16 batch_size=4 max_steps=6"
    assert main(["--sweep", *words.split(), "--seeds", "3", *flags]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    [line] = [line for line in shown.splitlines() if " ms" in line and "2,000" in line]
    assert line.split()[-4:] == ["ms", "6", "12", "s"]
    assert "KiB" in line
    assert "The training of all runs, one after another, takes about 54 s." in shown
    assert "uncompiled" not in shown
    assert not (tmp_path / "results").exists()


def test_the_plan_of_a_compiled_run_says_that_its_peak_is_of_the_uncompiled_step(
    small_data_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Training, "step_seconds", lambda self: 1.0)
    monkeypatch.setattr(Training, "peak_bytes", lambda self: 1024)
    flags = ["--results-dir", str(tmp_path / "results"), "--data-dir", str(small_data_dir), "--plan"]
    words = (
        "coupler=mean compile=true,false embed_dim=8 num_layers=1 max_seq_length=16 max_steps=6 batch_size=4"
    )
    assert main(["--sweep", *words.split(), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "uncompiled" in line] == [plan.COMPILED_PEAK]


def test_between_two_widths_the_nearer_one_is_taken():
    """Costs of 40.4 and 44.6 widths: 40 is off by 1 %, 45 by 0.9 %, and no third is tried between."""
    for exact, width in ((40.4, 40), (44.6, 45)):
        assert (
            match_of(config_of("GNN"), Match("memory", "HGNN"), MadeUp(lambda w, e=exact: w / e)).ffn_dim
            == width
        )


@pytest.mark.slow
def test_a_step_is_measured_at_the_runs_own_size_and_the_peak_predicted_at_it():
    training = Training(config_of("GNN"), run_config(), CPU)
    steps = training.steps()
    assert steps.batches[0]["input_ids"].shape == (2, 8)
    assert steps.model.config == config_of("GNN")
    assert 0 < training.step_seconds() < 5
    more = Training(config_of("GNN"), RunConfig(training=TrainingConfig(batch_size=8)), CPU)
    assert more.peak_bytes() > training.peak_bytes()
