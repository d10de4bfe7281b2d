"""What bench.speed times and holds it against: known by hand, with clocks and rates that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.config import DataConfig, ModelConfig, PlacesConfig, RunConfig, TrainingConfig
from bench.speed import steps as steps_module
from bench.speed.floors import Rates
from bench.speed.forms import INPUT_SETS, Form, FormInputs, Parity, Runner, Timing, coupler_rows, forms_of
from bench.speed.machine import Machine
from bench.speed.record import BARE, FETCH, FILE, HARNESSED, read_speed_record
from bench.speed.steps import InTurn, harness_rows
from gnnmoe import GNNMoEConfig

CPU = torch.device("cpu")
SMALL = GNNMoEConfig(
    coupler_type="static", embed_dim=8, num_experts=3, max_seq_length=4, vocab_size=64, num_layers=1
)
BATCH, N, E, D = 2, 8, 3, 8
QUIET = Timing(rounds=1, warmup=0, memory=False, forward=False)


class MadeUp(Machine):
    """A machine of known rates."""

    def __init__(self, flops_per_second: float, bytes_per_second: float) -> None:
        super().__init__(CPU)
        self.made_up = Rates(flops_per_second, bytes_per_second)

    def rates(self, precision: str, model: GNNMoEConfig, tokens: int) -> Rates:
        return self.made_up


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize(("flops_a_second", "bound"), [(1e5, "flops"), (1e9, "bytes")])
def test_a_row_by_hand(precision, size, flops_a_second, bound):
    """``static``: a sum over experts and the combiner, each product with its bytes and its FLOPs."""
    [row, _] = coupler_rows(
        "case", forms_of("static", SMALL), BATCH, MadeUp(flops_a_second, 1e6), precision, QUIET
    )
    total, combiner = 2 * N * E * D, 2 * N * D * D
    flops, moved = 3 * (total + combiner), (3 * E + 2) * N * D * size
    assert (row.flops, row.floor_bytes) == (flops, moved)
    times = {"flops": flops / flops_a_second, "bytes": moved / 1e6}
    assert row.floor_seconds == pytest.approx(times[bound]) == pytest.approx(max(times.values()))
    products = [(total, E + 1), (2 * total, 2 * E + 1), *[(combiner, 3)] * 3]
    seconds = [max(flops / flops_a_second, rows * N * D * size / 1e6) for flops, rows in products]
    assert row.roofline_seconds == pytest.approx(sum(seconds))


def test_the_floor_of_dense_is_of_the_one_block_that_it_gets():
    dense = replace(SMALL, coupler_type="dense")
    [row, _] = coupler_rows("case", forms_of("dense", dense), BATCH, MadeUp(1e9, 1e6), "fp32", QUIET)
    assert row.floor_bytes == (3 * 1 + 2) * N * D * 4


def test_no_committed_row_has_a_floor_above_its_roofline():
    folder = Path(__file__).parents[2] / "results" / "reference" / "speed"
    places = sorted(folder.glob(f"*/{FILE}"))
    assert places
    rows = [row for place in places for row in read_speed_record(place)[1]]
    both = [(row.floor_seconds, row.roofline_seconds, row.subject, row.form) for row in rows
            if row.floor_seconds and row.roofline_seconds]  # fmt: skip
    assert both
    assert [one for one in both if one[0] > one[1] * (1 + 1e-4)] == []


@pytest.fixture
def runner() -> Runner:
    return Runner(Form("static", "vectorized", SMALL), FormInputs(SMALL, BATCH, "fp32", CPU), "fp32")


def test_a_step_has_the_gradient_of_everything(runner):
    """Of both inputs and each parameter, as a training asks for them."""
    _, (of_experts, of_input, *of_parameters) = runner.step(0)
    assert of_experts.shape == (BATCH, 4, E, D)
    assert of_input is None, "static does not read it"
    parameters = dict(runner.coupler.named_parameters())
    assert len(of_parameters) == len(parameters) > 3
    for gradient, (name, parameter) in zip(of_parameters, parameters.items(), strict=True):
        assert gradient is not None, name
        assert gradient.shape == parameter.shape
        assert torch.count_nonzero(gradient), name


def test_inputs_are_several_sets_in_turn_expert_by_expert(runner):
    outputs = [runner.step(number)[0] for number in range(INPUT_SETS + 1)]
    assert INPUT_SETS == 3
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    for x, _ in runner.inputs.sets:
        assert x.permute(2, 0, 1, 3).is_contiguous()  # (E, B, L, D) is how memory lies


@pytest.mark.parametrize("part", ["output", "experts", "parameter"])
def test_parity_sees_each_part(runner, part):
    output, gradients = runner.step(0)
    found = list(gradients)
    if part == "output":
        output = output * 1.001
    elif part == "experts":
        found[0] = found[0] * 1.001
    else:
        place = max(range(2, len(found)), key=lambda k: float(found[k].abs().max()))
        found[place] = found[place] * 1.001
    parity = Parity()
    parity.look(runner, runner.step(0))
    assert parity.differences["static vectorized"] < 1e-5
    parity.look(runner, (output, tuple(found)))
    assert parity.differences["static vectorized"] > 2e-4
    parity.look(runner, (output, (*gradients[:-1], None)))
    assert parity.differences["static vectorized"] > 1e-5, "a gradient that is missing"


def test_the_harness_is_timed_whole_and_its_first_steps_are_dropped(small_data_dir, monkeypatch):
    """A clock that moves by 1 at each look: fetched after 1, the step ends after 2, a bare one takes 1."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(steps_module, "time", SimpleNamespace(perf_counter=clock))
    seen = []
    run = InTurn.run
    monkeypatch.setattr(InTurn, "run", lambda self: (run(self), mark(self.seconds)))

    def mark(seconds: dict[str, list[float]]) -> None:
        for name, values in seconds.items():
            seen.append((name, list(values)))
            values[:] = [value + 10 * place for place, value in enumerate(values)]

    config = RunConfig(
        model=ModelConfig(embed_dim=8, num_layers=1, max_seq_length=16), data=DataConfig(),
        training=TrainingConfig(batch_size=4, max_steps=8, min_steps_per_epoch=1),
        places=PlacesConfig(data_dir=small_data_dir),
    )  # fmt: skip
    rows = harness_rows(config, Machine(CPU), warmup=2)
    assert seen == [(HARNESSED, [2.0] * 6), (BARE, [1.0] * 6), (FETCH, [1.0] * 6)]
    assert [row.form for row in rows] == [HARNESSED, BARE, FETCH]
    assert rows[0].seconds == [22.0, 32.0, 42.0, 52.0]
    assert rows[2].seconds == [21.0, 31.0, 41.0, 51.0]


def test_a_form_that_computes_more_has_the_floor_of_the_others():
    """The linear stack folds; PyG's form of it does E times the products, and no floor rises with that."""
    linear = replace(SMALL, coupler_type="HGNN", coupler_options={"activation": "none", "residual": "false"})
    rows = coupler_rows("case", forms_of("HGNN", linear), BATCH, MadeUp(1e5, 1e9), "fp32", QUIET)
    flops = {row.form: row.flops or 0 for row in rows}
    assert flops["pyg"] > flops["vectorized"]
    assert {row.floor_seconds for row in rows} == {flops["vectorized"] / 1e5}


def test_a_peak_is_beyond_inputs_and_parameters(monkeypatch):
    monkeypatch.setattr("bench.speed.forms.peak_bytes", lambda *_: 1_000_000)
    timed = Timing(rounds=1, warmup=0)
    [row, _] = coupler_rows("case", forms_of("static", SMALL), BATCH, MadeUp(1e9, 1e9), "fp32", timed)
    sets = INPUT_SETS * 4 * (N * E * D + N * D)
    parameters = 4 * (E + D * D + D + 2 * D)  # weights of the sum; W, b; the norm's two
    assert row.peak_bytes == 1_000_000 - sets - parameters
