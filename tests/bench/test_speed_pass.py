"""The speed pass of a run: a copy alone on the device, the coupler's own cost, a profile; and failures."""

from __future__ import annotations

import copy
import gzip
import json
import pickle

import pytest
import torch

from bench.cli import parse
from bench.config import ExecutionConfig, MeasureConfig, RunConfig, preset_names
from bench.measure import speed_pass
from bench.measure.speed_pass import SNAPSHOT, TRACE, SpeedPass, on_host, profile_steps
from bench.measure.timing import TrainingSteps, products_beside
from bench.record import Memory, NotMeasured, Speed
from bench.run.__main__ import main
from bench.training.step import Execution
from gnnmoe import GNNMoEConfig, GNNMoEModel
from tests._records import made_memory, made_speed, measured
from tests.bench._runs import only_run, results_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
QUICK = MeasureConfig(speed_warmup_steps=1, speed_steps=2)


def model_of(coupler: str = "HGNN", **fields) -> GNNMoEModel:
    usual = {"embed_dim": 16, "num_layers": 1, "max_seq_length": 8, "vocab_size": 50}
    return GNNMoEModel(GNNMoEConfig(coupler_type=coupler, **{**usual, **fields}), seed=0)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(8).repeat(2, 1)
    return [{"input_ids": ids, "targets": ids.clone()} for _ in range(count)]


def passed(model, folder, measure: MeasureConfig = QUICK, device=CPU, **config):
    said: list[str] = []
    found = SpeedPass(RunConfig(measure=measure, **config), device, folder, said.append)
    speed, memory = found.run(model, batches(), lambda batch: batch, None)
    return speed.model_dump(mode="json"), memory.model_dump(mode="json"), said


# --- the pass --------------------------------------------------------------------------------------


def test_the_model_stays_as_it_was_and_the_record_has_every_part(tmp_path):
    model = model_of()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    speed, memory, said = passed(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(speed["step_seconds"]) == len(speed["fetch_seconds"]) == 2
    for name in ("matrix_flops_per_second", "compile_seconds", "marginal"):
        assert speed[name]["value"] is None
        assert len(speed[name]["reason"]) > 10
    assert set(memory["by_phase"]) == {"built", "first_step", "steady"}
    assert said == []
    assert list(tmp_path.iterdir()) == []
    json.dumps([speed, memory], allow_nan=False)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_warms_up_until_the_steps_are_steady(preset):
    assert parse(RunConfig, ["--preset", preset], presets=True).measure.speed_warmup_steps == "auto"


def test_the_model_waits_on_the_host_and_comes_back_whatever_happens(monkeypatch):
    moves: list[str] = []
    model = model_of()
    monkeypatch.setattr(model, "cpu", lambda: moves.append("cpu"))
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)))

    def fails() -> None:
        with on_host(model, CUDA):
            assert moves == ["cpu"]
            raise ValueError("in the pass")

    with pytest.raises(ValueError, match="in the pass"):
        fails()
    assert moves == ["cpu", "cuda:0"]


def test_steps_faster_than_the_products_timed_are_a_note_and_end_nothing(tmp_path, monkeypatch):
    """MFU over 100 %; 2 FLOP/s is what any model surpasses."""
    monkeypatch.setattr(SpeedPass, "_matrix_rate", lambda self, steps: 2.0)
    speed, _, [note] = passed(model_of(), tmp_path)
    assert speed["matrix_flops_per_second"] == 2.0
    assert "the steps did more FLOP/s than the matrix products" in note
    monkeypatch.setattr(SpeedPass, "_matrix_rate", lambda self, steps: 1e18)
    speed, _, said = passed(model_of(), tmp_path)
    assert speed["matrix_flops_per_second"] == 1e18
    assert said == []


def test_compiling_is_what_the_warm_up_took_beyond_its_steps(tmp_path):
    times = Speed(**{**made_speed([1.0, 2.0, 3.0], 8), "warmup_seconds": [40.0, 12.0, 1.0]})
    compiled = SpeedPass(RunConfig(execution=ExecutionConfig(compile=True)), CPU, tmp_path, print)
    assert compiled._compiling(times) == 38.0 + 10.0
    assert isinstance(SpeedPass(RunConfig(), CPU, tmp_path, print)._compiling(times), NotMeasured)


def test_memory_of_a_compiled_step_is_what_a_meter_can_see_of_it(tmp_path, monkeypatch):
    """The tracker runs a step uncompiled; graphs replay in a pool whose tensors the allocator never sees."""
    seen = made_memory(5, 9) | {"peak_reserved_bytes": 9, "by_part": {"model": 5},
                                "by_phase": {"built": 1, "first_step": 4, "steady": 5}}  # fmt: skip
    monkeypatch.setattr(speed_pass, "peak_memory", lambda *_: Memory(**seen))

    def memory(device, **execution):
        config = RunConfig(execution=ExecutionConfig(**execution))
        return SpeedPass(config, device, tmp_path, print)._memory(None).model_dump(mode="json")  # pyright: ignore

    assert memory(CPU) == memory(CUDA) == memory(CUDA, compile=True) == Memory(**seen).model_dump(mode="json")
    assert "uncompiled" in memory(CPU, compile=True)["remark"]
    graphs = memory(CUDA, compile=True, compile_mode="reduce-overhead")
    assert not measured(graphs["peak_allocated_bytes"])
    assert not measured(graphs["by_phase"]["steady"])
    assert (graphs["peak_reserved_bytes"], graphs["by_phase"]["built"]) == (9, 1)


# --- the coupler's own cost ------------------------------------------------------------------------


def test_the_coupler_alone_is_timed_beside_the_mean_coupler(monkeypatch):
    """The two models in turn, on a clock by which HGNN takes 3 s a step and mean 2 s."""
    now, order = [0.0], []

    def step(model, *_):
        order.append(model.config.coupler_type)
        now[0] += {"HGNN": 3.0, "mean": 2.0}[order[-1]]

    model = model_of("HGNN", gnn_layers=1)
    steps = TrainingSteps(copy.deepcopy(model), batches(), RunConfig().training)
    monkeypatch.setattr("bench.measure.timing.training_step", step)
    monkeypatch.setattr("bench.measure.timing.perf_counter", lambda: now[0])
    monkeypatch.setattr(speed_pass, "peak_memory", lambda *_: Memory(**made_memory(1000, 1)))
    memory = Memory(**made_memory(1234, 1))
    found = speed_pass.marginal_cost(steps, memory, RunConfig(measure=QUICK), CPU).model_dump()
    assert order == ["HGNN", "mean", "HGNN", "mean", "mean", "HGNN"]  # one of warm-up each, then in turn
    assert (found["step_seconds"], found["reference_step_seconds"]) == ([3.0, 3.0], [2.0, 2.0])
    assert (found["reference"], found["steady"], found["peak_allocated_bytes"]) == ("mean", False, 234)
    own = sum(p.numel() for layer in model.layers for p in layer.coupler.parameters())  # pyright: ignore
    mean = sum(p.numel() for layer in model_of("mean").layers for p in layer.coupler.parameters())  # pyright: ignore
    assert found["parameters"] == own - mean
    assert 0 < found["training_flops_per_token"] < 6 * 2 * 4 * own


def test_mean_and_dense_have_no_cost_over_the_mean_coupler(tmp_path):
    measure = MeasureConfig(speed_warmup_steps=1, speed_steps=2, marginal=True)
    mean = passed(model_of("mean"), tmp_path, measure)[0]["marginal"]
    assert mean == {"value": None, "reason": "the coupler is mean itself"}
    dense = passed(model_of("dense"), tmp_path, measure)[0]["marginal"]
    assert dense["value"] is None
    assert "dense has other blocks" in dense["reason"]


# --- the profile -----------------------------------------------------------------------------------


def test_a_profile_is_a_trace_and_the_costliest_operations(tmp_path):
    measure = MeasureConfig(speed_warmup_steps=1, speed_steps=2, profile=True)
    _, _, said = passed(model_of(), tmp_path, measure)
    trace = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))
    assert sum(event.get("name") == "aten::addmm" for event in trace["traceEvents"]) > 2
    assert said[0] == f"costliest operations of a step (all of them in {TRACE} beside the record):"
    assert len(said) == 6
    shares = [float(line.split("%")[0]) for line in said[1:]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100
    assert any("aten::" in line for line in said)


class Row:
    def __init__(self, key, device, own, count=2, annotation=False) -> None:
        self.key, self.count, self.is_user_annotation = key, count, annotation
        self.device_type = type("Type", (), {"name": device})
        self.self_device_time_total, self.self_cpu_time_total = own, 1.0


def test_on_cuda_operations_count_by_the_kernels_they_launched(monkeypatch):
    """Kernels have rows of their own, and annotations contain others: neither may count twice."""
    rows = [
        Row("aten::mm", "CPU", 60.0), Row("aten::add", "CPU", 30.0, count=8), Row("launch", "CPU", 0.0),
        Row("sgemm", "CUDA", 60.0), Row("add_kernel", "CUDA", 40.0),
        Row("step", "CUDA", 100.0, annotation=True),
    ]  # fmt: skip
    found = speed_pass._costliest(rows, on_cuda=True)
    found = [(one.name, one.share, one.calls) for one in found]
    assert found == [("aten::mm", 0.6, 1), ("aten::add", 0.3, 4)]


@pytest.mark.gpu
@needs_gpu
def test_gpu_the_copy_has_the_device_to_itself(tmp_path):
    """Allocated at the peak is what the copy takes, not the model besides; and MFU is a share."""
    config = model_of(embed_dim=128, ffn_dim=20_000).config  # weights, and few activations
    model = Execution(ExecutionConfig(), CUDA).build(config, seed=0)
    parameters = sum(p.nbytes for p in model.parameters())
    speed, memory, _ = passed(model, tmp_path, MeasureConfig(marginal=True), CUDA)
    assert memory["by_part"]["model"] == pytest.approx(parameters, rel=0.01)
    assert memory["peak_allocated_bytes"] < 4.8 * parameters  # weights, gradients, two moments; not five
    assert speed["matrix_flops_per_second"] > 1e12
    assert next(model.parameters()).device == CUDA
    assert abs(speed["marginal"]["peak_allocated_bytes"]) < parameters


# --- in a run --------------------------------------------------------------------------------------


def test_a_run_measures_the_coupler_and_writes_its_profile(tiny, capsys):
    assert main(["--coupler", "HGNN", "--marginal", "--profile", *tiny]) == 0
    record, said = only_run(results_of(tiny))[1], capsys.readouterr().out
    marginal = record["speed"]["marginal"]
    assert marginal["peak_allocated_bytes"] > 0
    assert len(marginal["step_seconds"]) == len(marginal["reference_step_seconds"]) == 2
    assert "costliest operations of a step" in said
    assert "over mean (2 alternating rounds, not steady)" in " ".join(said.split())
    assert list(results_of(tiny).glob("*/*/trace.json.gz"))
    assert max(map(len, said.splitlines())) <= 80 or "record: " in said


def test_a_speed_pass_that_runs_out_of_memory_costs_the_run_nothing_else(tiny, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(speed_pass, "measure_speed", full)
    assert main(["--coupler", "mean", *tiny]) == 0
    _, record = only_run(results_of(tiny))
    assert record["status"] == "ok"
    assert record["quality"]["validation"]["tokens"] > 0
    for quantity in ("speed", "memory"):
        assert record[quantity]["value"] is None
        assert "ran out of memory" in record[quantity]["reason"]
    assert "speed and memory are not measured" in capsys.readouterr().out
    assert main(["--coupler", "mean", "--marginal", "--profile", *tiny]) == 0
    said = capsys.readouterr().out
    for name in ("marginal", "profile"):  # they make no other run
        assert f"note: it was made without --{name}; --force runs it again with it" in said


def test_what_is_measured_besides_may_run_out_of_memory_alone(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for name in ("marginal_cost", "profile_steps"):
        monkeypatch.setattr(speed_pass, name, full)
    measure = MeasureConfig(speed_warmup_steps=1, speed_steps=2, marginal=True, profile=True)
    speed, memory, said = passed(model_of(), tmp_path, measure)
    assert len(speed["step_seconds"]) == 2
    assert measured(memory)
    assert not measured(speed["marginal"])
    assert "note: the profile ran out of memory" in said


@pytest.mark.gpu
@needs_gpu
def test_gpu_a_profile_has_a_trace_and_a_snapshot_of_the_memory(tmp_path):
    steps = TrainingSteps(model_of().to(CUDA), [{k: v.to(CUDA) for k, v in batches(1)[0].items()}],
                          RunConfig().training)  # fmt: skip
    found = profile_steps(steps.step, tmp_path, CUDA)
    assert len(found) == 5
    assert 0.1 < sum(one.share for one in found) <= 1.0 + 1e-6
    assert (tmp_path / TRACE).stat().st_size > 1000
    snapshot = pickle.loads((tmp_path / SNAPSHOT).read_bytes())
    assert any(len(trace) > 10 for trace in snapshot["device_traces"])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_matrix_rate_is_of_the_runs_precision(precision, dtype, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(speed_pass, "matrix_rate", lambda *found: asked.append(found) or 1.0)
    config = RunConfig(execution=ExecutionConfig(precision=precision))
    steps, model = TrainingSteps(model_of(), batches(1), config.training), model_of().config
    assert SpeedPass(config, CUDA, tmp_path, print)._matrix_rate(steps) == 1.0
    tokens = batches(1)[0]["input_ids"].numel()
    assert asked == [(CUDA, dtype, products_beside(model, tokens, CUDA))]


def test_any_other_failure_of_the_speed_pass_comes_out(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(speed_pass, "measure_speed", broken)
    with pytest.raises(ValueError, match="a bug"):
        passed(model_of(), tmp_path)


def test_the_costliest_are_by_their_own_time_and_calls_are_of_one_step(tmp_path):
    """One product of 300 rows in a step beside four additions of 4 numbers."""
    large, small = torch.ones(300, 300), torch.ones(4)

    def step(_):
        torch.mm(large, large)
        for _ in range(4):
            torch.add(small, small)

    found = profile_steps(step, tmp_path, CPU)
    assert [(one.name, one.calls) for one in found[:2]] == [("aten::mm", 1), ("aten::add", 4)]
    assert found[0].share > 0.5
    assert sum(one.share for one in found) == pytest.approx(1.0)
