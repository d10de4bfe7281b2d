"""The plan of a sweep: ids, costs, matching, what is there already; and ``bench.sweep --dry-run``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench.cli import parse
from bench.config import RunConfig, config_of, seconds_of
from bench.record import RunFolder
from bench.run.prepare import Identifier, prepare
from bench.sweep.__main__ import main
from bench.sweep.plan import Match, Plan, make_plan, matched, reference_for, warn_of_few_seeds
from bench.sweep.specification import sweep_of
from gnnmoe import GNNMoEConfig
from gnnmoe.config import Refused
from gnnmoe.cost import model_cost

BASE = {"embed_dim": 8, "max_seq_length": 16, "batch_size": 4, "max_steps": 6, "num_layers": 1}
GRID = {"coupler": ["mean", "HGNN", "dense"], "num_experts": [2, 4]}
SIZES = ["max_seq_length=16", "batch_size=4"]  # with which the small text gives enough batches


@pytest.fixture
def places(small_data_dir, tmp_path) -> dict[str, str]:
    return {"results_dir": str(tmp_path / "results"), "data_dir": str(small_data_dir)}


def plan_of(places, match: str | None = None, **entries) -> Plan:
    entries = {"base": BASE, "grid": GRID, "seeds": 3, **entries}
    sweep = sweep_of({name: value for name, value in entries.items() if value is not None}, "study")
    return make_plan(sweep, places, Identifier(), None if match is None else Match.parse(match))


def test_ids_folders_and_flags_are_those_of_the_runs_themselves(places):
    plan = plan_of(places)
    assert len(plan.runs) == 18
    assert len({run.run_id for run in plan.runs}) == 18
    for run in plan.runs[::5]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in places.items()]
        config = parse(RunConfig, [*run.arguments, *flags, "--study", "study"], presets=True)
        prepared = prepare(config)
        assert prepared.run_id == run.run_id
        assert prepared.folder.path == run.folder


def test_seeds_are_outermost_and_configurations_hold_their_runs(places):
    plan = plan_of(places)
    labels = [run.label for run in plan.runs]
    assert labels[:3] == [
        "mean · num_experts 2 · seed 0",
        "mean · num_experts 4 · seed 0",
        "HGNN · num_experts 2 · seed 0",
    ]
    assert labels[6:] == [label.replace("seed 0", f"seed {seed}") for seed in (1, 2) for label in labels[:6]]
    for configuration in plan.configurations:
        assert [run.label.rpartition(" ")[2] for run in configuration.runs] == ["0", "1", "2"]


def test_what_differs_in_no_number_is_planned_once(places):
    """As the report groups them: a conversion of hypergraphs is nothing that the mean coupler reads."""
    grid = {"coupler": ["mean", "HGNN"], "hgnn_conv_type": ["HypergraphConv", "HNHN"]}
    plan = plan_of(places, grid=grid)
    assert [found.label for found in plan.configurations] == [
        "mean", "HGNN · HypergraphConv", "HGNN · HNHN"]  # fmt: skip
    assert len({run.run_id for run in plan.runs}) == len(plan.runs) == 9


def test_costs_are_those_of_the_model(places):
    for configuration in plan_of(places).configurations:
        coupler, experts = configuration.label.split(" · num_experts ")
        flags = [*configuration.runs[0].arguments, "--data-dir", places["data_dir"]]
        words = Identifier()(parse(RunConfig, flags))[1].vocab_size
        config = GNNMoEConfig(
            coupler_type=coupler, num_experts=int(experts), embed_dim=8, max_seq_length=16, num_layers=1,
            vocab_size=words,
        )  # fmt: skip
        cost = model_cost(config)
        assert configuration.cost == cost
        assert cost.flops is not None
        assert configuration.flops_per_token == 3 * cost.flops / 16
        assert configuration.flops_per_token is not None
        for run in configuration.runs:
            assert run.known["config"].model["num_experts"] == int(experts)
            assert run.known["config"].training["seed"] == run.known["seed"]
            assert run.cost == configuration.flops_per_token * 6 * 4 * 16
            assert run.steps == 6


@pytest.mark.parametrize("quantity", ["params", "flops"])
def test_matched_models_are_as_large_as_the_reference_and_run_so(places, quantity):
    plan = plan_of(places, match=f"{quantity} HGNN")
    references = {c.training.model.num_experts: getattr(c.cost, quantity)
                  for c in plan.configurations if c.label.startswith("HGNN")}  # fmt: skip
    for configuration in plan.configurations:
        asked = references[configuration.training.model.num_experts]
        got = getattr(configuration.cost, quantity)
        assert got == pytest.approx(asked, rel=0.02)
        assert configuration.off_by == pytest.approx(got / asked - 1)
        if configuration.label.startswith("HGNN"):
            assert got == asked
        config = parse(RunConfig, [*configuration.runs[0].arguments, "--data-dir", places["data_dir"]])
        assert model_cost(Identifier()(config)[1]) == configuration.cost  # the flags say it all
    unmatched = {run.run_id for run in plan_of(places).runs}
    changed = [run for run in plan.runs if run.run_id not in unmatched]
    assert len(changed) == 12  # all but the reference's own


def unweighed(*_) -> float:
    raise AssertionError("parameters and FLOPs are matched by formula")


def test_a_match_is_relative_to_the_same_model_with_the_reference_coupler():
    config = GNNMoEConfig(coupler_type="GNN", num_experts=3, embed_dim=16)
    match = Match.parse("params HGNN")
    found = matched(config, match, reference_for(config, match, []), unweighed)
    target = model_cost(replace(config, coupler_type="HGNN"))
    left = model_cost(replace(config, ffn_dim=found.ffn_dim)).params - target.params
    assert found.off_by == pytest.approx(left / target.params)
    assert abs(left) <= 2 * 3 * (2 * 16 + 1) / 2  # half a hidden unit of every expert


def test_the_reference_is_the_same_in_all_that_is_not_the_couplers():
    """It is one of the sweep's own where there is one, with the options that it has there."""
    match, config = Match.parse("params HGNN"), GNNMoEConfig(coupler_type="GNN", num_experts=3)
    of_sweep = [replace(config, coupler_type="HGNN", num_experts=experts, hgnn_conv_type="HNHN",
                        coupler_options={"activation": "none"}) for experts in (2, 3)]  # fmt: skip
    assert reference_for(config, match, of_sweep) is of_sweep[1]
    assert reference_for(replace(config, gnn_layers=1), match, of_sweep).hgnn_conv_type == "HypergraphConv"


def test_a_wrong_match_is_refused():
    for text, message in (
        ("params", "write a quantity and a coupler"),
        ("parms HGNN", "unknown quantity to match 'parms'.*mean 'params'"),
        ("params HGN", "mean 'HGNN'"),
        ("params dense", "dense has no experts whose size could be matched"),
        (7, "match is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            Match.parse(text)  # pyright: ignore[reportArgumentType]  # one is no text


def test_what_is_there_already_is_counted(places):
    plan = plan_of(places)
    for run, status in zip(plan.runs, ("ok", "interrupted", "crashed"), strict=False):
        folder = RunFolder(run.folder.parent, ".", run.run_id)
        run.folder.mkdir(parents=True)
        (folder.path / "record.json").write_text("{}" if status == "crashed" else "")
    again = plan_of(places)
    assert [found.statuses[0] for found in again.configurations[:4]] == ["damaged"] * 3 + [None]


def test_a_run_that_cannot_be_is_named(places):
    with pytest.raises(ValueError, match=r"run mean · num_experts 2 \(seed 0\): unknown hgnn_conv_type"):
        plan_of(places, base={**BASE, "hgnn_conv_type": "HNNH"})
    with pytest.raises(ValueError, match="num_heads is 3 and does not divide"):
        plan_of(places, base={**BASE, "num_heads": 3})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coupler": "GNN", "hgnn_conv_type": "x"}, "unknown hgnn_conv_type 'x'"),
        ({"micro_batch_size": 3}, "micro_batch_size is 3, which does not divide the batch of 4"),
        ({"min_steps_per_epoch": 1000}, "1000 are needed"),
        ({"max_seq_length": 10_000}, "one block needs 10000"),
        ({"batch_size": 10**6}, "batch_size 1000000 with drop_last"),
        ({"embed_dim": 2**20}, "a training step of this model needs at least"),
        ({"coupler": "topk", "coupler_option": ["k=5"]}, "k is 5; it must be a whole number from 1 to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_plan_refuses_at_once_what_a_run_refuses(places, flags, message):
    base = {"coupler": "mean", **BASE, **flags}
    with pytest.raises(Refused, match=message):
        plan_of(places, base=base, grid=None)
    with pytest.raises(Refused, match=message):
        prepare(config_of({**base, "coupler_type": base.pop("coupler"), **places}))


def test_the_seeds_that_comparisons_need():
    """2 / 2ⁿ is the least p of n paired seeds: 7 for 3 comparisons, 9 for 8 to 12, 10 for 13 to 25."""
    for configurations, needed in ((2, 6), (4, 7), (9, 9), (13, 9), (14, 10), (26, 10)):
        plan = Plan("s", [0], [None] * configurations, [])  # pyright: ignore[reportArgumentType]
        assert plan.seeds_needed() == needed


def test_seeds_that_cannot_support_a_hypothesis_are_named(capsys):
    for seeds, hypotheses, warned in ((8, 6, False), (8, 7, True), (9, 7, False), (3, 0, False)):
        plan = Plan("s", list(range(seeds)), [], [])
        warn_of_few_seeds(plan, [None] * hypotheses, Console())  # pyright: ignore[reportArgumentType]
        shown = " ".join(capsys.readouterr().out.split())
        expected = "Warning: 8 seeds cannot support a hypothesis; 7 at p ≤ 0.05 need 9."
        assert shown == (expected if warned else "")


def test_the_dry_run_fits_80_columns_and_writes_nothing(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--results-dir", places["results_dir"], "--data-dir", places["data_dir"], "--dry-run"]
    words = ["coupler=mean,HGNN,topk", "static_hyperedge_strategy=all_pairs,all_triplets", "gnn_layers=1,2"]
    assert main(["--sweep", *words, *SIZES, "--seeds", "2", "--match", "params HGNN", *flags]) == 0
    shown = capsys.readouterr().out
    assert "8 configurations × 2 seeds" in shown, "mean and topk differ in the width they are matched to"
    assert "Warning: 2 seeds cannot give a significant result" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert not (tmp_path / "results").exists()


REFUSED = [
    ([], "give one of them"),
    (["nowhere.toml"], "nowhere.toml cannot be read"),
    (["--sweep", "coupler=HGN"], "run HGN (seed 0): unknown coupler 'HGN'"),
    (["--sweep", "coupler=mean", "--seeds", "0"], "seeds is 0"),
    (["--sweep", "coupler=mean", "--time-budget", "soon"], "--time-budget is 'soon'"),
    (["--sweep", "coupler=mean", "--match", "size HGNN"], "unknown quantity to match 'size'"),
    (["--sweep", "copler=mean"], "unknown key 'copler'"),
    # executors: whoever forgets --executor slurm would train on the login node
    (["--executor", "slum"], "'slum'; allowed: local, ray, slurm. Did you mean 'slurm'?"),
    (["--address", "auto"], "ray_address is for --executor ray, and this is local; drop it."),
    (["--slurm-time", "1h"], "slurm_time is for --executor slurm, and this is local; drop it."),
    (["--cpus-per-run", "1"], "cpus_per_run is for a cluster"),
    (["--executor", "ray", "--device", "mps"], "must be cpu or cuda"),
    (
        ["--executor", "ray", "--cpus-per-run", "0"],
        "--cpus-per-run is 0; it must be a whole number from 1 to 1,000,000,000",
    ),
    (["--executor", "slurm", "--devices-per-run", "2", "--cpus-per-run", "3"], "evenly by 2 devices"),
    (["--devices-per-run", "0"], "--devices-per-run is 0"),
    (["--executor", "slurm", "--plan"], "--plan asks one device of this machine, and runs are on slurm"),
    (["--devices-per-run", "2", "--match", "time mean"], "--match time asks one device of this machine"),
    (["--devices-per-run", "3"], "a batch of 4 cannot be shared evenly by 3 ranks"),
]


def test_wrong_input_is_one_line_and_status_2(places, tmp_path, capsys):
    own = ["--data-dir", places["data_dir"], "--results-dir", places["results_dir"]]
    for flags, message in REFUSED:
        given = {word.partition("=")[0] for word in flags}
        sweep = (
            [] if not flags or {"nowhere.toml", "--sweep"} & given else ["--sweep", "coupler=mean", *SIZES]
        )
        with pytest.raises(SystemExit) as stopped:
            main([*sweep, *flags, *own])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["results", "results/sweep"])
def test_the_plan_refuses_a_folder_that_no_run_can_write(places, tmp_path, capsys, name):
    blocker = tmp_path / name
    blocker.parent.mkdir(exist_ok=True)
    blocker.write_text("")
    own = ["--data-dir", places["data_dir"], "--results-dir", places["results_dir"]]
    with pytest.raises(SystemExit):
        main(["--sweep", "coupler=mean", *SIZES, *own, "--dry-run"])
    assert "cannot be written (Not a directory); choose another with --results" in capsys.readouterr().err
    assert blocker.read_text() == ""


def test_hypotheses_that_no_run_answers_are_refused_before_any_run(places, tmp_path, capsys):
    (tmp_path / "h.toml").write_text(
        '[[hypothesis]]\nstatement = "x"\nbetter = {coupler = "GNN"}\nthan = {coupler = "mean"}\n'
    )
    base, grid = "\n".join(["[base]", *SIZES]), '[grid]\ncoupler = ["mean", "HGNN"]\n'
    (tmp_path / "s.toml").write_text(f'hypotheses = "h.toml"\n{base}\n{grid}')
    with pytest.raises(SystemExit):
        main([str(tmp_path / "s.toml"), "--data-dir", places["data_dir"], "--dry-run"])
    assert "hypothesis 1: better = {'coupler_type': 'GNN'} selects no run" in capsys.readouterr().err


def test_durations():
    for text, seconds in (("90", 90), ("90s", 90), ("9m", 540), ("1.5h", 5400), (None, None)):
        assert seconds_of("time_budget", text) == seconds


def test_at_one_seed_all_couplers_see_the_same_batches(places):
    """Paired by construction; that the weights start alike, tests/gnnmoe/test_model_start.py holds."""

    def made(coupler: str, seed: int):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**BASE, **places}.items()]
        prepared = prepare(parse(RunConfig, [*flags, "--coupler", coupler, "--seed", str(seed)]))
        return torch.cat([batch["input_ids"] for batch in prepared.loaders["train"]])

    batches = made("mean", 3)
    assert all(torch.equal(made(coupler, 3), batches) for coupler in ("HGNN", "topk"))
    assert not torch.equal(made("mean", 4), batches)


def test_other_hypergraph_couplers_are_matched_to_the_first_one_of_the_sweep(places):
    """A convolution with a map more is larger, and is narrowed like any other coupler."""
    grid = {"coupler": ["HGNN"], "hgnn_conv_type": ["HypergraphConv", "HNHN"]}
    plan, unmatched = (plan_of(places, match=match, grid=grid, seeds=1) for match in ("params HGNN", None))
    first, second = (c.cost.params for c in plan.configurations)
    assert first == unmatched.configurations[0].cost.params
    assert unmatched.configurations[1].cost.params > 1.03 * first
    assert second == pytest.approx(first, rel=0.01)
    assert plan.configurations[1].off_by == pytest.approx(second / first - 1)
    assert plan.configurations[1].off_by != 0.0
