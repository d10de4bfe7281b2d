"""Sweep files: which runs, in which order, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cli import parse
from bench.config import RunConfig, as_flags, complete, config_of, defaults
from bench.sweep.specification import RunRequest, Sweep, load_sweep, sweep_of


@pytest.fixture
def load(tmp_path):
    def load(text: str, name: str = "some.toml") -> Sweep:
        (tmp_path / name).write_text(text)
        return load_sweep(tmp_path / name)

    return load


def arguments(run: RunRequest) -> list[str]:
    """The flags of ``python -m bench.run`` that make this run."""
    return as_flags({**run.flags, "seed": run.seed})


def rows(sweep: Sweep, *names: str) -> list[tuple]:
    """The flags of each run, in order; a run's seed counts as one."""
    return [tuple({**run.flags, "seed": run.seed}.get(name) for name in names) for run in sweep.runs]


# --- blocks ----------------------------------------------------------------------------------------


def test_all_blocks_together(load):
    sweep = load("""
        study = "mine"
        seeds = [3, 1]
        where = "num_experts < 8 or coupler == 'mean'"
        match = "params HGNN"

        [base]
        preset = "baseline"
        learning-rate = 1
        num_eval_samples = "None"

        [grid]
        coupler = ["HGNN", "mean"]
        num-experts = [4, 8]

        [zip]
        embed_dim = [32, 64]
        num_heads = [2, 4]

        [[hypotheses]]
        says = "HGNN is better"
    """)
    assert (sweep.study, sweep.seeds) == ("mine", [3, 1])
    assert (sweep.match, sweep.hypotheses) == ("params HGNN", [{"says": "HGNN is better"}])
    one_seed = [
        ("HGNN", 4, 32, 2), ("HGNN", 4, 64, 4), ("mean", 4, 32, 2), ("mean", 4, 64, 4),
        ("mean", 8, 32, 2), ("mean", 8, 64, 4),
    ]  # fmt: skip
    names = ("seed", "coupler_type", "num_experts", "embed_dim", "num_heads")
    assert rows(sweep, *names) == [(seed, *row) for seed in (3, 1) for row in one_seed]
    first = sweep.runs[0]
    assert first.flags["learning_rate"] == 1.0
    assert arguments(first) == [
        "--preset=baseline", "--learning-rate=1.0", "--num-eval-samples=None", "--coupler-type=HGNN",
        "--num-experts=4", "--embed-dim=32", "--num-heads=2", "--seed=3",
    ]  # fmt: skip


def test_what_a_file_leaves_out(load):
    sweep = load("seeds = 10\n", "noise.floor.toml")
    assert (sweep.study, sweep.seeds) == ("noise.floor", list(range(10)))
    assert (sweep.match, sweep.hypotheses) == (None, None)
    assert [run.flags for run in sweep.runs] == [{}] * 10
    assert load("[grid]\nnum_experts = [2, 3]").seeds == [0]


def test_a_list_of_options_is_one_value(load):
    sweep = load('[grid]\ncoupler_option = [[], ["k=2"], ["k=2", "backend=loop"]]\nadam_betas = [[0, 0.5]]')
    assert [arguments(run) for run in sweep.runs] == [
        [*options, "--adam-betas", "0.0", "0.5", "--seed=0"]
        for options in (
            [],
            ["--coupler-option=k=2"],
            ["--coupler-option=k=2", "--coupler-option=backend=loop"],
        )
    ]


def test_equal_configurations_are_kept_once(load):
    assert rows(load("[grid]\nnum_experts = [2, 4, 2, 4]"), "num_experts") == [(2,), (4,)]
    usual = "[[union]]\n[[union]]\n[union.base]\nmax-steps = 120\n[[union]]\n[union.base]\nepochs = 1\n"
    assert [run.flags for run in load(usual).runs] == [{}, {"epochs": 1}]
    by_preset = '[[union]]\nbase = {preset = "baseline"}\n[[union]]\nbase = {preset = "baseline", epochs = 4}'
    assert [run.flags for run in load(by_preset).runs] == [{"preset": "baseline"}]
    same = '[[union]]\nbase = {preset = "quick"}\n[[union]]\nbase = {num_experts = 4}'
    assert [run.flags for run in load(same).runs] == [{"preset": "quick"}]


# --- union -----------------------------------------------------------------------------------------

UNION = """
where = "num_experts != 5"
seeds = 2
[base]
epochs = 3
num_layers = 1
[grid]
num_experts = [2, 5, 8]

[[union]]
where = "num_experts < 8"
[union.grid]
static_hyperedge_strategy = ["all_pairs", "all_triplets"]

[[union]]
[union.base]
num-layers = 3
max_steps = 5
[union.zip]
embed_dim = [32, 64]
num_heads = [1, 2]
"""


def test_a_union_puts_its_parts_together(load):
    expected = [
        (2, 1, "all_pairs", 3, None, None), (2, 1, "all_triplets", 3, None, None),
        (2, 3, None, None, 5, 32), (2, 3, None, None, 5, 64), (8, 3, None, None, 5, 32),
        (8, 3, None, None, 5, 64),
    ]  # fmt: skip
    names = ("num_experts", "num_layers", "static_hyperedge_strategy", "epochs", "max_steps", "embed_dim")
    found = rows(load(UNION), "seed", *names)
    assert found == [(seed, *row) for seed in (0, 1) for row in expected]


def test_options_of_the_top_and_a_part_add_up_as_those_of_layers_do(load):
    sweep = load('[base]\ncoupler_option = ["k=2"]\n[[union]]\nbase = {coupler_option = ["backend=loop"]}')
    assert sweep.runs[0].flags["coupler_option"] == ["k=2", "backend=loop"]


# --- where and random ------------------------------------------------------------------------------


def test_a_condition_sees_flags_that_nobody_set(load):
    for where, expected in (
        ("num_experts * num_layers <= 4", 2),  # two layers by default
        ("max_steps == 120 and epochs == None and preset == 'quick' and num_experts % 2 == 1", 3),
    ):
        assert rows(load(f'where = "{where}"\n[grid]\nnum_experts = [2, 3, 4]'), "num_experts") == [
            (expected,)
        ]


def test_a_condition_sees_what_the_preset_says(load):
    sweep = load('where = "epochs == 4 and embed_dim > 64"\n[grid]\npreset = ["quick", "baseline", "full"]')
    assert rows(sweep, "preset") == [("baseline",)]
    longer = 'where = "epochs == None and max_steps == 7"\n[base]\nmax_steps = 7\npreset = "baseline"'
    assert len(load(longer).runs) == 1


DRAWN = "seeds = {seeds}\n[random]\nn = {n}\nseed = {seed}\n[base]\nmax_steps = {steps}\n[grid]\n"
DRAWN += "num_experts = [2, 3, 4, 5, 6, 7]\nnum_layers = [1, 2, 3, 4, 5]"


def draw(load, n: int, seed: int = 0, seeds: int = 1, steps: int = 9) -> list[tuple]:
    sweep = load(DRAWN.format(n=n, seed=seed, seeds=seeds, steps=steps))
    return rows(sweep, "seed", "num_experts", "num_layers")


def test_a_draw_is_the_same_each_time_for_all_seeds_and_whatever_all_runs_share(load):
    drawn = draw(load, 7)
    assert len(set(drawn)) == 7
    assert drawn == sorted(drawn) == draw(load, 7, steps=12)
    assert draw(load, 7, seeds=2) == drawn + [(1, *rest) for _, *rest in drawn]
    of_last_year = [(2, 2), (2, 3), (3, 3), (5, 5), (6, 1), (6, 4), (7, 1)]
    assert [row[1:] for row in drawn] == of_last_year


def test_a_larger_draw_keeps_the_smaller_one(load):
    draws = [set(draw(load, n)) for n in range(1, 31)]
    assert [len(found) for found in draws] == list(range(1, 31))
    assert all(small < large for small, large in itertools.pairwise(draws))


def test_draws_differ_and_take_every_configuration_equally_often(load):
    draws = [draw(load, 6, seed) for seed in range(100)]
    assert len(set(map(tuple, draws))) == 100
    counts = [sum(row in found for found in draws) for row in draw(load, 30)]
    assert sum(counts) == 600
    assert 6 <= min(counts) <= max(counts) <= 36  # 20 expected, standard deviation 4


def test_a_draw_comes_after_the_condition(load):
    text = 'where = "num_experts > 4"\n' + DRAWN.format(n=15, seed=0, seeds=1, steps=9)
    assert {row[0] for row in rows(load(text), "num_experts")} == {5, 6, 7}


# --- arguments -------------------------------------------------------------------------------------

VALUES = {
    "num_experts": st.integers(1, 9), "coupler_type": st.sampled_from(["GNN", "--odd", "a b", "None"]),
    "learning_rate": st.floats(1e-12, 10), "epochs": st.none() | st.integers(1, 9),
    "max_steps": st.integers(1, 99), "evaluate_test": st.booleans(),
    "data_dir": st.sampled_from([None, "a/b"]),
    "coupler_option": st.lists(st.sampled_from(["k=2", "HGNN.backend=loop", "a=b=c"]), max_size=3),
    "adam_betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2),
    "num_workers_dataloader": st.sampled_from([0, 2, "auto"]), "num_train_samples": st.none(),
    "preset": st.sampled_from(["quick", "baseline", "full", "original"]),
}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.integers(0, 99))
def test_a_runs_arguments_its_config_and_its_complete_flags_say_the_same(flags, seed):
    run = sweep_of(
        {"base": {k: "None" if v is None else v for k, v in flags.items()}, "seeds": [seed]}, "s"
    ).runs[0]
    config = config_of({**run.flags, "seed": seed})
    assert config == parse(RunConfig, arguments(run), presets=True)
    groups = vars(config).values()
    found = {name: getattr(group, name) for group in groups for name in defaults() if hasattr(group, name)}
    said = complete({**run.flags, "seed": seed})
    assert said.pop("preset") == flags.get("preset", "quick")
    if config.training.epochs is None and config.training.max_steps is None:
        assert said["max_steps"] == 120
        said["max_steps"] = None
    assert said == {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in found.items()
    }


def test_blocks_and_keys_keep_the_order_of_the_file(load):
    sweep = load("[zip]\nnum_layers = [1, 2]\n[grid]\nnum_heads = [1, 2]\nnum_experts = [2, 3]")
    expected = list(itertools.product([1, 2], [1, 2], [2, 3]))
    assert rows(sweep, "num_layers", "num_heads", "num_experts") == expected


def test_a_part_may_be_drawn_and_doubles_are_dropped(load):
    part = "[[union]]\nrandom = {n = 3}\n[union.grid]\nnum_experts = [2, 3, 4, 5, 6, 7]\n"
    once = rows(load(part), "num_experts")
    assert len(once) == 3
    assert rows(load(part + part), "num_experts") == once
